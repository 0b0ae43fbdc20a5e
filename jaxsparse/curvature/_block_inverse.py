"""What is done with the inverse of a block-diagonal Fisher matrix."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.curvature import dispatch
from jaxsparse.curvature._blocks import BlockFisher, inverse_diagonals
from jaxsparse.curvature._trees import check_factor, for_each
from jaxsparse.curvature.layout import BlockLayout, from_blocks, to_blocks
from jaxsparse.linalg import triangle as _triangle
from jaxsparse.linalg.chunks import over_blocks
from jaxsparse.linalg.factor import (
    HIGHEST,
    by_root,
    inverse_lower,
    inverse_root,
    matmul,
)
from jaxsparse.linalg.triangle import Triangle


def _answers(question: Any) -> Any:
    """Registers a function of one parameter, its root first: the answer of blocks."""

    def register(f: Any) -> Any:
        @question.register
        def _(fisher: BlockFisher, *columns: list[Array], **options: Any) -> list[Any]:
            return for_each(f, fisher.layouts, fisher.roots, *columns, **options)

        return f

    return register


@_answers(dispatch.ihvp)
@functools.partial(jax.jit, static_argnames="layout")
def block_ihvp(root: Triangle, x: Array, *, layout: BlockLayout) -> Array:
    """`F^-1 x = R^T (R x)`."""
    r = root.square

    def product(r: Array, x: Array) -> Array:
        # What stands above the diagonal, low parts scaled down, is far below rounding.
        return by_root(r, x)

    x = to_blocks(x.astype(r.dtype), layout)
    floats = max(
        1, layout.block_size**2 // 4
    )  # the second product finds r in the cache
    return from_blocks(over_blocks(product, layout.lead, floats, r, x), layout)


@functools.partial(jax.jit, static_argnames=("layout", "size"))
def block_groups(root: Triangle, *, layout: BlockLayout, size: int | None) -> Array:
    """`[F^-1]_QQ` for groups Q of neighboring weights; of whole blocks for None."""
    b, stored = layout.block_size, root.square.dtype

    def groups(root: Triangle) -> Array:
        return _groups(root, size or b).astype(stored)

    with jax.enable_x64(True):
        return over_blocks(groups, layout.lead, 4 * b * b, root)


def _groups(root: Triangle, size: int) -> Array:
    """In float64, `[..., b // size, size, size]`."""
    r = _triangle.join(root, jnp.float64)
    r = r.reshape(*r.shape[:-1], r.shape[-1] // size, size)
    return jnp.einsum("...aqi,...aqj->...qij", r, r, precision=HIGHEST)


@_answers(dispatch.group_scores)
@functools.partial(jax.jit, static_argnames="layout")
def block_group_solve(
    root: Triangle, w: Array, *, layout: BlockLayout
) -> tuple[Array, Array]:
    """Units of neighboring weights, each removed on its own."""
    b, size, stored = layout.block_size, layout.unit, root.square.dtype

    def solve(root: Triangle, w: Array) -> tuple[Array, Array]:
        half = inverse_root(_groups(root, size))
        w = w.astype(jnp.float64).reshape(*w.shape[:-1], b // size, size)
        y = jnp.einsum("...ij,...j->...i", half, w, precision=HIGHEST)
        rho = jnp.sum(jnp.square(y), axis=-1, keepdims=True) / 2
        y = jnp.einsum("...ij,...i->...j", half, y, precision=HIGHEST)
        flat = lambda x: x.reshape(*x.shape[:-2], b).astype(stored)
        return flat(jnp.broadcast_to(rho, w.shape)), flat(y)

    with jax.enable_x64(True):
        blocks = to_blocks(w, layout)
        rho, y = over_blocks(solve, layout.lead, 6 * b * b, root, blocks)
    return from_blocks(rho, layout), from_blocks(y, layout)


def _inverse(root: Triangle) -> Array:
    """`F^-1` in float64."""
    r = _triangle.join(root, jnp.float64)
    return jnp.einsum("...ka,...kb->...ab", r, r, precision=HIGHEST)


@_answers(dispatch.greedy_scores)
@functools.partial(jax.jit, static_argnames=("layout", "most"))
def block_greedy(
    root: Triangle,
    w: Array,
    mask: Array,
    *,
    layout: BlockLayout,
    most: int | None = None,
) -> Array:
    """The loss at which greedy OBS removes each weight, one by one in a block."""
    b, stored, unit = layout.block_size, root.square.dtype, layout.unit

    def greedy(root: Triangle, w: Array, alive: Array) -> Array:
        inverse = _inverse(root)
        w = jnp.where(alive, w.astype(jnp.float64), 0)
        index = jnp.broadcast_to(jnp.arange(b), w.shape)

        def in_units(x: Array) -> Array:
            grouped = x.reshape(*x.shape[:-1], b // unit, unit)
            return jnp.sum(grouped, axis=-1, dtype=jnp.int32)

        def turn(_: Any, carry: Any) -> Any:
            inverse, w, left, alive, scores, last = carry
            diagonal = jnp.diagonal(inverse, axis1=-2, axis2=-1)
            loss = jnp.square(w) / (2 * jnp.where(alive, diagonal, 1))
            loss = jnp.where(alive & jnp.repeat(left > 0, unit, axis=-1), loss, jnp.inf)
            best = jnp.min(loss, axis=-1, keepdims=True)
            # The first of the smallest. (argmin is lowered outside of the local scope
            # of 64 bits, and fails there.)
            q = (loss == best) & jnp.isfinite(best)
            q = index == jnp.min(jnp.where(q, index, b), axis=-1, keepdims=True)
            row = jnp.sum(jnp.where(q[..., None], inverse, 0), axis=-2)
            pivot = jnp.sum(jnp.where(q, diagonal, 0), axis=-1, keepdims=True)
            pivot = jnp.where(pivot > 0, pivot, 1)
            w_q = jnp.sum(jnp.where(q, w, 0), axis=-1, keepdims=True)
            w = jnp.where(q, 0, w - row * (w_q / pivot))
            inverse = inverse - row[..., :, None] * (row / pivot)[..., None, :]
            # Always a little more: of equal scores a later one could go before.
            more = jnp.nextafter(last, jnp.full((), jnp.inf, stored))
            more = jnp.maximum(more, best.astype(stored))
            last = jnp.where(jnp.isfinite(best), more, last)
            scores = jnp.where(q, last, scores)
            left = left - in_units(q)
            return inverse, w, left, alive & ~q, scores, last

        limit = unit if most is None else most
        gone = unit - in_units(alive)
        scores = jnp.full(w.shape, jnp.inf, stored)
        # Not 0, beside which there are only subnormals, that a processor may flush.
        last = jnp.full((*w.shape[:-1], 1), jnp.finfo(stored).tiny, stored)
        carry = (inverse, w, limit - gone, alive, scores, last)
        return lax.fori_loop(0, b, turn, carry)[4]

    with jax.enable_x64(True):
        blocks = to_blocks(w, layout), to_blocks(mask, layout)
        scores = over_blocks(greedy, layout.lead, 6 * b * b, root, *blocks)
    return from_blocks(scores, layout)


def _restrict(
    root: Triangle,
    mask: Array,
    damping: Array,
    *,
    layout: BlockLayout,
    accurate: bool,
) -> Triangle:
    """The roots with the rows and columns of pruned weights taken out of `F`."""
    b, stored = layout.block_size, root.square.dtype
    wide = jnp.float64 if accurate else stored

    def restrict(root: Triangle, kept: Array, damping: Array) -> Triangle:
        factor = inverse_lower(_triangle.join(root, wide))  # F = L L^T
        fisher = matmul(factor, jnp.swapaxes(factor, -1, -2))
        both = kept[..., :, None] & kept[..., None, :]
        eye = jnp.broadcast_to(jnp.eye(b, dtype=wide), fisher.shape)
        fisher = jnp.where(both, fisher, damping.astype(wide) * eye)
        return _triangle.split(inverse_root(fisher), stored)

    with jax.enable_x64(True):
        kept = to_blocks(mask, layout)
        parts = root, kept
        options: Any = {"whole": (damping,), "in_place": True}
        return over_blocks(restrict, layout.lead, 10 * b * b, *parts, **options)


_options: Any = {"static_argnames": ("layout", "accurate")}
block_restrict = jax.jit(_restrict, **_options)
block_restrict_in_place = jax.jit(_restrict, donate_argnums=0, **_options)


@_answers(dispatch.eliminate)
@functools.partial(jax.jit, static_argnames="layout")
def block_eliminate(
    root: Triangle, w: Array, removed: Array, kept: Array, *, layout: BlockLayout
) -> Array:
    """The exact update that removes weights: `w - F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q`."""
    b, stored = layout.block_size, root.square.dtype

    def eliminate(w: Array, root: Triangle, removed: Array) -> Array:
        inverse = _inverse(root)
        both = removed[..., :, None] & removed[..., None, :]
        eye = jnp.broadcast_to(jnp.eye(b, dtype=jnp.float64), inverse.shape)
        half = inverse_root(jnp.where(both, inverse, eye))
        w = jnp.where(removed, w.astype(jnp.float64), 0)
        y = jnp.where(removed, by_root(half, w), 0)
        change = -jnp.einsum("...ab,...b->...a", inverse, y, precision=HIGHEST)
        return jnp.where(removed, -w, change).astype(stored)

    with jax.enable_x64(True):
        parts = to_blocks(w.astype(stored), layout), root, to_blocks(removed, layout)
        change = over_blocks(eliminate, layout.lead, 10 * b * b, *parts, in_place=True)
    return jnp.where(kept | removed, from_blocks(change, layout), 0)


@jax.jit
def _least_pivot(root: Triangle) -> Array:
    """Of the inverse, as a square root."""
    return jnp.min(_triangle.diagonal(root))


# What needs more than one parameter's root.


@dispatch.inverse_diagonal.register
def _(fisher: BlockFisher) -> list[Array]:
    return for_each(_from_blocks, fisher.layouts, fisher.diagonals)


@dispatch.restrict.register
def _(fisher: BlockFisher, masks: list[Array], *, donate: bool) -> BlockFisher:
    least = tuple(map(_least_pivot, fisher.roots))
    one = block_restrict_in_place if donate else block_restrict
    options = {"damping": fisher.damping, "accurate": fisher.accurate}
    roots = tuple(for_each(one, fisher.layouts, fisher.roots, masks, **options))
    diagonals = tuple(map(inverse_diagonals, roots))
    for path, pivot, d in zip(fisher.paths, least, diagonals, strict=True):
        largest = lambda p=pivot: 1 / jnp.square(p)
        check_factor(path, d, fisher.damping, largest, accurate=fisher.accurate)
    return dataclasses.replace(fisher, roots=roots, diagonals=diagonals)


@dispatch.inverse_blocks.register
def _(fisher: BlockFisher, *, size: int | None) -> list[Array]:
    for layout in fisher.layouts:
        if size is not None and layout.block_size % size:
            raise ValueError(
                f"{layout.path}: groups of {size} weights do not fill blocks of "
                f"{layout.block_size}. Choose a block_size that {size} divides."
            )
    groups = for_each(block_groups, fisher.layouts, fisher.roots, size=size)
    return groups if size else [blocks[..., 0, :, :] for blocks in groups]


# Without jit each of its steps would make a copy.
_from_blocks = jax.jit(from_blocks, static_argnames="layout")
