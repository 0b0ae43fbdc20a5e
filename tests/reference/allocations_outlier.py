"""Allocations by blocks: by bisection, by enumeration, in float64."""

import itertools

import numpy as np


def bisected(sparsity_at, sizes, removed):
    """The sparsities at the t where they remove that many; they rise with t."""
    low, high = -1e6, 1e6
    for _ in range(400):
        middle = (low + high) / 2
        if np.dot(sparsity_at(middle), sizes) < removed:
            low = middle
        else:
            high = middle
    return sparsity_at(high)


def shifted(wanted, sizes, removed):
    """`wanted` and a constant, cut to [0, 1]."""
    wanted = np.asarray(wanted, float)
    return bisected(lambda t: np.clip(wanted + t, 0, 1), sizes, removed)


def min_max(values):
    values = np.asarray(values, float)
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else 0 * values


def outlier_shares(blocks, times):
    """Each block is a list of arrays."""
    flat = [np.concatenate([np.ravel(x) for x in b]).astype(np.float64) for b in blocks]
    return [np.mean(x > times * x.mean()) for x in flat]


def dsa_importance(blocks):
    flat = [np.concatenate([np.ravel(x) for x in b]).astype(np.float64) for b in blocks]
    spread = [np.var(np.log(x[x > 0]), ddof=1) for x in flat]
    return [np.arcsin(min(np.arctan(v), 1)) for v in spread]


def linear_programme(worth, sizes, removed, lower, upper):
    """The greatest `sum worth * x` with `sum x = removed`, by all corners.

    At a corner all x but one are at a bound.
    """
    sizes = np.asarray(sizes, float)
    low, high = lower * sizes, upper * sizes
    best = -np.inf
    for free in range(len(sizes)):
        others = [i for i in range(len(sizes)) if i != free]
        for ends in itertools.product((low, high), repeat=len(others)):
            x = np.empty(len(sizes))
            x[others] = [end[i] for i, end in zip(others, ends, strict=True)]
            x[free] = removed - x[others].sum()
            if low[free] - 1e-9 <= x[free] <= high[free] + 1e-9:
                best = max(best, np.dot(worth, x))
    return best


def shared_out(importance, sizes, kept, least):
    """`least * n` each, and the rest by importance, none above its size."""
    importance, sizes = np.asarray(importance, float), np.asarray(sizes, float)
    importance = importance / importance.sum()
    density = lambda t: np.minimum(1, least + t * importance / sizes)
    low, high = 0.0, 1e9
    for _ in range(400):
        middle = (low + high) / 2
        if np.dot(density(middle), sizes) < kept:
            low = middle
        else:
            high = middle
    return density(high)
