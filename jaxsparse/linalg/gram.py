"""The second moment of a layer's inputs, damped and factored, for layer-wise solvers.

One factorization serves every kernel that reads the same input.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._platform import on_cpu
from jaxsparse._typing import Array
from jaxsparse.linalg.factor import matmul

_SLAB, _SLABS = 256, 16  # the least columns of a slab, and the most slabs


class GramFactor(NamedTuple):
    """A factored gram matrix `G`, `[d_in, d_in]`.

    Attributes:
      root: `R`, upper triangular, with `G + damping I = R R^T`. Its inverse `U = R^-1`,
        upper triangular too, has `(G + damping I)^-1 = U^T U`; SparseGPT's paper uses
        this factor. Each diagonal block of `U` is the inverse of the same block of `R`,
        so solvers never form `U`.
      gram: `G` as it was given, without damping.
      damping: the number added to the diagonal.
      dead: `[d_in]`, True for inputs that are always 0.
      failed: whether the damped matrix was not positive definite; then `root` holds
        NaN.
    """

    root: Array
    gram: Array
    damping: Array
    dead: Array
    failed: Array


def factor_gram(
    gram: Array,
    *,
    damping: float | Array | None = None,
    rel_damping: float | Array | None = None,
) -> GramFactor:
    """Damp and factor the Gram matrix of a layer's inputs.

    Inputs that are always 0 (a zero on the diagonal) have their diagonal set to 1, and
    then `damping`, or `rel_damping` times the mean of the diagonal, is added to all of
    it. The mean includes the ones of dead inputs, as in SparseGPT's code.

    `R R^T` with `R` upper triangular is Cholesky's factorization of the matrix with its
    rows and columns in reverse: `n^3 / 3` multiplications and additions. SparseGPT's
    code factors, inverts and factors again, which takes four times as many; Frantar &
    Alistarh (2023, arXiv:2301.00774).

    Args:
      gram: `G = X^T X / n`, `[d_in, d_in]`, symmetric; only half of the matrix is read.
        Narrower types are computed in float32. Batches by `jax.vmap`.
      damping: an absolute number. Give this or `rel_damping`.
      rel_damping: relative to the mean of the diagonal.

    Returns:
      The factor.

    Raises:
      ValueError: no square matrix, NaN or Inf or a negative diagonal in it, not one of
        the two dampings, a matrix that is not positive definite (in eager use; under
        jit see `failed`).
      TypeError: a matrix that is not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> factor = js.curvature.factor_gram(gram, damping=0.0)
      >>> jnp.allclose(factor.root @ factor.root.T, gram).item()
      True
    """
    check_gram(gram)
    if (damping is None) == (rel_damping is None):
        raise ValueError(
            "factor_gram takes one of damping (absolute) and rel_damping (relative to "
            f"the mean of the diagonal); got {damping=}, {rel_damping=}."
        )
    for name, value in (("damping", damping), ("rel_damping", rel_damping)):
        check_damping(value, name=name)
    factor = _factor(gram, damping, rel_damping)
    check_factored(factor.failed, factor.damping, what="gram")
    return factor


def inverse_upper(factor: GramFactor) -> Array:
    """Return the upper-triangular `U` with `(G + damping I)^-1 = U^T U`.

    Args:
      factor: from `factor_gram`.

    Returns:
      `[d_in, d_in]`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> factor = js.curvature.factor_gram(4.0 * jnp.eye(2), damping=0.0)
      >>> js.curvature.inverse_upper(factor).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    _checks.check_is(GramFactor, "js.curvature.factor_gram(gram)", factor=factor)
    eye = jnp.eye(factor.root.shape[-1], dtype=factor.root.dtype)
    return lax.linalg.triangular_solve(factor.root, eye, left_side=True, lower=False)


def damped_inverse(factor: GramFactor) -> Array:
    """Return `(G + damping I)^-1`; 1 / (1 + damping) on the diagonal for dead inputs.

    Args:
      factor: from `factor_gram`.

    Returns:
      `[d_in, d_in]`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> factor = js.curvature.factor_gram(4.0 * jnp.eye(2), damping=1.0)
      >>> js.curvature.damped_inverse(factor).round(3).tolist()
      [[0.20000000298023224, 0.0], [0.0, 0.20000000298023224]]
    """
    upper = inverse_upper(factor)
    return matmul(upper.T, upper)


@jax.jit
def _factor(gram: Array, damping, rel_damping) -> GramFactor:
    narrow = jnp.finfo(gram.dtype).bits < 32
    wide = gram.astype(jnp.float32) if narrow else gram
    diagonal = jnp.diagonal(wide)
    dead = diagonal == 0
    added = given_damping(diagonal, damping, rel_damping)
    extra = jnp.where(dead, jnp.ones_like(diagonal), jnp.zeros_like(diagonal)) + added
    root = _reverse(_cholesky(_reverse(wide + jnp.diag(extra))))
    pivots = jnp.diagonal(root)
    failed = ~jnp.all(jnp.isfinite(pivots) & (pivots > 0))
    root = jnp.where(failed, jnp.full((), jnp.nan, root.dtype), root)
    return GramFactor(root, gram, added, dead, failed)


