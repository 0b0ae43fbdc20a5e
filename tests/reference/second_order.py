"""Second-order pruning from its formulas: dense or sequential, numpy, float64.

Everywhere `F = damping * I + G^T G / m` with the gradients `G` [m, d]. `m` is the
number of rows of `G`, rows of zeros included. A `remove` or `mask` is bool of shape
[d]; a mask is True where a weight is kept.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from reference import selection

Array = np.ndarray

# SparseML adds this to its denominators, in every precision.
SPARSEML_EPS = float(np.finfo(np.float32).eps)


def fisher(grads: Array, damping: float) -> Array:
    """`F`, dense, [d, d]."""
    grads = np.asarray(grads, np.float64)
    return damping * np.eye(grads.shape[1]) + grads.T @ grads / len(grads)


def blocks_of(size: int, block_size: int) -> list[slice]:
    """Consecutive blocks; the last one is smaller where they do not divide."""
    starts = range(0, size, block_size)
    return [slice(at, min(at + block_size, size)) for at in starts]


# The inverse, one gradient after another.


def inverse_by_rank_one(grads: Array, damping: float) -> Array:
    """`F^-1` of one block [m, b], by Sherman-Morrison for each gradient.

    `H <- H - (H g)(H g)^T / (m + g^T H g)` from `H = I / damping`: WoodFisher
    (2020, arXiv:2004.14340) and oBERT (2022, arXiv:2203.07259).
    """
    grads = np.asarray(grads, np.float64)
    inverse = np.eye(grads.shape[1]) / damping
    for g in grads:
        v = inverse @ g
        inverse -= np.outer(v, v) / (len(grads) + g @ v)
    return inverse


def block_inverses(grads: Array, damping: float, block_size: int) -> list[Array]:
    """`inverse_by_rank_one` of every block along d."""
    return [
        inverse_by_rank_one(grads[:, block], damping)
        for block in blocks_of(grads.shape[1], block_size)
    ]


class Static(NamedTuple):
    """`F^-1 = I / damping - sum_i v_i v_i^T / D_i`."""

    vectors: Array  # v, [m, d]
    denominators: Array  # D, [m]
    damping: float


def mfac_static(grads: Array, damping: float) -> Static:
    """The static recursion of M-FAC (2021, arXiv:2107.03356), without a d x d matrix.

    `v_i = g_i / damping - sum_{j<i} (v_j . g_i / D_j) v_j` and
    `D_i = m + g_i . v_i`.
    """
    grads = np.asarray(grads, np.float64)
    vectors, denominators = np.zeros_like(grads), np.zeros(len(grads))
    for i, g in enumerate(grads):
        before = vectors[:i]
        vectors[i] = g / damping - (before @ g / denominators[:i]) @ before
        denominators[i] = len(grads) + g @ vectors[i]
    return Static(vectors, denominators, damping)


def static_ihvp(static: Static, x: Array) -> Array:
    """`F^-1 x` for `x` [d]."""
    v, denominators, damping = static
    return x / damping - (v @ x / denominators) @ v


def static_diagonal(static: Static) -> Array:
    """The diagonal of `F^-1`, [d]."""
    v, denominators, damping = static
    return 1 / damping - np.sum(v**2 / denominators[:, None], axis=0)


# A sliding window, and the optimizer that multiplies by its inverse.


class Window(NamedTuple):
    """A ring buffer of gradients and their inner products."""

    grads: Array  # [m, d]
    dots: Array  # grads @ grads.T
    last: int  # the row that the next gradient replaces
    damping: float


def mfac_dynamic(window: int, dimension: int, damping: float) -> Window:
    """An empty window: all rows are zeros, and all of them are counted by m."""
    empty = np.zeros((window, dimension))
    return Window(empty, np.zeros((window, window)), 0, damping)


def dynamic_update(window: Window, g: Array) -> Window:
    """Replaces the oldest gradient: one row and one column of the inner products."""
    grads, dots, last, damping = window
    grads, dots = grads.copy(), dots.copy()
    grads[last] = g
    dots[last] = dots[:, last] = grads @ g
    return Window(grads, dots, (last + 1) % len(grads), damping)


def dynamic_ihvp(window: Window, x: Array) -> Array:
    """`F^-1 x` through the unpivoted LU of `m I + G G^T / damping`.

    Its pivots are `D`, and its `U_ij` with i < j is `v_i . g_j`. So `v_i . x` follows
    by forward substitution in `U^T`, and `v = L^-1 G / damping` needs no d x m array.
    """
    grads, dots, _, damping = window
    m = len(grads)
    lower, upper = lu(m * np.eye(m) + dots / damping)
    pivots = np.diag(upper)
    by_vector = grads @ x / damping
    for i in range(m):
        by_vector[i] -= (upper[:i, i] / pivots[:i]) @ by_vector[:i]
    to_vectors = np.linalg.inv(lower) / damping
    return x / damping - grads.T @ (to_vectors.T @ (by_vector / pivots))


def update_mul(window: Window, g: Array) -> tuple[Array, Window]:
    """`F^-1 g` of the window that already holds `g`, and this window."""
    window = dynamic_update(window, g)
    return dynamic_ihvp(window, g), window


def lu(matrix: Array) -> tuple[Array, Array]:
    """Gaussian elimination without pivots: unit lower and upper factor."""
    upper, lower = np.array(matrix, np.float64), np.eye(len(matrix))
    for i in range(len(matrix) - 1):
        lower[i + 1 :, i] = upper[i + 1 :, i] / upper[i, i]
        upper[i + 1 :] -= np.outer(lower[i + 1 :, i], upper[i])
    return lower, np.triu(upper)


def mfac_optimizer(
    gradient: Callable[[Array, int], Array],
    w: Array,
    *,
    steps: int,
    learning_rate: float,
    window: int,
    damping: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    sparse: bool = False,
) -> Array:
    """The weights before the first and after each step, [steps + 1, d].

    `g = gradient(w, step) + weight_decay * w` enters the window, `u = F^-1 g`,
    `v <- momentum * v + (1 - momentum) * u` from zeros and without bias correction,
    `w <- w - learning_rate * v`. With `sparse`, all of this happens in the
    coordinates that are not zero at the start; the others never move.
    """
    w = np.array(w, np.float64)
    alive = w != 0 if sparse else np.ones(w.size, bool)
    state = mfac_dynamic(window, int(alive.sum()), damping)
    velocity, path = np.zeros(int(alive.sum())), [w.copy()]
    for step in range(steps):
        g = (np.asarray(gradient(w.copy(), step)) + weight_decay * w)[alive]
        u, state = update_mul(state, g)
        velocity = momentum * velocity + (1 - momentum) * u
        w[alive] -= learning_rate * velocity
        path.append(w.copy())
    return np.array(path)


# Removing weights.


def loss_increase(change: Array, fisher: Array) -> float:
    """`1/2 dw^T F dw`, what all of these updates keep small."""
    return float(change @ fisher @ change / 2)


def obs_independent(w: Array, inverse: Array, remove: Array) -> Array:
    """The sum of single-weight corrections, then zeros.

    `w - sum_q inverse[:, q] w_q / inverse[q, q]` over the removed q, each as if it
    were the only one.
    """
    w, inverse = np.asarray(w, np.float64), np.asarray(inverse)
    out = w - inverse @ np.where(remove, w / np.diag(inverse), 0.0)
    out[remove] = 0.0
    return out


def obs_joint(w: Array, fisher: Array, remove: Array) -> Array:
    """The least `1/2 dw^T F dw` of all changes that remove these weights.

    `w_K + F_KK^-1 F_KQ w_Q` for the kept K, zeros for the removed Q.
    """
    keep = ~np.asarray(remove)
    out = np.zeros(len(w))
    cross = fisher[np.ix_(keep, remove)] @ w[remove]
    out[keep] = w[keep] + np.linalg.solve(fisher[np.ix_(keep, keep)], cross)
    return out


def obs_greedy(w: Array, fisher: Array, count: int) -> tuple[Array, list[int]]:
    """Removes the cheapest weight `count` times; the weights, and the order.

    `q = argmin w_q^2 / H_qq` (the lowest q of equals), `w -= H[:, q] w_q / H_qq`,
    `H -= H[:, q] H[q, :] / H_qq`: exact OBS, one weight at a time, as in OBC
    (2022, arXiv:2208.11580).
    """
    w, inverse, order = np.array(w, np.float64), np.linalg.inv(fisher), []
    for _ in range(count):
        scores = np.full(len(w), np.inf)
        left = np.setdiff1d(np.arange(len(w)), order)
        scores[left] = w[left] ** 2 / np.diag(inverse)[left]
        q = int(np.argmin(scores))
        column = inverse[:, q] / inverse[q, q]
        w -= column * w[q]
        inverse = inverse - np.outer(column, inverse[q])
        order.append(q)
        w[order] = 0.0
    return w, order


def group_scores(w: Array, inverse: Array, groups: Iterable) -> Array:
    """`1/2 w_Q^T (inverse_QQ)^-1 w_Q`, the loss of each group if removed alone."""
    joint = lambda q: w[q] @ np.linalg.solve(inverse[np.ix_(q, q)], w[q]) / 2
    return np.array([joint(np.asarray(q)) for q in groups])


# Pruning in several steps.


class Step(NamedTuple):
    """What a step of pruning leaves."""

    w: Array
    mask: Array  # True = kept
    scores: Array  # those the step has chosen by; -inf where already removed


def sparseml_block_flow(
    w: Array,
    grads_per_step: Iterable[Array],
    sparsities: Sequence[float],
    *,
    block_size: int,
    damping: float,
    group: int = 1,
    eps: float = SPARSEML_EPS,
) -> list[Step]:
    """Gradual OBS of one flat tensor with the block Fisher, as oBERT does it.

    In each step: gradients of removed weights are zeroed, and the blocks are those of
    the full tensor, dead weights included. Scores are `w^2 / (2 diag + eps)`, or for a
    `group` of consecutive weights `1/2 w_Q^T (F^-1_QQ)^-1 w_Q`, repeated. Of all
    weights (groups) of the tensor, the `floor(s * n + 1/2)` lowest are removed. The
    update is the sum over what is newly removed of `F^-1[:, q] w_q / (F^-1_qq + eps)`,
    or of `F^-1[:, Q] (F^-1_QQ)^-1 w_Q`; then these are set to zero.

    Differs from SparseML, which rounds halves to the even count. `group` must divide
    the block size and the tensor.
    """
    w, mask, steps = np.array(w, np.float64), np.ones(len(w), bool), []
    for grads, sparsity in zip(grads_per_step, sparsities, strict=True):
        grads = np.where(mask, grads, 0.0)
        blocks = blocks_of(w.size, block_size)
        inverses = block_inverses(grads, damping, block_size)
        parts = [
            _scores_and_pulls(w[block], inverse, group, eps)
            for block, inverse in zip(blocks, inverses, strict=True)
        ]
        scores = np.where(mask, np.concatenate([s for s, _ in parts]), -np.inf)
        kept = lowest_removed(scores[::group], sparsity).repeat(group)
        new = mask & ~kept
        for block, inverse, (_, pull) in zip(blocks, inverses, parts, strict=True):
            w[block] -= inverse @ np.where(new[block], pull, 0.0)
        w[new], mask = 0.0, mask & kept
        steps.append(Step(w.copy(), mask, scores))
    return steps


def _scores_and_pulls(w: Array, inverse: Array, group: int, eps: float):
    """Scores of one block, and the `x` of each weight in the update `-inverse @ x`."""
    if group == 1:
        diagonal = np.diag(inverse)
        return w**2 / (2 * diagonal + eps), w / (diagonal + eps)
    groups = np.arange(w.size).reshape(-1, group)
    pulls = [np.linalg.solve(inverse[np.ix_(q, q)], w[q]) for q in groups]
    return group_scores(w, inverse, groups).repeat(group), np.concatenate(pulls)


def mfac_pruner_flow(
    w: Array,
    grads_per_step: Iterable[Array],
    sparsities: Sequence[float],
    *,
    block_size: int,
    damping: float,
) -> list[Step]:
    """Gradual OBS of one flat vector as the M-FAC pruner does it.

    In each step the removed coordinates are taken out before the rest is cut into
    blocks, so that block boundaries move. Scores are `w^2 / (2 diag)`; the lowest are
    removed until `floor(s * d + 1/2)` of all d are gone. The update is `F^-1` times
    `-w_q / diag_q` on what is newly removed (a sum of single-weight corrections),
    and these are set to zero.

    Differs from the reference, which truncates `d * (s - sparsity so far)`.
    """
    w, mask, steps = np.array(w, np.float64), np.ones(len(w), bool), []
    for grads, sparsity in zip(grads_per_step, sparsities, strict=True):
        rest, compact = w[mask], np.asarray(grads, np.float64)[:, mask]
        blocks = blocks_of(rest.size, block_size)
        statics = [mfac_static(compact[:, block], damping) for block in blocks]
        diagonal = np.concatenate([static_diagonal(static) for static in statics])
        scores = np.full(w.size, -np.inf)
        scores[mask] = rest**2 / (2 * diagonal)
        kept = lowest_removed(scores, sparsity)
        new = ~kept[mask]
        pull = np.where(new, -rest / diagonal, 0.0)
        for block, static in zip(blocks, statics, strict=True):
            rest[block] += static_ihvp(static, pull[block])
        rest[new] = 0.0
        w[mask], mask = rest, mask & kept
        steps.append(Step(w.copy(), mask, scores))
    return steps


def lowest_removed(scores: Array, sparsity: float) -> Array:
    """True where kept: all but the `floor(s * n + 1/2)` lowest scores."""
    keep = scores.size - selection.removed_count(sparsity, scores.size)
    mask = np.zeros(scores.size, bool)
    mask[selection.best(scores, keep)] = True
    return mask
