"""Erdos-Renyi-Kernel by bisection on the one unknown."""

import math


def erk_densities(dims: list[tuple[int, ...]], density: float, power: float = 1.0):
    """`min(1, eps * (sum / product) ** power)` with the `eps` that meets the total.

    The share kept rises with `eps`, so that halving an interval finds it.
    """
    weights = [(sum(d) / math.prod(d)) ** power for d in dims]
    sizes = [math.prod(d) for d in dims]
    densities = lambda eps: [min(1.0, eps * w) for w in weights]
    kept = lambda eps: sum(d * n for d, n in zip(densities(eps), sizes, strict=True))
    low, high = 0.0, 1.0 / min(weights)
    for _ in range(200):
        middle = (low + high) / 2
        if kept(middle) < density * sum(sizes):
            low = middle
        else:
            high = middle
    return densities(high)