def given_damping(diagonal: Array, damping: Any, rel_damping: Any) -> Array:
    """What to add to the diagonal, a number of its own; 1 counts for dead inputs."""
    if damping is not None:
        return jnp.asarray(damping).astype(diagonal.dtype)
    live = jnp.where(diagonal == 0, jnp.ones_like(diagonal), diagonal)
    return jnp.asarray(rel_damping).astype(diagonal.dtype) * jnp.mean(live)


def _reverse(x: Array) -> Array:
    """Rows and columns from the last to the first.

    XLA (jaxlib 0.10) crashes where it moves a reversal into some operations; so it
    stands behind a barrier.
    """
    return lax.rev(lax.optimization_barrier(x), (0, 1))


def _cholesky(matrix: Array) -> Array:
    """The lower Cholesky factor."""
    at_once = lambda matrix: jnp.linalg.cholesky(matrix, symmetrize_input=False)
    return on_cpu(_by_slabs, at_once, matrix)


def _by_slabs(matrix: Array) -> Array:
    """The same, a slab of columns at a time.

    LAPACK's factorization as XLA's CPU backend calls it takes three times as long as
    the products it is made of, once it is larger than a cache. So it does the diagonal
    blocks alone.
    """
    n, dtype = matrix.shape[-1], matrix.dtype
    slab = max(_SLAB, -(-n // _SLABS))
    factor = jnp.zeros_like(matrix)
    for start in range(0, n, slab):
        end = min(n, start + slab)
        part = matrix[start:, start:end]
        if start:
            done = factor[start:, :start]
            part = part - matmul(done, done[: end - start].T)
        block = part[: end - start]
        corner = jnp.linalg.cholesky(block, symmetrize_input=False)
        factor = factor.at[start:end, start:end].set(corner)
        if end < n:
            eye = jnp.eye(end - start, dtype=dtype)
            inverse = lax.linalg.triangular_solve(
                corner, eye, left_side=True, lower=True
            )
            below = matmul(part[end - start :], inverse.T)
            factor = factor.at[end:, start:end].set(below)
    return factor


# Errors.


def check_gram(gram: Array, *, d_in: int | None = None) -> None:
    """Raises unless `gram` can be the second moment of a layer's inputs."""
    shape = jnp.shape(gram)
    wanted = "[d_in, d_in]" if d_in is None else f"[{d_in}, {d_in}]"
    if len(shape) != 2 or shape[0] != shape[1] or d_in not in (None, shape[0]):
        raise ValueError(
            f"gram must be {wanted}, the inputs' X^T X / n; got shape {shape}. For a "
            "batch of layers use jax.vmap."
        )
    _checks.check_arrays(gram=gram)
    if not jnp.issubdtype(gram.dtype, jnp.floating):
        raise TypeError(f"gram must be real floating point, got {gram.dtype}.")
    if not _checks.is_concrete(gram):
        return
    bad, low = count_not_finite(gram), count_negative(jnp.diagonal(gram))
    if not _checks.is_concrete(bad):  # gram is a constant of a function that is traced
        return
    if bad:
        raise ValueError(
            f"gram: {bad} of {gram.size} entries are NaN or Inf. Look for them in the "
            "layer's inputs; an Inf may be the overflow of sums in a narrow type."
        )
    if low:
        raise ValueError(
            f"gram: {low} entries of the diagonal are negative, so it is no second "
            "moment X^T X / n."
        )


@jax.jit
def count_not_finite(x: Array) -> Array:
    """How many numbers are NaN or Inf, in one pass."""
    return jnp.sum(~jnp.isfinite(x))


@jax.jit
def count_negative(x: Array) -> Array:
    """How many numbers are below 0."""
    return jnp.sum(x < 0)


def check_damping(value: Any, *, name: str) -> None:
    """Raises unless a damping is a number of at least 0, or left out."""
    if value is not None:
        _checks.check_number(least=0, **{name: value})


def check_factored(failed: Array, damping: Array, *, what: str) -> None:
    """Raises where a factorization is known to have failed."""
    if _checks.is_concrete(failed) and bool(failed):
        raise ValueError(
            f"{what} + {float(damping):g} I is not positive definite in "
            f"{damping.dtype}: inputs depend on each other, or are fewer rows than "
            "columns. Raise damping (or rel_damping; 0.01 is usual): it bounds the "
            "condition number by 1 + max eigenvalue / damping. Or pass float64."
        )
