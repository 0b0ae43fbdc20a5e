"""SparseGPT: one column after another, each error passed on to those that follow."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, patterns
from jaxsparse._dtypes import count_dtype
from jaxsparse._loops import after
from jaxsparse._platform import on_cpu
from jaxsparse._typing import Array
from jaxsparse.linalg.chunks import in_parts
from jaxsparse.linalg.factor import matmul
from jaxsparse.linalg.gram import GramFactor
from jaxsparse.patterns.threshold import ordered_keys, top_k_masks
from jaxsparse.solvers import _arguments, _solved
from jaxsparse.solvers._solved import Solved

_TILE = 4  # columns in one pass over the memory; earlier ones act by a product


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

    `n` is `d_in` up to a whole number of blocks: one program serves all of them. What
    is added is 0, acts on nothing and is the first to go. `before` may be None;
    `removed` is a count for each block, or the one for each group of N:M.
    """

    x: Array  # [n, d_out]
    lower: Array  # the root, transposed, [n, n]
    dead: Array  # [n]
    before: Array | None  # the mask of what was pruned before, [n, d_out]
    removed: Array


class _Swept(NamedTuple):
    """What the columns so far have become."""

    change: Array  # w - q, [n, d_out], 0 for dead inputs
    kept: Array  # [n, d_out]
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
    dtype, d_in = factor.root.dtype, w.shape[1]
    # A dead input's row and column of the root are 0 but for the diagonal: what happens
    # to its weights changes no others.
    x, dead = w.astype(dtype).T, factor.dead
    zero = jnp.zeros((), dtype)
    before = None if mask is None else mask.T
    if isinstance(pattern, patterns.Unstructured):
        by_row = pattern.scope == "output"
        removed = _counts(removed, before, dead, x, block_size, by_row)
    more = -d_in % block_size
    problem = _Problem(
        _longer(x, more),
        lax.optimization_barrier(_larger(factor.root, more).T),
        _longer(dead, more),
        None if before is None else _longer(before, more),
        removed,
    )
    body = functools.partial(_block, problem, d_in, pattern=pattern)
    start = _Swept(
        jnp.zeros_like(problem.x),
        jnp.zeros(problem.x.shape, bool),
        jnp.zeros(x.shape[1:], dtype),
    )
    change, kept, error = in_parts(d_in + more, block_size, body, start)
    change, kept = change[:d_in], kept[:d_in]
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


def _longer(x: Array, more: int) -> Array:
    """With zeros behind it."""
    return jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]) if more else x


def _larger(matrix: Array, more: int) -> Array:
    """With ones behind it on the diagonal."""
    if not more:
        return matrix
    n = matrix.shape[0]
    wide = jnp.pad(matrix, (0, more))
    ones = jnp.diag(jnp.arange(n + more) >= n)
    return jnp.where(ones, jnp.ones((), matrix.dtype), wide)


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
        keys = ordered_keys(jnp.abs(x))
        keys = jnp.where(unused, keys, jnp.zeros_like(keys))
        stays = every(of_dead) - first
        return of_dead - _largest(keys, stays, size, by_row)

    some = jnp.any(first < every(of_dead))
    dead_gone = lax.cond(some, smallest, lambda _: of_dead, None)
    return gone + dead_gone + _share(left - first, of_live)


def _largest(keys: Array, stays: Array, size: int, by_row: bool) -> Array:
    """How many of the `stays` largest keys, which are not 0, each block has.

    The threshold is found bit by bit. Of what equals it the first blocks have most.
    """
    count = lambda flags: _per_block(flags, size, by_row)
    every = lambda flags: jnp.sum(count(flags), axis=0, dtype=stays.dtype)
    bits = 8 * keys.dtype.itemsize

    def turn(i: Any, cut: Array) -> Array:
        bit = jnp.ones((), keys.dtype) << (bits - 1 - i).astype(keys.dtype)
        return jnp.where(every(keys >= (cut | bit)[None]) >= stays, cut | bit, cut)

    start = jnp.zeros(stays.shape, keys.dtype)
    cut = lax.fori_loop(jnp.int32(0), jnp.int32(bits), turn, start)
    above, tied = count(keys > cut[None]), count(keys == cut[None])
    left = stays - jnp.sum(above, axis=0, dtype=stays.dtype)
    earlier = jnp.cumsum(tied, axis=0, dtype=tied.dtype) - tied
    return above + jnp.clip(left[None] - earlier, jnp.zeros_like(tied), tied)


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
    lower: Array  # their block of U^T, [k, k]
    dead: Array  # [k]
    before: Array | None  # [k, d_out]


