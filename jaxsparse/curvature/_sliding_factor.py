"""The Cholesky factor of a sliding Gram matrix: `U^T U = S = shift I + G G^T`, m x m.

Rows and columns go by the age of the gradients, the oldest first. A step takes the
oldest out and puts the newest in:

- the oldest is the first row, so what it leaves is `U_22^T U_22 + u u^T`: one rank-one
  UPDATE by rotations. Nothing is subtracted, so it cannot break down;
- the newest is the last column, which comes from a triangular solve in the same sweep.

On accelerators, where m short steps in a row are slow, the factor is made anew in each
step by Cholesky's method, `m^3 / 3` FLOP.
"""

import math

import jax.numpy as jnp
from jax import lax

from jaxsparse._loops import when
from jaxsparse._typing import Array

_RENEW_EVERY = 64
_UNITS = 32


def diagonal(gram: Array, shift: Array) -> Array:
    """What is added to the diagonal: the shift, but no less than rounding resolves.

    A gradient that others explain up to rounding would otherwise get a row of noise,
    and the rows after it noise of noise.

    Args:
      gram: `G G^T`, `[m, m]`.
      shift: a scalar.

    Returns:
      `max(shift, 32 eps |g|^2)`, `[m]`, by row of `gram`.
    """
    least = _UNITS * jnp.finfo(gram.dtype).eps
    return jnp.maximum(shift, least * jnp.diagonal(gram))


def next_factor(
    factor: Array, gram: Array, oldest: Array, shift: Array, moved: Array
) -> Array:
    """The factor after one row of `G` was replaced.

    `O(m^2)` on CPU: a sweep of rotations, and a new factor every 64 rows. Rotations
    round, and each entry goes through one in every step until its row leaves, so the
    error grows with the square root of the steps. TODO measured

    Args:
      factor: U of the rows before.
      gram: `G G^T`, `[m, m]`, with the new row.
      oldest: the row of `gram` that is now the oldest.
      shift: what is added to the diagonal.
      moved: whether `shift` is another than that in `factor`.

    Returns:
      U of the rows as they are now, `[m, m]`.
    """
    factor = lax.platform_dependent(
        *(factor, gram, oldest, shift),
        cpu=_slide,
        default=lambda factor, *system: factorise(*system),
    )
    due = moved | (oldest % _RENEW_EVERY == 0)
    return when(due, _renew, factor, gram, oldest, shift, moved)


def factorise(gram: Array, oldest: Array, shift: Array) -> Array:
    """The factor by Cholesky's method.

    Where rounding leaves S indefinite, `sqrt(eps)` times its largest entry is added to
    the diagonal.

    Args:
      gram: `G G^T`, `[m, m]`.
      oldest: the row of `gram` that is the oldest.
      shift: what is added to the diagonal.

    Returns:
      U, `[m, m]`.
    """
    plain, raised = _attempts(gram, oldest, shift)
    return jnp.where(jnp.all(jnp.isfinite(plain)), plain, raised)


def solve(factor: Array, x: Array) -> Array:
    """`S^-1 x`.

    Args:
      factor: U, `[m, m]`.
      x: `[m]`, by age.

    Returns:
      `[m]`, by age.
    """
    return _back(factor, _forward(factor, x))


def newest_column(factor: Array) -> Array:
    """The last column of `S^-1`, scaled so that its last entry is 1.

    Args:
      factor: U, `[m, m]`.

    Returns:
      `[m]`, by age: minus what the newest gradient is explained by, and 1.
    """
    m = len(factor)
    return _back(factor, jnp.zeros_like(factor[0]).at[m - 1].set(factor[m - 1, m - 1]))


