"""SparseGPT: one column after another, each error passed on to those that follow."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, patterns
from jaxsparse._dtypes import count_dtype
from jaxsparse._typing import Array
from jaxsparse.linalg.chunks import in_parts
from jaxsparse.linalg.energy import product_before
from jaxsparse.linalg.factor import matmul
from jaxsparse.linalg.gram import GramFactor
from jaxsparse.ranking.threshold import ordered_keys, top_k_masks
from jaxsparse.solvers import _arguments, _solved
from jaxsparse.solvers._arguments import LayerPattern
from jaxsparse.solvers._solved import Solved
from jaxsparse.solvers._sweep import (
    TILE,
    Columns,
    best,
    larger,
    longer,
    scores_of,
    sweep,
)


def sparsegpt(
    w: Array,
    gram: Array | GramFactor,
    sparsity: float | Array | None = None,
    *,
    pattern: LayerPattern = patterns.Unstructured(),
    mask: Array | None = None,
    block_size: int = 128,
    rel_damping: float | Array = 0.01,
    damping: float | Array | None = None,
) -> Solved:
    """Prune a layer column by column; later columns compensate for earlier ones.

    With `(G + damping I)^-1 = U^T U`, `U` upper triangular: at the start of a block of
    columns the weights with the smallest `w_ij^2 / U_jj^2` are chosen (for N:M at the
    start of each group). Then column after column, `e = (w_j - q_j) / U_jj`, where
    `q_j` has zeros for the chosen weights, and `w_k -= e U_jk` for all `k > j`. Frantar
    & Alistarh (2023, SparseGPT, arXiv:2301.00774).

    The count rule holds for the whole layer (`scope="output"`: for each row). Each
    block loses a share in proportion to its weights; the running total over blocks is
    rounded. Among equal scores of a block the weight of the lower column is kept, then
    that of the lower row: the order of a flax kernel `[d_in, d_out]`.

    Weights of dead inputs are the first to go, the smallest of the whole layer (or
    group) first, and count toward the sparsity; those that are kept (when there are
    more of them than are to be removed, or in N:M groups) do not change. Weights that
    `mask` has removed stay removed and count toward the sparsity; an N:M group that has
    lost more than the pattern removes keeps fewer.

    Rows depend on each other only with the scope of a layer. Shard `w` over its
    outputs, with the Gram matrix on every device; then devices exchange one integer a
    pass.

    Differs from the reference implementation, which removes one weight too many in each
    block, sets all weights of dead inputs to zero, needs a block size that `of` divides
    (here groups are chosen one by one, so the block size says nothing), and multiplies
    by `U` row by row: here blocks take `(W - Q) R` with `R = U^-1`, the same numbers
    from half the factorization.

    Args:
      w: `[d_out, d_in]`, for outputs `x @ w.T`. Batches by `jax.vmap`.
      gram: `X^T X / n`, `[d_in, d_in]`, or what `js.curvature.factor_gram` made of it:
        kernels that read the same input share it.
      sparsity: the fraction to remove, in [0, 1), possibly traced; for `NM` it may be
        left out.
      pattern: `Unstructured("layer" or "output")`, `NM` or `Balanced`.
      mask: the mask of earlier pruning; True = kept.
      block_size: the number of columns whose weights compete, 128 in the paper.
      rel_damping: the damping relative to the mean diagonal of the Gram matrix. Not
        used for a factor.
      damping: an absolute damping instead.

    Returns:
      The weights, mask and info.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf, a sparsity or a group size out of
        range, a mask that has already removed more than requested, a gram matrix that
        is not positive definite (in eager use; under jit see `info.failed`).
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
    asked = _arguments.check_choice(w, sparsity, pattern, mask, solver="sparsegpt")
    _checks.check_positive_int(block_size, name="block_size")
    factor = _solved.factor_of(w, gram, damping, rel_damping)
    removed = _arguments.removed_of_group(w, asked, pattern)
    if isinstance(pattern, patterns.NM):
        # Groups are chosen alone, so that this is a matter of speed.
        block_size = max(1, min(block_size, 64) // pattern.of) * pattern.of
    if isinstance(pattern, patterns.Balanced):  # a tile lies in one block
        block_size = max(1, block_size // pattern.shape[0]) * pattern.shape[0]
    options: Any = {"pattern": pattern, "block_size": min(block_size, w.shape[1])}
    return _solved.done(_solve(w, factor, removed, mask, **options))


class _Problem(NamedTuple):
    """A layer as the sweep sees it, transposed so that a column is a stretch of memory.

    `n` is `d_in` up to a whole number of blocks: one program serves all of them. What
    is added is 0, acts on nothing and is the first to go. `before` may be None;
    `removed` is a count for each block, or the one for each group of N:M.
    """

    x: Array  # [n, d_out]
    root: Array  # upper triangular, [n, n]
    dead: Array  # [n]
    before: Array | None  # the mask of what was pruned before, [n, d_out]
    removed: Array


class _Units:
    """The tiles of a transposed layer `[n, d_out]`: `[n / a, d_out / v]`."""

    def __init__(self, pattern: patterns.Balanced):
        (self.a, self.v), self.reduce = pattern.shape, pattern.reduce

    def _split(self, x: Array) -> Array:
        n, d_out = x.shape
        return x.reshape(n // self.a, self.a, d_out // self.v, self.v)

    def mean(self, x: Array) -> Array:
        """Of each tile."""
        return jnp.mean(self._split(x), axis=(1, 3))

    def any(self, flags: Array) -> Array:
        """Whether a flag of a tile is set."""
        return jnp.any(self._split(flags), axis=(1, 3))

    def all_inputs(self, flags: Array) -> Array:
        """Whether the flags of all inputs of a tile are set, `[n / a]`."""
        return flags.reshape(-1, self.a).all(1)

    def weights(self, tiles: Array) -> Array:
        """One value a tile, for each of its weights."""
        return jnp.repeat(jnp.repeat(tiles, self.a, axis=0), self.v, axis=1)

    def scores(self, columns: Columns) -> Array:
        """`(w_ij / U_jj)^2` over a tile, of what is there and has inputs."""
        ratio = columns.now / jnp.diagonal(columns.lower)[:, None]
        dead, before = columns.dead[:, None], columns.before
        left = ~dead if before is None else before & ~dead
        own = self._split(jnp.where(left, ratio * ratio, jnp.zeros_like(ratio)))
        score = jnp.max(own, (1, 3)) if self.reduce == "max" else jnp.mean(own, (1, 3))
        unused = _solved.below_zero(self.mean(jnp.abs(columns.now)))
        score = jnp.where(self.all_inputs(columns.dead)[:, None], unused, score)
        if before is None:
            return score
        none = jnp.full((), -jnp.inf, score.dtype)
        return jnp.where(self.any(before), score, none)


class _Swept(NamedTuple):
    """What the columns so far have become."""

    change: Array  # w - q, [n, d_out], 0 for dead inputs
    kept: Array  # [n, d_out]
    error: Array  # of the damped gram matrix, [d_out]


@_solved.jitted("pattern", "block_size")
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
    elif isinstance(pattern, patterns.Balanced):
        units = _Units(pattern)
        removed = _counts(
            removed,
            None if before is None else units.any(before),
            units.all_inputs(dead),
            units.mean(jnp.abs(x)),
            block_size // pattern.shape[0],
            by_row=True,
        )
    more = -d_in % block_size
    problem = _Problem(
        longer(x, more),
        larger(factor.root, more),
        longer(dead, more),
        None if before is None else longer(before, more),
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
    cut = lambda a, start, n: lax.dynamic_slice_in_dim(a, start, n, 0)

    def kept(start: Any, n: int) -> Array:
        if before is None:
            return jnp.ones((n, x.shape[1]), bool)
        return cut(before, start, n)

    unused = lambda *at: kept(*at) & cut(dead, *at)[:, None]
    count = lambda flags: _per_block(flags, x.shape, size, by_row)
    gone = count(lambda *at: ~kept(*at))
    of_dead = count(unused)
    of_live = count(lambda *at: kept(*at) & ~unused(*at))
    every = lambda counts: jnp.sum(counts, axis=0, dtype=counts.dtype)
    left = jnp.maximum(removed - every(gone), 0)
    first = jnp.minimum(left, every(of_dead))

    def keys(*at: Any) -> Array:
        found = ordered_keys(jnp.abs(cut(x, *at)))
        return jnp.where(unused(*at), found, jnp.zeros_like(found))

    def smallest(_: None) -> Array:
        stays = every(of_dead) - first
        return of_dead - _largest(keys, x.shape, stays, size, by_row)

    some = jnp.any(first < every(of_dead))
    dead_gone = lax.cond(some, smallest, lambda _: of_dead, None)
    return gone + dead_gone + _share(left - first, of_live)


def _largest(
    keys: Callable[[Any, int], Array],
    shape: tuple[int, ...],
    stays: Array,
    size: int,
    by_row: bool,
) -> Array:
    """How many of the `stays` largest keys, which are not 0, each block has.

    The threshold is found bit by bit. Of what equals it the first blocks have most.
    """

    def count(choose: Any, cut: Array) -> Array:
        return _per_block(lambda *at: choose(keys(*at), cut[None]), shape, size, by_row)

    every = lambda *args: jnp.sum(count(*args), axis=0, dtype=stays.dtype)
    dtype = jax.eval_shape(lambda: keys(0, 1)).dtype
    bits = 8 * dtype.itemsize

    def turn(i: Any, cut: Array) -> Array:
        bit = jnp.ones((), dtype) << (bits - 1 - i).astype(dtype)
        return jnp.where(every(operator.ge, cut | bit) >= stays, cut | bit, cut)

    start = jnp.zeros(stays.shape, dtype)
    cut = lax.fori_loop(jnp.int32(0), jnp.int32(bits), turn, start)
    above, tied = count(operator.gt, cut), count(operator.eq, cut)
    left = stays - jnp.sum(above, axis=0, dtype=stays.dtype)
    earlier = jnp.cumsum(tied, axis=0, dtype=tied.dtype) - tied
    return above + jnp.clip(left[None] - earlier, jnp.zeros_like(tied), tied)


def _per_block(
    flags: Callable[[Any, int], Array], shape: tuple[int, ...], size: int, by_row: bool
) -> Array:
    """How many flags of each block are set; `flags(start, n)` are those of n columns.

    Block by block: a sum of all at once has the flags as integers in memory.
    """
    d_in, d_out = shape
    dtype = count_dtype(d_in * d_out)
    counts = jnp.zeros((-(-d_in // size), d_out if by_row else 1), dtype)

    def add(start: Any, n: int, counts: Array) -> Array:
        own = flags(start, n).astype(dtype)
        axes = 0 if by_row else (0, 1)
        own = jnp.sum(own, axis=axes, dtype=dtype).reshape(1, -1)
        at = jnp.asarray(start, jnp.int32) // size
        return lax.dynamic_update_slice_in_dim(counts, own, at, 0)

    return in_parts(d_in, size, add, counts)


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
    corner = lax.dynamic_slice(problem.root, (start, start), (size, size))
    eye = jnp.eye(size, dtype=corner.dtype)
    lower = lax.linalg.triangular_solve(corner.T, eye, left_side=True, lower=True)
    passed = product_before(problem.root, swept.change, start, size, size)
    own = cut(problem.x)
    now = own + matmul(lower, passed)
    before = None if problem.before is None else cut(problem.before)
    block = Columns(now, lower, cut(problem.dead), before)
    if not isinstance(pattern, patterns.NM):
        units = _Units(pattern) if isinstance(pattern, patterns.Balanced) else None
        side = 1 if units is None else units.a
        # [1, 1], or for each output or group of outputs.
        gone = lax.dynamic_index_in_dim(problem.removed, number, 0)
        there = (jnp.minimum(d_in - start, size) // side).astype(gone.dtype)
        scores = scores_of(block) if units is None else units.scores(block)
        if d_in < problem.x.shape[0]:  # what was added is the first to go
            added = jnp.arange(size // side, dtype=there.dtype)[:, None] >= there
            scores = jnp.where(added, jnp.full((), -jnp.inf, scores.dtype), scores)
        if pattern.scope == "output":
            (kept,) = top_k_masks([scores], there - gone, axes=(0,))
        else:
            (kept,) = top_k_masks([scores], there * now.shape[1] - gone[0, 0])
        kept = kept if units is None else units.weights(kept)
        fixed = sweep(block, kept, TILE, lambda _, kept: kept, TILE)
    else:
        assert isinstance(pattern, patterns.NM)
        of = pattern.of
        keep = of - jnp.minimum(problem.removed, of - pattern.keep)
        choose = lambda group, mask: best(scores_of(group), mask, keep)
        none = jnp.zeros(now.shape, bool)
        fixed = sweep(block, none, max(1, TILE // of) * of, choose, of)
    put = lambda a, part: lax.dynamic_update_slice_in_dim(a, part, start, 0)
    live = lambda a: jnp.where(block.dead[:, None], jnp.zeros_like(a), a)
    lost = live(fixed.error)
    error = swept.error + jnp.sum(lost * lost, axis=0)
    change = put(swept.change, live(own - fixed.new))
    return _Swept(change, put(swept.kept, fixed.kept), error)
