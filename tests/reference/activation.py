"""Statistics of inputs and the scores made from them, in float64 and as written."""

import numpy as np


def weighted(x, w=None):
    """Mean, `E[x^2]`, variance and `E[x x^T]` of rows `[n, d]` with weights `[n]`."""
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if w is None else np.asarray(w, np.float64)
    x, w = x[w > 0], w[w > 0]
    d = x.shape[1]
    if not len(x):
        return 0.0, np.zeros(d), np.zeros(d), np.zeros(d), np.zeros((d, d))
    n = w.sum()
    mean = sum(wi * xi for wi, xi in zip(w, x, strict=True)) / n
    square = sum(wi * xi**2 for wi, xi in zip(w, x, strict=True)) / n
    variance = sum(wi * (xi - mean) ** 2 for wi, xi in zip(w, x, strict=True)) / n
    gram = sum(wi * np.outer(xi, xi) for wi, xi in zip(w, x, strict=True)) / n
    return n, mean, square, variance, gram


def wanda(w, x):
    """Of a matrix `[d_out, d_in]` and its input rows."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    scores = np.empty_like(w)
    for i, j in np.ndindex(w.shape):
        scores[i, j] = abs(w[i, j]) * np.sqrt(np.mean(x[:, j] ** 2))
    return scores


def output_change(w, x, i, j):
    """The root mean square of what unit i's output loses with weight j."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    pruned = w.copy()
    pruned[i, j] = 0
    return np.sqrt(np.mean(((x @ w.T - x @ pruned.T) ** 2)[:, i]))


def mean_replaced(w, x, j):
    """The summed squared error of all outputs when input j is its mean, per row."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    replaced = x.copy()
    replaced[:, j] = x[:, j].mean()
    return np.mean(np.sum((x @ w.T - replaced @ w.T) ** 2, axis=1))


def gradient_norms(grads, order):
    grads = np.asarray(grads, np.float64)
    if order == 1:
        return np.abs(grads).sum(0)
    return np.sqrt((grads**2).sum(0))
