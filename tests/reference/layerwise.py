"""Layer-wise solvers from their formulas: numpy, float64, dense, one thing at a time.

Kernels are `[d_out, d_in]`, masks True = kept.
"""

import math

import numpy as np
from reference.selection import best, removed_count

import jaxsparse as js

NM_AXES = js.Axes(input=(1,), output=(0,))


def damped(gram: np.ndarray, rel_damping: float = 0.01) -> tuple[np.ndarray, float]:
    """The damped gram matrix, ones for dead inputs, and the damping."""
    diagonal = np.diag(gram)
    ones = np.where(diagonal == 0, 1.0, 0.0)
    damping = rel_damping * np.mean(diagonal + ones)
    return gram + np.diag(ones + damping), damping


def error(w: np.ndarray, new: np.ndarray, gram: np.ndarray) -> float:
    """`tr((W' - W) G (W' - W)^T)`."""
    change = np.asarray(new, np.float64) - np.asarray(w, np.float64)
    return float(np.trace(change @ gram @ change.T))


def shares(total: int, room: np.ndarray) -> np.ndarray:
    """A total over blocks in proportion to their room."""
    everything = max(room.sum(), 1)
    ends = [math.floor(total * (part / everything) + 0.5) for part in np.cumsum(room)]
    return np.diff([0, *ends])


def block_counts(removed, gone, dead, size, w):
    """How many of each block of columns go: gone already, of dead inputs, others.

    Of dead inputs the smallest weights, in whatever block they are.
    """
    starts = range(0, len(dead), size)
    per_block = lambda flags: np.array([flags[:, a : a + size].sum() for a in starts])
    unused = ~gone & dead
    kinds = [per_block(gone), per_block(unused), per_block(~gone & ~unused)]
    left = max(removed - kinds[0].sum(), 0)
    first = min(left, kinds[1].sum())
    of_dead = per_block(~lowest(np.where(unused, np.abs(w), np.inf), first))
    return kinds[0] + of_dead + shares(left - first, kinds[2])


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """The mask without the `count` lowest; ties kept in the order of columns."""
    mask = np.zeros(scores.size, bool)
    mask[best(scores.T.ravel(), scores.size - count)] = True
    return mask.reshape(scores.T.shape).T


def column_sweep(
    w, gram, sparsity, pattern, *, block_size=128, rel_damping=0.01, mask=None
):
    """SparseGPT by all of `U`, column by column; weights and mask."""
    dense = np.array(w, np.float64)
    d_out, d_in = dense.shape
    matrix, _ = damped(gram, rel_damping)
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    pivots, dead = np.diag(upper), np.diag(gram) == 0
    gone = np.zeros(dense.shape, bool) if mask is None else ~mask
    now, kept = np.where(dead, 0.0, dense), ~gone
    nm = isinstance(pattern, js.NM)
    if nm:
        counts = [[removed_count(sparsity, pattern.of)] * d_out] * d_in
    elif pattern.scope == "output":
        each = removed_count(sparsity, d_in)
        pairs = zip(gone, dense, strict=True)
        rows = [
            block_counts(each, g[None], dead, block_size, w[None]) for g, w in pairs
        ]
        counts = np.transpose(rows)
    else:
        each = removed_count(sparsity, dense.size)
        counts = block_counts(each, gone, dead, block_size, dense)
    size = pattern.of if nm else block_size
    for j in range(d_in):
        if j % size == 0:
            tile = slice(j, min(j + size, d_in))
            scores = (now[:, tile] / pivots[tile]) ** 2
            unused = -1 / np.maximum(np.abs(dense[:, tile]), 1e-37)
            scores = np.where(dead[tile], unused, scores)
            scores = np.where(gone[:, tile], -np.inf, scores)
            count = counts[j // size]
            if np.ndim(count):
                pairs = zip(scores, count, strict=True)
                chosen = np.concatenate([lowest(s[None], c) for s, c in pairs])
            else:
                chosen = lowest(scores, count)
            kept[:, tile] = chosen & ~gone[:, tile]
        e = np.where(kept[:, j], 0.0, now[:, j]) / pivots[j]
        now[:, j:] -= e[:, None] * upper[j, j:]
    return np.where(kept, np.where(dead, dense, now), 0.0), kept


def refit(w, mask, matrix) -> np.ndarray:
    """Least squares for each row; `matrix` is damped as wanted."""
    new = np.zeros(w.shape)
    for row, keep, out in zip(w, mask, new, strict=True):
        out[keep] = np.linalg.solve(matrix[np.ix_(keep, keep)], (matrix @ row)[keep])
    return new


def greedy_row(row, inverse, count, group, dead):
    """The order in which a row's weights go, and what each step costs; dead first."""
    row, inverse = row.copy(), inverse.copy()
    gone, lost, order, costs = set(), {}, [], []
    while True:
        free = [
            j
            for j in range(len(row))
            if j not in gone and lost.get(j // group, 0) < count
        ]
        if not free:
            return order, costs
        each = [
            -1 / abs(row[j]) if dead[j] else row[j] ** 2 / inverse[j, j] for j in free
        ]
        j = free[int(np.argmin(each))]
        order.append(j)
        costs.append(min(each))
        gone.add(j)
        lost[j // group] = lost.get(j // group, 0) + 1
        row = row - inverse[:, j] * row[j] / inverse[j, j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]


def exact_obs(w, gram, sparsity, pattern, *, rel_damping=0.01):
    """Greedy OBS in each row; weights and mask."""
    dense = np.array(w, np.float64)
    d_in = dense.shape[1]
    matrix, _ = damped(gram, rel_damping)
    inverse, dead = np.linalg.inv(matrix), np.diag(gram) == 0
    live = np.where(dead, 0.0, dense)
    group = pattern.of if isinstance(pattern, js.NM) else d_in
    by_layer = pattern == js.Unstructured()
    count = d_in if by_layer else removed_count(sparsity, group)
    taken = [greedy_row(row, inverse, count, group, dead) for row in dense]
    kept = np.ones(dense.shape, bool)
    if by_layer:
        steps = [
            (dearest, step, i, order[step])
            for i, (order, costs) in enumerate(taken)
            for step, dearest in enumerate(np.maximum.accumulate(costs))
        ]
        chosen = sorted(steps)[: removed_count(sparsity, dense.size)]
        places = [(i, j) for _, _, i, j in chosen]
    else:
        places = [(i, j) for i, (order, _) in enumerate(taken) for j in order]
    kept[tuple(np.transpose(places))] = False
    new = refit(live, kept, matrix)
    return np.where(kept & dead, dense, new), kept


def admm(w, gram, sparsity, pattern, *, iterations=20, choosing=15, rel_damping=0.1):
    """ADMM with a penalty of 1, in inputs scaled to a diagonal of ones."""
    from reference.selection import mask as select

    scale = np.sqrt(np.diag(gram))
    matrix = gram / np.outer(scale, scale) + rel_damping * np.eye(len(gram))
    target = np.asarray(w, np.float64) * scale
    inverse = np.linalg.inv(matrix + np.eye(len(gram)))
    x, u = target, np.zeros_like(target)
    for i in range(iterations):
        if i < choosing:
            kept = select(np.abs(x + u), sparsity, pattern, NM_AXES)
        z = np.where(kept, x + u, 0.0)
        u = u + x - z
        x = (target @ matrix + z - u) @ inverse
    return np.where(kept, (x + u) / scale, 0.0), kept
