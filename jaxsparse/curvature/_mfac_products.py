"""The products of M-FAC with the gradients of one parameter, and the small factor."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.curvature._gradient_rows import contract
from jaxsparse.linalg import triangle as _triangle
from jaxsparse.linalg.chunks import cut, in_parts, is_spread, scratch_bytes
from jaxsparse.linalg.factor import HIGHEST, inverse_root
from jaxsparse.linalg.triangle import Triangle


@functools.partial(jax.jit, static_argnames="accurate")
def add_gram(
    gram: Triangle, g: Array, mask: Array | None, *, accurate: bool
) -> Triangle:
    """`gram + (G mask) (G mask)^T`, some columns at a time in float64."""
    stored = gram.square.dtype
    wide = jnp.float64 if accurate else stored

    def outer(g: Array, mask: Array | None) -> Array:
        g = g.astype(wide)
        if mask is not None:
            g = jnp.where(mask[None], g, jnp.zeros((), wide))
        axes = tuple(range(1, g.ndim))
        return contract(g, g, axes, axes)

    with jax.enable_x64(True):
        total = _triangle.join(gram, wide)
        if is_spread(g):
            return _triangle.split(total + outer(g, mask), stored)
        m = g.shape[0]
        flat = g.reshape(m, -1)
        mask = None if mask is None else mask.reshape(-1)

        def add(start: Any, size: int, total: Array) -> Array:
            part = cut(flat, start, size, 1)
            if mask is None:
                return total + outer(part, None)
            return total + outer(part, lax.dynamic_slice_in_dim(mask, start, size))

        total = in_parts(flat.shape[1], _columns_in_cache(m), add, total)
        return _triangle.split(total, stored)


@functools.partial(jax.jit, static_argnames="accurate")
def gram_root(gram: Triangle, damping: Array, *, accurate: bool) -> Triangle:
    """`R` with `R^T R = (m * damping * I + gram)^-1`."""
    stored = gram.square.dtype
    wide = jnp.float64 if accurate else stored
    with jax.enable_x64(True):
        lower = _triangle.join(gram, wide)
        m = lower.shape[-1]
        eye = jnp.eye(m, dtype=wide) * (m * damping.astype(wide))
        return _triangle.split(inverse_root(lower + eye), stored)


@jax.jit
def solve_by_root(root: Triangle, x: Array) -> Array:
    """`S^-1 x`, in float64: S is as ill-conditioned as F."""
    with jax.enable_x64(True):
        r = _triangle.join(root, jnp.float64)
        y = jnp.matmul(r, x.astype(jnp.float64), precision=HIGHEST)
        return jnp.matmul(r.T, y, precision=HIGHEST).astype(root.square.dtype)


# As a dot product XLA would make a wide copy of all gradients of 16 bits.


@functools.partial(jax.jit, static_argnames="wide")
def dots(g: Array, x: Array, *, wide: Any) -> Array:
    """`G x` for the gradients of one parameter."""
    m, x = g.shape[0], x.astype(wide)
    if g.dtype == wide:
        axes = tuple(range(x.ndim))
        return contract(g, x, tuple(a + 1 for a in axes), axes)
    if is_spread(g):
        return jnp.sum(g.astype(wide) * x[None], axis=tuple(range(1, g.ndim)))
    flat, x = g.reshape(m, -1), x.reshape(-1)

    def add(start: Any, size: int, total: Array) -> Array:
        part = cut(flat, start, size, 1).astype(wide)
        return total + dots(part, cut(x, start, size), wide=wide)

    return in_parts(flat.shape[1], _columns_in_cache(m), add, jnp.zeros(m, wide))


@functools.partial(jax.jit, static_argnames="wide")
def weighted_sum(g: Array, c: Array, *, wide: Any) -> Array:
    """`G^T c`. With G first XLA would transpose a copy."""
    m, c = g.shape[0], c.astype(wide)
    if g.dtype == wide:
        return contract(c, g, (0,), (0,), along=g)
    if is_spread(g):
        return jnp.sum(g.astype(wide) * c.reshape(m, *[1] * (g.ndim - 1)), axis=0)
    flat = g.reshape(m, -1)

    def fill(start: Any, size: int, out: Array) -> Array:
        new = weighted_sum(cut(flat, start, size, 1).astype(wide), c, wide=wide)
        return lax.dynamic_update_slice_in_dim(out, new, start, 0)

    empty = jnp.zeros(flat.shape[1], wide)
    out = in_parts(flat.shape[1], _columns_in_cache(m), fill, empty)
    return out.reshape(g.shape[1:])


@functools.partial(jax.jit, static_argnames="accurate")
def page_diagonal(g: Array, root: Triangle, damping: Array, *, accurate: bool) -> Array:
    """The diagonal of `F^-1` for one parameter, some columns at a time."""
    stored = root.square.dtype
    wide = jnp.float64 if accurate else stored

    def diagonal(g: Array, r: Array) -> Array:
        g, shift = g.astype(wide), damping.astype(wide)
        v = contract(r, g, (1,), (0,), along=g)
        rest = (1 - jnp.sum(jnp.square(v), axis=0)) / shift
        # No less than 1 / F_qq: where rounding would make it so, or negative.
        least = 1 / (shift + jnp.mean(jnp.square(g), axis=0))
        return jnp.maximum(rest, least).astype(stored)

    with jax.enable_x64(True):
        r = _triangle.join(root, wide)
        if is_spread(g):
            return diagonal(g, r)
        m, shape = g.shape[0], g.shape[1:]
        flat = g.reshape(m, -1)

        def fill(start: Any, size: int, out: Array) -> Array:
            new = diagonal(cut(flat, start, size, 1), r)
            return lax.dynamic_update_slice_in_dim(out, new, start, 0)

        columns = max(512, scratch_bytes() // (16 * m))
        empty = jnp.zeros(flat.shape[1], stored)
        return in_parts(flat.shape[1], columns, fill, empty).reshape(shape)


def _columns_in_cache(m: int) -> int:
    return max(512, scratch_bytes() // (8 * m))
