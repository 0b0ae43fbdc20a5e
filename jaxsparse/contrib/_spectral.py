"""Spectral clustering of many vectors, through a few of them."""

import numpy as np
import scipy.linalg
import scipy.spatial.distance as distances

_LANDMARKS = 1024
_ROWS = 4096  # at once
_STARTS, _ROUNDS = 8, 100  # of k-means


def spectral_labels(x: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The cluster of each row of `x`, numbered from the largest one on.

    With the kernel `exp(-|x - z|^2 / 2 s^2)` to landmarks `z`, rows of vectors drawn
    from `x` (all of them where they are few), and rows that add up to 1, `Z`; the
    affinity of two rows is that of two steps of a walk over the landmarks, `Z D^-1 Z^T`
    with `D` the sums of columns. Its first eigenvectors come from a matrix of the
    landmarks alone, and k-means clusters their rows. (Chen & Cai, 2011.)
    """
    rng = np.random.default_rng(seed)
    x = np.asarray(x, np.float64)
    landmarks = x
    if len(x) > _LANDMARKS:
        landmarks = x[np.sort(rng.choice(len(x), _LANDMARKS, replace=False))]
    apart = distances.pdist(landmarks, "sqeuclidean")
    apart = apart[apart > 0]
    width = float(np.median(apart)) if apart.size else 1.0  # all alike
    parts = range(0, len(x), _ROWS)
    walk = lambda i: _walk(x[i : i + _ROWS], landmarks, width)
    sums = sum(walk(i).sum(0) for i in parts)
    scale = 1 / np.sqrt(np.where(sums > 0, sums, 1))
    gram = sum((z * scale).T @ (z * scale) for z in map(walk, parts))
    last = len(landmarks) - 1
    first = max(0, last - clusters + 1)
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=(first, last))
    lengths = np.sqrt(np.maximum(values, np.finfo(np.float64).tiny))
    basis = scale[:, None] * vectors / lengths
    embedded = np.concatenate([walk(i) @ basis for i in parts])
    norms = np.linalg.norm(embedded, axis=1, keepdims=True)
    return _k_means(embedded / np.where(norms > 0, norms, 1), clusters, rng)


def _walk(x: np.ndarray, landmarks: np.ndarray, width: float) -> np.ndarray:
    """How near rows are to landmarks; each row adds up to 1."""
    apart = distances.cdist(x, landmarks, "sqeuclidean") / (2 * width)
    near = np.exp(apart.min(1, keepdims=True) - apart)
    return near / near.sum(1, keepdims=True)


def _k_means(x: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The best of some starts. SciPy has one that leaves clusters empty."""
    found = min((_one_start(x, clusters, rng) for _ in range(_STARTS)), key=_error)
    labels = found[1]
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return np.argsort(order)[labels]


def _error(found: tuple[float, np.ndarray]) -> float:
    return found[0]


def _one_start(
    x: np.ndarray, clusters: int, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Centers far from each other (k-means++), then in the middle of their rows."""
    centers = x[rng.integers(len(x))][None]
    nearest = distances.cdist(x, centers, "sqeuclidean").min(1)
    while len(centers) < clusters and nearest.sum() > 0:
        new = x[rng.choice(len(x), p=nearest / nearest.sum())][None]
        centers = np.concatenate([centers, new])
        nearest = np.minimum(nearest, distances.cdist(x, new, "sqeuclidean")[:, 0])
    labels = np.full(len(x), -1)
    for _ in range(_ROUNDS):
        apart = distances.cdist(x, centers, "sqeuclidean")
        before, labels = labels, apart.argmin(1)
        if np.array_equal(before, labels):
            break
        used = np.unique(labels)
        centers = np.stack([x[labels == k].mean(0) for k in used])
        labels = np.searchsorted(used, labels)
    apart = distances.cdist(x, centers, "sqeuclidean")
    return float(apart.min(1).sum()), apart.argmin(1)
