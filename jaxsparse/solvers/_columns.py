"""SparseGPT: one column after another, each error passed on to those that follow."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array
from jaxsparse.curvature._chunks import in_parts
from jaxsparse.curvature._factor import inverse_lower, matmul
from jaxsparse.curvature._gram import GramFactor
from jaxsparse.patterns._counts import count_dtype
from jaxsparse.patterns._nm import nm_mask
from jaxsparse.patterns._threshold import top_k_masks
from jaxsparse.solvers import _arguments, _solved
from jaxsparse.solvers._solved import Solved
from jaxsparse.tree import Axes

_COLUMNS = 8  # written out; the rest is matrix products


def sparsegpt(
    w: Array,
    gram: Array | GramFactor,
    sparsity: float | Array | None = None,
    *,
    pattern: patterns.Unstructured | patterns.NM = patterns.Unstructured(),
    mask: Array | None = None,
    block_size: int = 128,
    rel_damping: float | Array = 0.01,
    damping: float | Array | None = None,
) -> Solved:
    """Prunes a layer column by column, later columns making up for earlier ones.

    With `(G + damping I)^-1 = U^T U`, `U` upper triangular: at the start of a block of
    columns the weights with the smallest `w_ij^2 / U_jj^2` are chosen (for N:M at the
    start of each group). Then column after column, `e = (w_j - q_j) / U_jj`, where
    `q_j` has zeros for what was chosen, and `w_k -= e U_jk` for all `k > j`. Frantar &
    Alistarh (2023, SparseGPT, arXiv:2301.00774).

    The count rule holds for the whole layer (`scope="output"`: for each row). Each
    block gets its share in proportion to its weights, by rounding what all blocks so
    far should have lost. Among equal scores of a block the weight of the lower column
    is kept, then that of the lower row: the order of a flax kernel `[d_in, d_out]`.

    Weights of dead inputs are the first to go, the smallest of the whole layer (or
    group) first, and count towards the sparsity; those that are kept (when there are
    more of them than are to be removed, or in N:M groups) stay what they are. Weights
    that `mask` has removed stay removed, and count; a group of N:M that has lost more
    than the pattern asks for keeps fewer.

    Rows do not depend on each other but for the scope of a layer: shard `w` over its
    outputs, with the gram matrix on every device. Then one integer a pass is exchanged.

    Differs from the reference implementation, which removes one weight too many in each
    block, sets all weights of dead inputs to zero, needs a block size that `of` divides
    (here groups are chosen one by one, so the block size says nothing), and multiplies
    by `U` row by row: here blocks take `(W - Q) R` with `R = U^-1`, the same numbers
    from half the factorisation.

    Args:
      w: `[d_out, d_in]`, for outputs `x @ w.T`. Batches by `jax.vmap`.
      gram: `X^T X / n`, `[d_in, d_in]`, or what `js.curvature.factor_gram` made of it:
        kernels that read the same input share it.
      sparsity: the fraction to remove, in [0, 1), possibly traced; for `NM` it may be
        left out.
      pattern: `Unstructured("layer" or "output")`, or `NM`.
      mask: what was pruned before; True = kept.
      block_size: columns of which the weights compete, 128 in the paper.
      rel_damping: relative to the mean of the gram's diagonal. Not used for a factor.
      damping: an absolute one in its place.

    Returns:
      The weights, mask and info.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf, a sparsity or a group size out of
        range, a mask that has removed more than asked for, a gram matrix that is not
        positive definite (in eager use; under jit see `info.failed`).
      TypeError: other patterns, types that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> w = jnp.array([[1.0, 2.0, 3.0]])
      >>> gram = jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])    # two equal inputs
      >>> solved = js.solvers.sparsegpt(w, gram, 0.34, damping=1e-4)
      >>> solved.w.round(2).tolist(), solved.mask.tolist()
      ([[0.0, 3.0, 3.0]], [[False, True, True]])
    """
    _arguments.check_layer(w, gram)
    d_in = w.shape[1]
    asked = _arguments.check_pattern(pattern, sparsity, d_in, solver="sparsegpt")
    _arguments.check_gone(mask, w, asked, pattern)
    _arguments.check_dampings(damping, rel_damping)
    _checks.check_positive_int(block_size, name="block_size")
    factor = _solved.factor_of(w, gram, damping, rel_damping)
    if isinstance(pattern, patterns.NM):
        removed = patterns.removed_count(asked, pattern.of)
        # Groups are chosen alone, so that this is a matter of speed.
        block_size = max(1, min(block_size, 64) // pattern.of) * pattern.of
    else:
        by_row = pattern.scope == "output"
        removed = patterns.removed_count(asked, d_in if by_row else w.size)
    removed = jnp.asarray(removed, count_dtype(w.size))
    block_size = min(block_size, d_in)
    return _solved.done(_jitted(w, factor, removed, mask, pattern, block_size))


@functools.partial(jax.jit, static_argnames=("pattern", "block_size"))
def _jitted(w, factor, removed, mask, pattern, block_size) -> Solved:
    solve = functools.partial(_solve, pattern=pattern, block_size=block_size)
    return _solved.on_mesh(solve, w, factor, removed, mask)


class _Problem(NamedTuple):
    """A layer as the sweep sees it, transposed so that a column is a stretch of memory.

    `before` may be None; `removed` is a count for each block, or the one for each
    group of N:M.
    """

    x: Array  # [d_in, d_out]
    root: Array  # [d_in, d_in]
    inverses: Array  # of the diagonal blocks of the root, [blocks, size, size]
    dead: Array  # [d_in]
    before: Array | None  # the mask of what was pruned before, [d_in, d_out]
    removed: Array


class _Swept(NamedTuple):
    """What the columns so far have become."""

    change: Array  # w - q, [d_in, d_out], 0 for dead inputs
    kept: Array  # [d_in, d_out]
    error: Array  # of the damped gram matrix, [d_out]


def _solve(
    w: Array,
    factor: GramFactor,
    removed: Array,
    mask: Array | None,
    *,
    pattern: patterns.Pattern,
    block_size: int,
) -> Solved:
    dtype = factor.root.dtype
    # A dead input's row and column of the root are 0 but for the diagonal: what happens
    # to its weights changes no others.
    x, dead = w.astype(dtype).T, factor.dead
    zero = jnp.zeros((), dtype)
    before = None if mask is None else mask.T
    if isinstance(pattern, patterns.Unstructured):
        by_row = pattern.scope == "output"
        removed = _counts(removed, before, dead, x, block_size, by_row)
    inverses = _inverses(factor.root, block_size)
    problem = _Problem(x, factor.root, inverses, dead, before, removed)
    body = functools.partial(_block, problem, pattern=pattern, step=block_size)
    start = _Swept(
        jnp.zeros_like(x), jnp.zeros(x.shape, bool), jnp.zeros(x.shape[1:], dtype)
    )
    change, kept, error = in_parts(x.shape[0], block_size, body, start)
    moved = jnp.where(factor.failed, jnp.full((), jnp.nan, dtype), x - change)
    moved = jnp.where(kept, moved, zero)
    # Each row's error is that of the damped matrix, which the sweep adds up.
    added = factor.damping * jnp.sum(change * change, axis=0)
    error = jnp.sum(jnp.maximum(error - added, zero))
    info = _solved.solve_info(
        x,
        factor.gram,
        error=error,
        damping=factor.damping,
        failed=factor.failed,
    )
    return Solved(moved.T.astype(w.dtype), kept.T, info)


def _inverses(root: Array, size: int) -> Array:
    """The diagonal blocks of `U`: the inverses of those of `R`. The last is padded."""
    n = root.shape[0]
    blocks = -(-n // size)
    cut = []
    for at in range(0, n, size):
        block = root[at : at + size, at : at + size]
        short = size - block.shape[0]
        if short:
            ones = jnp.pad(
                jnp.zeros(size - short, root.dtype),
                (0, short),
                "constant",
                constant_values=1,
            )
            block = jnp.pad(block, (0, short)) + jnp.diag(ones)
        cut.append(block)
    assert len(cut) == blocks
    lower = jnp.swapaxes(jnp.stack(cut), -1, -2)
    return jnp.swapaxes(inverse_lower(lower), -1, -2)


# How many weights each block loses.


def _counts(
    removed: Array,
    before: Array | None,
    dead: Array,
    x: Array,
    size: int,
    by_row: bool,
) -> Array:
    """`[blocks]`, or `[blocks, d_out]` where rows compete alone.

    What is gone stays gone, then weights of dead inputs go, then others. Each of these
    kinds is taken from the blocks in proportion to how many are there; but of dead
    inputs, if not all go, the smallest weights, wherever they are.
    """
    kept = jnp.ones(x.shape, bool) if before is None else before
    unused = kept & dead[:, None]
    kinds = [
        _per_block(flags, size, by_row) for flags in (~kept, unused, kept & ~unused)
    ]
    gone, of_dead, of_live = kinds
    every = lambda counts: jnp.sum(counts, axis=0, dtype=counts.dtype)
    left = jnp.maximum(removed - every(gone), 0)
    first = jnp.minimum(left, every(of_dead))

    def smallest(_: None) -> Array:
        score = jnp.where(unused, jnp.abs(x), -jnp.ones_like(x))
        stays = every(of_dead) - first
        stays, axes = (stays[None], (0,)) if by_row else (stays[0], None)
        (largest,) = top_k_masks([score], stays, axes=axes)
        return of_dead - _per_block(largest & unused, size, by_row)

    some = jnp.any(first < every(of_dead))
    dead_gone = lax.cond(some, smallest, lambda _: of_dead, None)
    return gone + dead_gone + _share(left - first, of_live)


def _per_block(flags: Array, size: int, by_row: bool) -> Array:
    d_in, d_out = flags.shape
    dtype = count_dtype(d_in * d_out)
    counts = flags.astype(dtype)
    if not by_row:
        counts = jnp.sum(counts, axis=1, keepdims=True, dtype=dtype)
    blocks = -(-d_in // size)
    counts = jnp.pad(counts, [(0, blocks * size - d_in), (0, 0)])
    counts = counts.reshape(blocks, size, counts.shape[1])
    return jnp.sum(counts, axis=1, dtype=dtype)


def _share(total: Array, room: Array) -> Array:
    """Splits a total over blocks by the room in them, exactly.

    Up to a block with the part `c` of all room it is `floor(total * c + 1/2)`.
    """
    with jax.enable_x64(True):
        wide = room.astype(jnp.float64)
        reached = jnp.cumsum(wide, axis=0)
        most = jnp.maximum(reached[-1:], jnp.ones((), jnp.float64))
        total = jnp.broadcast_to(total, reached[-1:].shape).astype(jnp.float64)
        ends = jnp.floor(total * (reached / most) + 0.5)
        shares = jnp.diff(ends, axis=0, prepend=jnp.zeros_like(ends[:1]))
        return shares.astype(room.dtype)


# The sweep.


class _Columns(NamedTuple):
    """Some columns of a layer and what is known of them."""

    now: Array  # their weights when the block begins, [k, d_out]
    upper: Array  # their block of U, [k, k]
    dead: Array  # [k]
    before: Array | None  # [k, d_out]


class _Fixed(NamedTuple):
    """Columns that are done."""

    error: Array  # (w - q) / U_jj, [k, d_out]
    new: Array  # q
    kept: Array


def _block(
    problem: _Problem,
    start: Any,
    size: int,
    swept: _Swept,
    *,
    pattern: patterns.Pattern,
    step: int,
) -> _Swept:
    """Sweeps over one block of columns."""
    start = jnp.asarray(start, jnp.int32)
    cut = lambda a: lax.dynamic_slice_in_dim(a, start, size, 0)
    number = start // step
    upper = lax.dynamic_index_in_dim(problem.inverses, number, 0, keepdims=False)
    upper = upper[:size, :size]
    passed = _solved.product_before(problem.root, swept.change, start, size, step)
    own = cut(problem.x)
    now = own + matmul(upper.T, passed)
    before = None if problem.before is None else cut(problem.before)
    block = _Columns(now, upper, cut(problem.dead), before)
    if isinstance(pattern, patterns.Unstructured):
        gone = lax.dynamic_index_in_dim(problem.removed, number, 0)  # [1, 1 or d_out]
        if pattern.scope == "output":
            (kept,) = top_k_masks([_scores(block)], size - gone, axes=(0,))
        else:
            (kept,) = top_k_masks([_scores(block)], now.size - gone[0, 0])
        fixed = _sweep(block, kept, _COLUMNS, lambda columns, kept: kept)
    else:
        assert isinstance(pattern, patterns.NM)
        of = pattern.of
        keep = of - jnp.minimum(problem.removed, of - pattern.keep)
        axes = Axes(input=(0,), output=(1,))
        choose = lambda group, _: nm_mask("", _scores(group), keep, pattern, axes)
        none = jnp.zeros(now.shape, bool)
        fixed = _sweep(block, none, max(1, _COLUMNS // of) * of, choose, of)
    put = lambda a, part: lax.dynamic_update_slice_in_dim(a, part, start, 0)
    live = lambda a: jnp.where(block.dead[:, None], jnp.zeros_like(a), a)
    lost = live(fixed.error)
    error = swept.error + jnp.sum(lost * lost, axis=0)
    change = put(swept.change, live(own - fixed.new))
    return _Swept(change, put(swept.kept, fixed.kept), error)


def _scores(columns: _Columns) -> Array:
    """`(w_ij / U_jj)^2`; less for dead inputs, and least for what is gone."""
    ratio = columns.now / jnp.diagonal(columns.upper)[:, None]
    unused = _solved.below_zero(columns.now)
    score = jnp.where(columns.dead[:, None], unused, ratio * ratio)
    if columns.before is None:
        return score
    return jnp.where(columns.before, score, jnp.full((), -jnp.inf, score.dtype))


def _sweep(
    block: _Columns, kept: Array, part: int, choose: Any, group: int | None = None
) -> _Fixed:
    """Fixes the columns of a block, `part` of them at a time.

    What earlier parts pass on is one product, what is passed on within a part is
    written out. `choose(columns, kept)` gives the mask of the `group` columns (None:
    of the whole part) that come next, from their weights at that time.
    """
    size = block.now.shape[0]

    def turn(at: Any, count: int, fixed: _Fixed) -> _Fixed:
        cut = lambda a: lax.dynamic_slice_in_dim(a, at, count, 0)
        at = jnp.asarray(at, jnp.int32)
        columns = lax.dynamic_slice_in_dim(block.upper, at, count, 1)
        now = cut(block.now) - matmul(columns.T, fixed.error)
        before = None if block.before is None else cut(block.before)
        own = _Columns(now, cut(columns), cut(block.dead), before)
        new = _few(own, cut(fixed.kept), choose, group or count)
        put = lambda a, part: lax.dynamic_update_slice_in_dim(a, part, at, 0)
        return jax.tree.map(put, fixed, new)

    start = _Fixed(jnp.zeros_like(block.now), jnp.zeros_like(block.now), kept)
    return in_parts(size, min(part, size), turn, start)


def _few(columns: _Columns, kept: Array, choose: Any, group: int) -> _Fixed:
    """Fixes a few columns, one after another."""
    now, upper, dead, before = columns
    count, zero, rest = now.shape[0], jnp.zeros((), now.dtype), now
    errors, masks, last = [], [], []
    for i in range(count):
        if i % group == 0:
            own = slice(i, i + group)
            left = None if before is None else before[own]
            part = _Columns(rest[:group], upper[own, own], dead[own], left)
            mask = choose(part, kept[own])
            masks.extend(
                lax.optimization_barrier(mask if left is None else mask & left)
            )
        last.append(rest[0])
        errors.append(jnp.where(masks[i], zero, rest[0] / upper[i, i]))
        # Without a barrier XLA makes a column anew for each one that follows.
        rest = rest[1:] - upper[i, i + 1 :][:, None] * errors[i][None, :]
        rest = lax.optimization_barrier(rest) if i + 1 < count else rest
    mask = jnp.stack(masks)
    return _Fixed(jnp.stack(errors), jnp.where(mask, jnp.stack(last), zero), mask)
