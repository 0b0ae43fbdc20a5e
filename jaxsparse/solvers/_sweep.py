"""A sweep over a block of columns: each is fixed, and its error passed on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._loops import after
from jaxsparse._platform import on_cpu
from jaxsparse._typing import Array
from jaxsparse.linalg.chunks import in_parts
from jaxsparse.linalg.factor import matmul
from jaxsparse.ranking.threshold import ordered_keys
from jaxsparse.solvers import _solved

TILE = 4  # columns in one pass over the memory; earlier ones act by a product


class Columns(NamedTuple):
    """Some columns of a layer and what is known of them."""

    now: Array  # their weights when the block begins, [k, d_out]
    lower: Array  # their block of U^T, [k, k]
    dead: Array  # [k]
    before: Array | None  # [k, d_out]


class Fixed(NamedTuple):
    """Columns that are done."""

    error: Array  # (w - q) / U_jj, [k, d_out]
    new: Array  # q
    kept: Array


def scores_of(columns: Columns) -> Array:
    """`(w_ij / U_jj)^2`; less for dead inputs, and least for what is gone."""
    ratio = columns.now / jnp.diagonal(columns.lower)[:, None]
    unused = _solved.below_zero(columns.now)
    score = jnp.where(columns.dead[:, None], unused, ratio * ratio)
    if columns.before is None:
        return score
    return jnp.where(columns.before, score, jnp.full((), -jnp.inf, score.dtype))


def best(scores: Array, mask: Array, keep: Array) -> Array:
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


def sweep(block: Columns, kept: Array, part: int, choose: Any, group: int) -> Fixed:
    """Fixes the columns of a block, `part` of them at a time.

    What earlier parts pass on is one product, what is passed on within a part is
    written out. `choose(columns, kept)` gives the mask of the `group` columns that come
    next, from their weights at that time.
    """
    size = block.now.shape[0]
    more = -size % part
    now, lower, dead, before = block
    if before is not None:
        before = longer(before, more)
    now, kept = longer(now, more), longer(kept, more)
    block = Columns(now, larger(lower, more), longer(dead, more), before)

    def turn(at: Any, count: int, carry: tuple[Fixed, Fixed]) -> Any:
        at = jnp.asarray(at, jnp.int32)
        cut = lambda a: lax.dynamic_slice_in_dim(a, at, count, 0)
        fixed = put(*carry, at - count)
        rows = cut(block.lower)
        now = cut(block.now) - matmul(rows, fixed.error)
        before = None if block.before is None else cut(block.before)
        corner = lax.dynamic_slice_in_dim(rows, at, count, 1)
        own = Columns(now, corner, cut(block.dead), before)
        return fixed, _few(own, cut(kept), choose, group)

    def put(fixed: Fixed, new: Fixed, at: Any) -> Fixed:
        write = lambda a, part: lax.dynamic_update_slice_in_dim(a, part, at, 0)
        return jax.tree.map(write, fixed, new)

    # A turn writes what the one before has made: XLA computes one number at a time
    # where it does both at once. The first writes what the second writes over.
    start = Fixed(jnp.zeros_like(now), jnp.zeros_like(now), jnp.zeros_like(kept))
    first = jax.tree.map(lambda a: a[:part], start)
    fixed, new = in_parts(size + more, part, turn, (start, first))
    fixed = put(fixed, new, size + more - part)
    return jax.tree.map(lambda a: a[:size], fixed)


def _few(columns: Columns, kept: Array, choose: Any, group: int) -> Fixed:
    """Fixes a few columns, a tile after another."""
    now, lower, dead, before = columns
    rest, tiles = now, []
    for i in range(0, now.shape[0], group):
        own = slice(i, i + group)
        left = None if before is None else before[own]
        mask = choose(
            Columns(rest[:group], lower[own, own], dead[own], left), kept[own]
        )
        mask = mask if left is None else mask & left
        for j in range(0, group, TILE):
            width, at = min(TILE, group - j), i + j
            corner = lower[at : at + width, at : at + width]
            tile = _tile(rest[:width], corner, mask[j : j + width])
            tiles.append(tile)
            rest = rest[width:]
            for k, row in enumerate(tile.error):
                rest = rest - lower[at + width :, at + k][:, None] * row[None, :]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *tiles)


def _tile(now: Array, lower: Array, kept: Array) -> Fixed:
    """Fixes columns in one pass for their errors and one for their new weights."""
    zero = jnp.zeros((), now.dtype)

    def fix(_: Array, now: Array, kept: Array) -> Fixed:
        errors: list[Array] = []
        last: list[Array] = []
        for i, row in enumerate(now):
            for k, error in enumerate(errors):
                row = row - lower[i, k] * error
            last.append(row)
            errors.append(jnp.where(kept[i], zero, row / lower[i, i]))
        return Fixed(jnp.stack(errors), jnp.where(kept, jnp.stack(last), zero), kept)

    return Fixed(*_once(lambda *a: tuple(fix(*a)), now, now, kept))


def longer(x: Array, more: int) -> Array:
    """With zeros behind it."""
    return jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]) if more else x


def larger(matrix: Array, more: int) -> Array:
    """With ones behind it on the diagonal."""
    if not more:
        return matrix
    n = matrix.shape[0]
    wide = jnp.pad(matrix, (0, more))
    ones = jnp.diag(jnp.arange(n + more) >= n)
    return jnp.where(ones, jnp.ones((), matrix.dtype), wide)
