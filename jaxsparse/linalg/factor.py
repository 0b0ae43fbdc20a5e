"""Small dense factorizations, many at once, of matrix products alone.

XLA's batched triangular solves take 10 to 100 times as long on CPU as the products of
the same size; its batched Cholesky factorization is good. So triangles are inverted by
products, level by level.
"""

import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array

HIGHEST = lax.Precision.HIGHEST
_SUBSTITUTED = 16  # rows below which products are too small to pay


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` in the full precision of its type, on every device."""
    return jnp.matmul(a, b, precision=HIGHEST)


def inverse_lower(lower: Array) -> Array:
    """The inverse of lower-triangular matrices.

    From `[[A, 0], [C, D]]^-1 = [[A^-1, 0], [-D^-1 C A^-1, D^-1]]`: the inverses of all
    diagonal blocks of one size give those of twice the size, all at once. The smallest
    are substituted.
    """
    n, lead = lower.shape[-1], lower.shape[:-2]
    blocks = 1
    while n > _SUBSTITUTED * blocks:
        blocks *= 2
    size = -(-n // blocks)
    full = size * blocks
    if full != n:
        pad = [(0, 0)] * len(lead) + [(0, full - n)] * 2
        ones = jnp.pad(jnp.zeros(n, lower.dtype), (0, full - n), constant_values=1)
        lower = jnp.pad(lower, pad) + jnp.broadcast_to(
            jnp.diag(ones), (*lead, full, full)
        )
    tiles = lower.reshape(*lead, blocks, size, blocks, size)
    tiles = jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)
    inverse = _substitute(tiles)
    while size < full:
        pairs = full // (2 * size)
        below = _below_diagonal(lower, pairs, size)
        halves = inverse.reshape(*lead, pairs, 2, size, size)
        a, d = halves[..., 0, :, :], halves[..., 1, :, :]
        corner = -matmul(d, matmul(below, a))
        top = jnp.concatenate([a, jnp.zeros_like(a)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, d], -1)], -2)
        size *= 2
    return inverse.reshape(*lead, full, full)[..., :n, :n]


def _substitute(lower: Array) -> Array:
    """The inverse of a few rows, by forward substitution written out."""
    n = lower.shape[-1]
    eye = jnp.eye(n, dtype=lower.dtype)
    rows: list[Array] = []
    for i in range(n):
        row = jnp.broadcast_to(eye[i], lower.shape[:-1])
        for j in range(i):
            row = row - lower[..., i, j, None] * rows[j]
        rows.append(row / lower[..., i, i, None])
    return jnp.stack(rows, -2)


def _below_diagonal(lower: Array, pairs: int, size: int) -> Array:
    """The blocks `C` of `pairs` diagonal blocks `[[A, 0], [C, D]]`."""
    lead = lower.shape[:-2]
    tiles = lower.reshape(*lead, pairs, 2, size, pairs, 2, size)
    corners = tiles[..., :, 1, :, :, 0, :]  # [..., pairs, size, pairs, size]
    return jnp.moveaxis(jnp.diagonal(corners, axis1=-4, axis2=-2), -1, -3)


def inverse_root(matrix: Array) -> Array:
    """The lower-triangular `R` with `R^T R = A^-1`, from Cholesky's `A = L L^T`."""
    return inverse_lower(jnp.linalg.cholesky(matrix, symmetrize_input=False))


def solve(matrix: Array, x: Array) -> Array:
    """`A^-1 x` for symmetric positive definite `A`."""
    return by_root(inverse_root(matrix), x)


def by_root(root: Array, x: Array) -> Array:
    """`R^T (R x)`: what `A^-1 x` is where `R^T R = A^-1`."""
    y = jnp.einsum("...ab,...b->...a", root, x, precision=HIGHEST)
    return jnp.einsum("...ab,...a->...b", root, y, precision=HIGHEST)
