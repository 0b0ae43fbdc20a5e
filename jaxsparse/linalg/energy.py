"""The energy of a matrix under a Gram matrix, by half of that symmetric matrix."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.linalg.chunks import in_parts
from jaxsparse.linalg.factor import matmul

_PART = 256  # columns of the gram matrix at once


def energy(x: Array, gram: Array) -> Array:
    """`tr(x^T G x)` for `[d_in, d_out]`, by half of the symmetric matrix."""
    step = min(_PART, x.shape[0])

    def add(start: Any, size: int, total: Array) -> Array:
        start = jnp.asarray(start, jnp.int32)
        own = lax.dynamic_slice_in_dim(x, start, size, 0)
        block = lax.dynamic_slice(gram, (start, start), (size, size))
        before = product_before(gram, x, start, size, step)
        return total + jnp.sum((2 * before + matmul(block, own)) * own, axis=0)

    total = in_parts(x.shape[0], step, add, jnp.zeros(x.shape[1], x.dtype))
    return jnp.maximum(jnp.sum(total), jnp.zeros((), x.dtype))


def product_before(
    matrix: Array, x: Array, start: Array, size: int, step: int
) -> Array:
    """`matrix[:start, start:start+size]^T @ x[:start]`, in a loop over what is there.

    A product of the full width would do twice the work. Columns of the matrix as it is,
    and not rows of its transpose: that would be copied in each turn of a caller's loop.
    """

    def add(wide: int, first: Any) -> Callable[[Any, Array], Array]:
        def turn(i: Any, total: Array) -> Array:
            at = first + i * wide
            part = lax.dynamic_slice(matrix, (at, start), (wide, size))
            return total + matmul(part.T, lax.dynamic_slice_in_dim(x, at, wide, 0))

        return turn

    total = jnp.zeros((size, x.shape[1]), x.dtype)
    zero, wide = jnp.zeros_like(start), 4 * step
    full = start // wide
    if wide <= x.shape[0]:
        total = lax.fori_loop(zero, full, add(wide, zero), total)
    rest = (start - full * wide) // step
    return lax.fori_loop(zero, rest, add(step, full * wide), total)
