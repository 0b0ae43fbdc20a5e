"""The Cholesky factor of a sliding Gram matrix, `U^T U = S = G G^T + shift I`, m x m.

Rows and columns go by the age of the gradients, the oldest first. A step takes the
oldest out and puts the newest in:

- the oldest is the first row, so what it leaves is `U_22^T U_22 + u u^T`: one rank-one
  UPDATE by rotations. Nothing is subtracted, so it cannot break down;
- the newest is the last column, which comes from a triangular solve in the same sweep.

For m = 32, 128, 512 and 1024 a sweep takes 0.03, 0.11, 0.70 and 2.2 ms (float32, 2
cores), a new factor by LAPACK 0.02, 0.05, 0.74 and 4.0 ms; that one takes several times
as long where other work holds a core that its threads wait for.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse._loops import when
from jaxsparse._platform import on_cpu
from jaxsparse._typing import Array

_RENEW_EVERY = 64


class Factor(NamedTuple):
    """The factor of S."""

    upper: Array  # U, `[m, m]`, rows and columns by age
    # What S has on its diagonal besides `G G^T`, `[m]`, by age: the shift, or more
    # where rounding asks for it
    added: Array


def empty_factor(m: int, shift: Array) -> Factor:
    """The factor of a window of zeros."""
    added = jnp.full(m, shift, shift.dtype)
    return Factor(jnp.diag(jnp.sqrt(added)), added)


def next_factor(factor: Factor, gram: Array, oldest: Array, shift: Array) -> Factor:
    """The factor after one row of `G` was replaced.

    `O(m^2)` on CPU: a sweep of rotations, and every 64 rows a factor by Cholesky's
    method. A rotation rounds, and each entry goes through one in every step until its
    row leaves, so that the error grows with the square root of m: in float32, at m =
    512 and 1024 and over thousands of steps, it came to 1.2e-6 and 1.7e-6 of S with a
    new factor once a round, and stayed within 6.5e-7 with one every 64 rows.

    On accelerators, where m short steps in a row are slow, it is Cholesky's method in
    each step, `m^3 / 3` FLOP.
    """
    system = (gram, oldest, shift)
    factor = on_cpu(_slide, _exchange, factor, *system)
    return when(oldest % _RENEW_EVERY == 0, _renew, factor, gram, oldest)


def factorise(gram: Array, oldest: Array, shift: Array) -> Factor:
    """The factor by Cholesky's method.

    Where rounding leaves S indefinite, `sqrt(eps)` times its largest entry is added.
    """
    norms = jnp.diagonal(gram)
    added = jnp.full_like(norms, shift)
    more = added + math.sqrt(jnp.finfo(gram.dtype).eps) * jnp.max(norms)
    plain, raised = (_cholesky(gram, oldest, x) for x in (added, more))
    fine = jnp.all(jnp.isfinite(plain))
    return Factor(jnp.where(fine, plain, raised), jnp.where(fine, added, more))


def solve(factor: Factor, x: Array) -> Array:
    """`S^-1 x`."""
    return _back(factor.upper, _forward(factor.upper, x))


def newest_column(factor: Factor) -> tuple[Array, Array]:
    """The last column of `S^-1`, scaled so that its last entry is 1."""
    upper, added = factor
    c = _back(upper, jnp.zeros_like(added).at[-1].set(upper[-1, -1]))
    return c, jnp.sum(added * c * c)


def _slide(factor: Factor, gram: Array, oldest: Array, shift: Array) -> Factor:
    """One sweep down the rows of U.

    Row i + 1 takes in, by a rotation, what is left of the row that goes, and becomes
    row i; its entry in the new column follows from it.
    """
    m = len(gram)
    columns = jnp.arange(m)
    dots = jnp.roll(gram[oldest - 1], -oldest)

    def step(carry: tuple[Array, Array, Array], i: Array):
        left, dots, rest = carry
        row = lax.dynamic_index_in_dim(factor.upper, i + 1, keepdims=False)
        row = jnp.roll(row, -1)
        size = jnp.sqrt(row[i] * row[i] + left[i] * left[i])
        cos, sin = row[i] / size, left[i] / size
        kept = (columns >= i) & (columns < m - 1)
        new = jnp.where(kept, cos * row + sin * left, jnp.zeros_like(row))
        left = jnp.where(columns > i, cos * left - sin * row, jnp.zeros_like(row))
        # A column is no longer than the diagonal says, whatever rounding does to it.
        most = jnp.sqrt(jnp.maximum(rest, 0))
        entry = jnp.clip(dots[i] / new[i], -most, most)
        carry = (left, dots - entry * new, rest - entry * entry)
        return carry, new.at[m - 1].set(entry)

    start = (jnp.roll(factor.upper[0], -1).at[m - 1].set(0), dots, dots[m - 1])
    (_, _, rest), rows = lax.scan(step, start, jnp.arange(m - 1))
    upper = jnp.zeros_like(factor.upper).at[: m - 1].set(rows)
    return _put_corner(upper, factor.added, dots[m - 1], rest, shift)


def _put_corner(
    upper: Array, added: Array, norm: Array, rest: Array, shift: Array
) -> Factor:
    """The last entry, from `rest`: what the others do not explain of `norm = |g|^2`.

    Of a gradient that they explain up to rounding, the row would be noise, and those
    after it noise of noise. Then more than the shift is added to its diagonal.
    """
    noise = 32 * jnp.finfo(norm.dtype).eps * norm
    last = jnp.where(rest + shift < noise, noise, shift)
    corner = jnp.sqrt(jnp.maximum(rest, 0) + last)
    return Factor(upper.at[-1, -1].set(corner), jnp.roll(added, -1).at[-1].set(last))


def _exchange(factor: Factor, gram: Array, oldest: Array, shift: Array) -> Factor:
    """As `_slide`, by Cholesky's method where rounding lets it."""
    added = jnp.roll(factor.added, -1).at[-1].set(shift)
    upper = _cholesky(gram, oldest, added)
    rest = jnp.square(upper[-1, -1]) - shift
    anew = _put_corner(upper, factor.added, gram[oldest - 1, oldest - 1], rest, shift)
    fine = jnp.all(jnp.isfinite(upper))
    anew = Factor(*(jnp.where(fine, a, b) for a, b in zip(anew, factor, strict=True)))
    return when(~fine, _slide, anew, gram, oldest, shift)


