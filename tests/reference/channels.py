"""Removing inputs of a layer by brute force: numpy, float64, fitted anew each time.

Kernels are `[d_out, d_in]`, blocks `[n_blocks, size]` columns.
"""

import numpy as np
from reference.layerwise import damped


def refit(w, matrix, keep) -> np.ndarray:
    """Least squares on the kept columns, from a square root of the damped gram."""
    values, vectors = np.linalg.eigh(matrix)
    root = np.sqrt(values)[:, None] * vectors.T  # root^T root = matrix
    new = np.zeros(w.shape)
    new[:, keep] = np.linalg.lstsq(root[:, keep], root @ w.T, rcond=None)[0].T
    return new


def rise(w, matrix, gone) -> float:
    """What the objective is when columns go and all others are fitted."""
    keep = np.ones(w.shape[1], bool)
    keep[np.asarray(gone, int)] = False
    change = refit(w, matrix, keep) - w
    return float(np.trace(change @ matrix @ change.T))


def live(w, gram) -> np.ndarray:
    return np.where(np.diag(gram) == 0, 0.0, np.asarray(w, np.float64))


def errors(w, gram, blocks, *, rel_damping=0.01) -> np.ndarray:
    """Of each block, by fitting all other columns."""
    matrix, _ = damped(gram, rel_damping)
    return np.array([rise(live(w, gram), matrix, block) for block in blocks])


def greedy(w, gram, blocks, count, at_once, *, rel_damping=0.01):
    """Steps, errors and kept columns; every score from a fit of its own."""
    matrix, _ = damped(gram, rel_damping)
    dense = live(w, gram)
    step, cost = np.full(len(blocks), -1), np.zeros(len(blocks))
    turn = 0
    while (step < 0).sum() > len(blocks) - count:
        gone = np.concatenate([[], *blocks[step >= 0]])
        base = rise(dense, matrix, gone)
        left = [b for b in range(len(blocks)) if step[b] < 0]
        each = [
            rise(dense, matrix, np.concatenate([gone, blocks[b]])) - base for b in left
        ]
        # Of equals the later one goes first.
        order = sorted(zip(each, [-b for b in left], strict=True))
        for paid, b in order[: min(at_once, count - int((step >= 0).sum()))]:
            step[-b], cost[-b] = turn, paid
        turn += 1
    keep = np.ones(w.shape[1], bool)
    keep[blocks[step >= 0].ravel()] = False
    return step, cost, keep
