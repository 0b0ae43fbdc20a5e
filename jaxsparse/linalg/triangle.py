"""Triangular matrices in double precision, in the memory of a square in single.

The numbers of a lower triangle are sums `high + low` of two float32, 48 bits in all.
The high parts lie in the lower triangle of a square, the low parts, mirrored, in its
upper one, and those of the diagonal beside it. This is how statistics are summed up and
factors kept so exactly that a damping of 1e-7 is not lost beside eigenvalues of 1, for
`block_size + 1` floats a weight.

The upper triangle is scaled down by 2^-24, so that a product with the full square may
replace one with the triangle. Without the scaling, a low part of one row could weigh as
much as 1e-4 of another.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxsparse import _sharded
from jaxsparse._typing import Array

_DOWN = 2.0**-24  # of the low parts beside the diagonal; a power of 2 loses no bit


class Triangle(NamedTuple):
    """Lower-triangular matrices."""

    # `[..., b, b]`, the high parts below and on the diagonal, the low parts, scaled
    # down, above it. Where the type is float64, plainly the triangle
    square: Array
    diagonal: Array  # `[..., b]`, the low parts of the diagonal


def zeros(shape: tuple[int, ...], size: int, dtype, *, device=None) -> Triangle:
    """Triangles of zeros."""
    return Triangle(
        _sharded.zeros((*shape, size, size), dtype, device),
        _sharded.zeros((*shape, size), dtype, device),
    )


def split(lower: Array, dtype) -> Triangle:
    """Stores the lower triangle of a matrix."""
    lower = jnp.tril(lower)
    high = lower.astype(dtype)
    if lower.dtype == dtype:
        return Triangle(high, jnp.zeros(high.shape[:-1], dtype))
    low = (lower - high.astype(lower.dtype)).astype(dtype)
    diagonal = jnp.diagonal(low, axis1=-2, axis2=-1)
    above = jnp.triu(jnp.swapaxes(low, -1, -2), 1) * _DOWN
    return Triangle(high + above, diagonal)


def join(triangle: Triangle, dtype) -> Array:
    """The lower triangle, zeros above it."""
    high = jnp.tril(triangle.square).astype(dtype)
    if triangle.square.dtype == dtype:
        return high
    low = jnp.swapaxes(jnp.triu(triangle.square, 1), -1, -2).astype(dtype) / _DOWN
    on_diagonal = jnp.broadcast_to(jnp.eye(high.shape[-1], dtype=bool), high.shape)
    diagonal = jnp.broadcast_to(triangle.diagonal[..., None], high.shape)
    return high + jnp.where(on_diagonal, diagonal.astype(dtype), low)


def symmetric(lower: Array) -> Array:
    """The symmetric matrix with this lower triangle."""
    return lower + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)


def diagonal(triangle: Triangle) -> Array:
    """The diagonal, its high parts."""
    return jnp.diagonal(triangle.square, axis1=-2, axis2=-1)