def _renew(factor: Factor, gram: Array, oldest: Array) -> Factor:
    """The factor anew; the one at hand where rounding prevents that."""
    upper = _cholesky(gram, oldest, factor.added)
    fine = jnp.all(jnp.isfinite(upper))
    return factor._replace(upper=jnp.where(fine, upper, factor.upper))


def _cholesky(gram: Array, oldest: Array, added: Array) -> Array:
    by_age = jnp.roll(jnp.roll(gram, -oldest, 0), -oldest, 1)
    each = jnp.arange(len(gram))
    system = by_age.at[each, each].add(added)
    # LAPACK takes columns first. Of a symmetric matrix the transpose is the same; this
    # one needs no copy, and none of what goes into the loop around it in each step.
    return lax.linalg.cholesky(system.T, symmetrize_input=False).T


def _forward(upper: Array, x: Array) -> Array:
    """`U^-T x`. On CPU by rows: LAPACK wants the columns of U, so copies it first."""

    def by_rows(upper: Array, x: Array) -> Array:
        def step(left: Array, i: Array):
            row = lax.dynamic_index_in_dim(upper, i, keepdims=False)
            entry = left[i] / row[i]
            return left - entry * row, entry

        return lax.scan(step, x, jnp.arange(len(x)))[1]

    at_once = lambda u, x: _triangular_solve(u, x, transpose_a=True)
    return on_cpu(by_rows, at_once, upper, x)


def _back(upper: Array, x: Array) -> Array:
    """`U^-1 x`."""

    def by_rows(upper: Array, x: Array) -> Array:
        def step(i: Array, found: Array) -> Array:
            i = len(x) - 1 - i
            row = lax.dynamic_index_in_dim(upper, i, keepdims=False)
            return found.at[i].set((x[i] - jnp.sum(row * found)) / row[i])

        return lax.fori_loop(0, len(x), step, jnp.zeros_like(x))

    return on_cpu(by_rows, _triangular_solve, upper, x)


def _triangular_solve(upper: Array, x: Array, transpose_a: bool = False) -> Array:
    return lax.linalg.triangular_solve(
        upper, x[:, None], left_side=True, lower=False, transpose_a=transpose_a
    )[:, 0]