class _Fixed(NamedTuple):
    """Columns that are done."""

    error: Array  # (w - q) / U_jj, [k, d_out]
    new: Array  # q
    kept: Array


def _block(
    problem: _Problem,
    d_in: int,
    start: Any,
    size: int,
    swept: _Swept,
    *,
    pattern: patterns.Pattern,
) -> _Swept:
    """Sweeps over one block of columns."""
    start = jnp.asarray(start, jnp.int32)
    cut = lambda a: lax.dynamic_slice_in_dim(a, start, size, 0)
    number = start // size
    corner = lax.dynamic_slice(problem.lower, (start, start), (size, size))
    eye = jnp.eye(size, dtype=corner.dtype)
    lower = lax.linalg.triangular_solve(corner, eye, left_side=True, lower=True)
    passed = _solved.product_before(problem.lower, swept.change, start, size, size)
    own = cut(problem.x)
    now = own + matmul(lower, passed)
    before = None if problem.before is None else cut(problem.before)
    block = _Columns(now, lower, cut(problem.dead), before)
    if isinstance(pattern, patterns.Unstructured):
        gone = lax.dynamic_index_in_dim(problem.removed, number, 0)  # [1, 1 or d_out]
        there = jnp.minimum(d_in - start, size).astype(gone.dtype)
        scores = _scores(block)
        if d_in < problem.x.shape[0]:  # what was added is the first to go
            added = jnp.arange(size, dtype=there.dtype)[:, None] >= there
            scores = jnp.where(added, jnp.full((), -jnp.inf, scores.dtype), scores)
        if pattern.scope == "output":
            (kept,) = top_k_masks([scores], there - gone, axes=(0,))
        else:
            (kept,) = top_k_masks([scores], there * now.shape[1] - gone[0, 0])
        fixed = _sweep(block, kept, _TILE, lambda _, kept: kept, _TILE)
    else:
        assert isinstance(pattern, patterns.NM)
        of = pattern.of
        keep = of - jnp.minimum(problem.removed, of - pattern.keep)
        choose = lambda group, mask: _best(_scores(group), mask, keep)
        none = jnp.zeros(now.shape, bool)
        fixed = _sweep(block, none, max(1, _TILE // of) * of, choose, of)
    put = lambda a, part: lax.dynamic_update_slice_in_dim(a, part, start, 0)
    live = lambda a: jnp.where(block.dead[:, None], jnp.zeros_like(a), a)
    lost = live(fixed.error)
    error = swept.error + jnp.sum(lost * lost, axis=0)
    change = put(swept.change, live(own - fixed.new))
    return _Swept(change, put(swept.kept, fixed.kept), error)


def _scores(columns: _Columns) -> Array:
    """`(w_ij / U_jj)^2`; less for dead inputs, and least for what is gone."""
    ratio = columns.now / jnp.diagonal(columns.lower)[:, None]
    unused = _solved.below_zero(columns.now)
    score = jnp.where(columns.dead[:, None], unused, ratio * ratio)
    if columns.before is None:
        return score
    return jnp.where(columns.before, score, jnp.full((), -jnp.inf, score.dtype))


def _best(scores: Array, mask: Array, keep: Array) -> Array:
    """Of each group, a column of `scores`, the mask as `patterns.NM` has it."""

    def ranked(keys: Array) -> Array:
        rows = []
        for i, key in enumerate(keys):
            ahead = [
                (other >= key if j < i else other > key).astype(jnp.int32)
                for j, other in enumerate(keys)
                if j != i
            ]
            rows.append(sum(ahead, start=jnp.zeros(key.shape, jnp.int32)) < keep)
        return jnp.stack(rows)

    return _once(lambda keys, _: (keys, ranked(keys)), ordered_keys(scores), mask)[1]


def _once(f: Callable[..., tuple[Any, ...]], *arrays: Any) -> tuple[Any, ...]:
    """`f(*arrays)`, of the same shapes and types, on CPU as a loop of one turn.

    What goes in and what comes out is stored then. Else XLA makes what goes in anew for
    each row of what comes out, and computes one number at a time.
    """

    def stored(*arrays: Any) -> tuple[Any, ...]:
        return in_parts(1, 1, lambda at, _, arrays: f(*after(at, arrays)), arrays)

    return on_cpu(stored, f, *arrays)


def _sweep(block: _Columns, kept: Array, part: int, choose: Any, group: int) -> _Fixed:
    """Fixes the columns of a block, `part` of them at a time.

    What earlier parts pass on is one product, what is passed on within a part is
    written out. `choose(columns, kept)` gives the mask of the `group` columns that come
    next, from their weights at that time.
    """
    size = block.now.shape[0]
    more = -size % part
    now, lower, dead, before = block
    if before is not None:
        before = _longer(before, more)
    now, kept = _longer(now, more), _longer(kept, more)
    block = _Columns(now, _larger(lower, more), _longer(dead, more), before)

    def turn(at: Any, count: int, carry: tuple[_Fixed, _Fixed]) -> Any:
        at = jnp.asarray(at, jnp.int32)
        cut = lambda a: lax.dynamic_slice_in_dim(a, at, count, 0)
        fixed = put(*carry, at - count)
        rows = cut(block.lower)
        now = cut(block.now) - matmul(rows, fixed.error)
        before = None if block.before is None else cut(block.before)
        corner = lax.dynamic_slice_in_dim(rows, at, count, 1)
        own = _Columns(now, corner, cut(block.dead), before)
        return fixed, _few(own, cut(kept), choose, group)

    def put(fixed: _Fixed, new: _Fixed, at: Any) -> _Fixed:
        write = lambda a, part: lax.dynamic_update_slice_in_dim(a, part, at, 0)
        return jax.tree.map(write, fixed, new)

    # A turn writes what the one before has made: XLA computes one number at a time
    # where it does both at once. The first writes what the second writes over.
    start = _Fixed(jnp.zeros_like(now), jnp.zeros_like(now), jnp.zeros_like(kept))
    first = jax.tree.map(lambda a: a[:part], start)
    fixed, new = in_parts(size + more, part, turn, (start, first))
    fixed = put(fixed, new, size + more - part)
    return jax.tree.map(lambda a: a[:size], fixed)


def _few(columns: _Columns, kept: Array, choose: Any, group: int) -> _Fixed:
    """Fixes a few columns, a tile after another."""
    now, lower, dead, before = columns
    rest, tiles = now, []
    for i in range(0, now.shape[0], group):
        own = slice(i, i + group)
        left = None if before is None else before[own]
        mask = choose(
            _Columns(rest[:group], lower[own, own], dead[own], left), kept[own]
        )
        mask = mask if left is None else mask & left
        for j in range(0, group, _TILE):
            width, at = min(_TILE, group - j), i + j
            corner = lower[at : at + width, at : at + width]
            tile = _tile(rest[:width], corner, mask[j : j + width])
            tiles.append(tile)
            rest = rest[width:]
            for k, row in enumerate(tile.error):
                rest = rest - lower[at + width :, at + k][:, None] * row[None, :]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *tiles)


def _tile(now: Array, lower: Array, kept: Array) -> _Fixed:
    """Fixes columns in one pass for their errors and one for their new weights."""
    zero = jnp.zeros((), now.dtype)

    def fix(_: Array, now: Array, kept: Array) -> _Fixed:
        errors: list[Array] = []
        last: list[Array] = []
        for i, row in enumerate(now):
            for k, error in enumerate(errors):
                row = row - lower[i, k] * error
            last.append(row)
            errors.append(jnp.where(kept[i], zero, row / lower[i, i]))
        return _Fixed(jnp.stack(errors), jnp.where(kept, jnp.stack(last), zero), kept)

    return _Fixed(*_once(lambda *a: tuple(fix(*a)), now, now, kept))
