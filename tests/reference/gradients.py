"""Scores of a small net in float64, from their definitions and without autodiff.

The net is `y = relu(x @ a) @ b` with the loss `sum((y - t) ** 2) / 2`.
"""

import numpy as np


def loss(a, b, x, t) -> float:
    return float(np.sum((np.maximum(x @ a, 0) @ b - t) ** 2) / 2)


def gradient(a, b, x, t):
    """By central differences; exact but for rounding where the loss is quadratic."""
    return _numeric_gradient(lambda a, b: loss(a, b, x, t), a, b)


def snip(a, b, x, t):
    """The derivative of the loss by a gate on each weight, at gate 1, normalised."""
    gates = lambda c, d: loss(a * c, b * d, x, t)
    by_gate = [
        np.abs(g) for g in _numeric_gradient(gates, np.ones_like(a), np.ones_like(b))
    ]
    total = sum(g.sum() for g in by_gate)
    return [g / total for g in by_gate]


def synflow(a, b):
    """For each weight of `x @ a @ b` the sum of |products| of the paths through it."""
    through_a, through_b = np.zeros_like(a), np.zeros_like(b)
    for i, j in np.ndindex(*a.shape):
        for k in range(b.shape[1]):
            path = abs(a[i, j] * b[j, k])
            through_a[i, j] += path
            through_b[j, k] += path
    return through_a, through_b


def _numeric_gradient(f, a, b, step: float = 1e-6):
    grads = []
    for which, w in enumerate((a, b)):
        grad = np.zeros_like(w)
        for index in np.ndindex(*w.shape):
            ends = []
            for sign in (1, -1):
                args = [a.copy(), b.copy()]
                args[which][index] += sign * step
                ends.append(f(*args))
            grad[index] = (ends[0] - ends[1]) / (2 * step)
        grads.append(grad)
    return grads
