"""Each kernel's outer products of gradients, in blocks, summed up."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import widest
from jaxsparse._loops import when
from jaxsparse._typing import Array
from jaxsparse.curvature.layout import BlockLayout, to_blocks
from jaxsparse.linalg import triangle as _triangle
from jaxsparse.linalg.chunks import (
    SLAB_BYTES,
    cut,
    in_parts,
    is_spread,
    over_blocks,
    scratch_bytes,
)
from jaxsparse.linalg.factor import HIGHEST
from jaxsparse.linalg.triangle import Triangle


@functools.partial(jax.jit, static_argnames=("layout", "accurate"))
def sum_up(
    sums: Triangle | None, g: Array, *, layout: BlockLayout, accurate: bool
) -> Triangle:
    """Adds `g_i g_i^T` of all gradients, to zero for None."""
    if sums is None:
        sums = _triangle.zeros(layout.lead, layout.block_size, widest([g]))
    return _sum_up(sums, g, layout, accurate)


@jax.jit
def add_sums(sums: Triangle, other: Triangle) -> Triangle:
    """The sums of two parts of the gradients, in float64."""
    *lead, b, _ = sums.square.shape

    def plus(*parts: Triangle) -> Triangle:
        one, two = (_triangle.join(part, jnp.float64) for part in parts)
        return _triangle.split(one + two, sums.square.dtype)

    add = functools.partial(_apart, plus)

    with jax.enable_x64(True):
        return over_blocks(add, tuple(lead), 4 * b * b, sums, other, in_place=True)


@functools.partial(jax.jit, static_argnames="layout")
def masked_sums(sums: Triangle, mask: Array, *, layout: BlockLayout) -> Triangle:
    """The sums as if some weights had never had a gradient."""
    kept = to_blocks(mask, layout)
    both = kept[..., :, None] & kept[..., None, :]
    zero = jnp.zeros((), sums.square.dtype)
    square = jnp.where(both, sums.square, zero)
    return Triangle(square, jnp.where(kept, sums.diagonal, zero))


def _sum_up(sums: Triangle, g: Array, layout: BlockLayout, accurate: bool) -> Triangle:
    """Adds `g_i g_i^T` of all gradients `[m, *shape]`.

    Some rows of the kernel at a time are brought into the order of blocks, and of these
    some blocks at a time into float64. So the gradients are never held twice.
    """
    m, b = g.shape[0], layout.block_size
    layers = math.prod(layout.ordered[: layout.layers])
    rows, row = layout.ordered[layout.layers], layout.per_layer
    row //= max(rows, 1)
    whole = b // math.gcd(row, b)  # so many rows fill blocks
    slab = max(1, SLAB_BYTES // (4 * m * layers * row) // whole) * whole
    if is_spread(g, sums.square):
        with jax.enable_x64(True):
            blocks = to_blocks(g, layout)
            return _plus(sums, jnp.moveaxis(blocks, 0, -2), accurate)
    axis = 1 + layout.order[layout.layers]
    g = g.reshape(m, *layout.split)
    lead = len(layout.lead)
    flat = lambda x: x.reshape(layers, layout.blocks, *x.shape[lead:])

    def add_rows(start: Any, size: int, sums: Triangle) -> Triangle:
        part = cut(g, start, size, axis)
        part = part.transpose(0, *(1 + a for a in layout.order))
        part = part.reshape(m, layers, size * row)
        count = -(-size * row // b)
        part = jnp.pad(part, [(0, 0), (0, 0), (0, count * b - size * row)])
        part = part.reshape(m, layers, count, b).transpose(1, 2, 0, 3)
        part = lax.optimization_barrier(part)  # once, not in each turn of the loop

        def add_blocks(i: Any, size: int, sums: Triangle) -> Triangle:
            first = start * row // b + i
            take = lambda x, at: lax.dynamic_slice_in_dim(x, at, size, 1)
            old = jax.tree.map(lambda x: take(x, first), sums)
            plus = lambda old, part: _plus(old, part, accurate)
            new = _apart(plus, old, take(part, i))
            write = lambda x, n: lax.dynamic_update_slice_in_dim(x, n, first, 1)
            return jax.tree.map(write, sums, new)

        few = max(1, scratch_bytes() // (8 * layers * b * (m + 4 * b)))
        return in_parts(count, few, add_blocks, sums)

    with jax.enable_x64(True):
        new = in_parts(rows, slab, add_rows, jax.tree.map(flat, sums))
    return jax.tree.map(lambda x, s: x.reshape(s.shape), new, sums)


def _apart(plus: Callable[..., Triangle], sums: Triangle, *others: Any) -> Triangle:
    """`plus(sums, *others)` in the turn of a loop of its own, of which XLA cannot know.

    It reads its matrix transposed as well: fused with the writing, that would make a
    copy of all sums necessary.
    """
    return when(lax.optimization_barrier(jnp.ones((), bool)), plus, sums, *others)


def _plus(sums: Triangle, blocks: Array, accurate: bool) -> Triangle:
    """`sums + blocks^T blocks`, blocks `[*lead, m, b]`."""
    stored = sums.square.dtype
    wide = jnp.float64 if accurate else stored
    blocks = blocks.astype(wide)
    outer = jnp.einsum("...mb,...mc->...bc", blocks, blocks, precision=HIGHEST)
    return _triangle.split(_triangle.join(sums, wide) + outer, stored)