def _slide(factor: Array, gram: Array, oldest: Array, shift: Array) -> Array:
    """One sweep down the rows of U.

    Row i + 1 takes in, by a rotation, what is left of the row that goes, and becomes
    row i; its entry in the new column follows from it.
    """
    m = len(factor)
    columns = jnp.arange(m)
    dots = jnp.roll(gram[oldest - 1], -oldest)
    # The square of the corner, what the others do not explain, is at least `added`.
    added = diagonal(gram, shift)[oldest - 1]

    def step(carry: tuple[Array, Array, Array], i: Array):
        left, dots, rest = carry
        row = jnp.roll(lax.dynamic_index_in_dim(factor, i + 1, keepdims=False), -1)
        size = jnp.hypot(row[i], left[i])
        cos, sin = row[i] / size, left[i] / size
        kept = (columns >= i) & (columns < m - 1)
        new = jnp.where(kept, cos * row + sin * left, jnp.zeros_like(row))
        left = jnp.where(columns > i, cos * left - sin * row, jnp.zeros_like(row))
        # A column is as long as the diagonal says, whatever rounding does to it.
        most = jnp.sqrt(jnp.maximum(rest - added, 0))
        entry = jnp.clip(dots[i] / new[i], -most, most)
        carry = (left, dots - entry * new, rest - entry * entry)
        return carry, new.at[m - 1].set(entry)

    start = (jnp.roll(factor[0], -1).at[m - 1].set(0), dots, dots[m - 1] + added)
    (_, _, rest), rows = lax.scan(step, start, jnp.arange(m - 1))
    last = jnp.sqrt(jnp.maximum(rest, added))
    return jnp.zeros_like(factor).at[: m - 1].set(rows).at[m - 1, m - 1].set(last)


def _renew(
    factor: Array, gram: Array, oldest: Array, shift: Array, moved: Array
) -> Array:
    """U anew; if rounding prevents that, the one at hand, unless the shift moved."""
    plain, raised = _attempts(gram, oldest, shift)
    otherwise = jnp.where(moved, raised, factor)
    return jnp.where(jnp.all(jnp.isfinite(plain)), plain, otherwise)


def _attempts(gram: Array, oldest: Array, shift: Array) -> tuple[Array, Array]:
    by_age = jnp.roll(jnp.roll(gram, -oldest, 0), -oldest, 1)
    plain = by_age + jnp.diag(diagonal(by_age, shift))
    more = math.sqrt(jnp.finfo(gram.dtype).eps) * jnp.max(jnp.diagonal(plain))
    upper = lambda s: lax.linalg.cholesky(s, symmetrize_input=False).T
    return upper(plain), upper(plain + more * jnp.eye(len(gram), dtype=gram.dtype))


def _forward(factor: Array, x: Array) -> Array:
    """`U^-T x`. On CPU by rows: LAPACK wants the columns of U, so copies it first."""

    def by_rows(factor: Array, x: Array) -> Array:
        def step(left: Array, i: Array):
            row = lax.dynamic_index_in_dim(factor, i, keepdims=False)
            entry = left[i] / row[i]
            return left - entry * row, entry

        return lax.scan(step, x, jnp.arange(len(x)))[1]

    at_once = lambda u, x: _triangular_solve(u, x, transpose_a=True)
    return lax.platform_dependent(factor, x, cpu=by_rows, default=at_once)


def _back(factor: Array, x: Array) -> Array:
    """`U^-1 x`."""

    def by_rows(factor: Array, x: Array) -> Array:
        def step(i: Array, found: Array) -> Array:
            i = len(x) - 1 - i
            row = lax.dynamic_index_in_dim(factor, i, keepdims=False)
            return found.at[i].set((x[i] - jnp.sum(row * found)) / row[i])

        return lax.fori_loop(0, len(x), step, jnp.zeros_like(x))

    return lax.platform_dependent(factor, x, cpu=by_rows, default=_triangular_solve)


def _triangular_solve(upper: Array, x: Array, transpose_a: bool = False) -> Array:
    return lax.linalg.triangular_solve(
        upper, x[:, None], left_side=True, lower=False, transpose_a=transpose_a
    )[:, 0]
