"""The best weights for a given mask: least squares, exact or by conjugate gradients."""

import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.linalg.chunks import over_blocks, scratch_bytes
from jaxsparse.linalg.factor import matmul, solve
from jaxsparse.linalg.gram import GramFactor, given_damping
from jaxsparse.solvers import _arguments, _solved
from jaxsparse.solvers._solved import Solved

_FLOPS = 2e6  # of the factorisations of one batch


def refit(
    w: Array,
    mask: Array,
    gram: Array | GramFactor,
    *,
    iterations: int | None = None,
    start: Array | None = None,
    rel_damping: float | Array = 0.0,
    damping: float | Array | None = None,
) -> Solved:
    """Find the kept weights that come closest to the dense layer's outputs.

    They minimize `tr((W' - W) (G + damping I) (W' - W)^T)` where `W'` is 0 outside of
    the mask. For each row `[G + damping I]_KK w'_K = [(G + damping I) w]_K`, with `K`
    the weights that the row keeps.

    Without `iterations` the solution is exact: a Cholesky factorization for each row,
    `d_out d_in^3 / 3` multiplications, for small layers. With `iterations` conjugate
    gradients solve all rows at once, preconditioned by the diagonal, with one product
    `[d_out, d_in] x [d_in, d_in]` an iteration. 10 iterations bring most of the gain
    (ALPS, Meng et al. 2024, arXiv:2406.07831, ends with them). That needs no damping: a
    singular matrix is fine.

    Args:
      w: `[d_out, d_in]`, the dense weights, for outputs `x @ w.T`. Batches by
        `jax.vmap`.
      mask: what to keep, by whatever method it was chosen.
      gram: `X^T X / n`, `[d_in, d_in]`, or what `js.curvature.factor_gram` made of it
        (its damping is used).
      iterations: the number of iterations of conjugate gradients; None: exact.
      start: weights to start from, by default `w`; the result of `sparsegpt` saves a
        few iterations.
      rel_damping: the damping relative to the mean diagonal of the Gram matrix. Not
        used for a factor.
      damping: an absolute damping instead.

    Returns:
      The weights, mask and info. Kept weights of dead inputs keep their values in `w`.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf, and, for the exact method, a
        matrix that is not positive definite (in eager use; under jit see
        `info.failed`).
      TypeError: a mask whose dtype is not bool, types that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> w = jnp.array([[1.0, 2.0, 3.0]])
      >>> gram = jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])    # two equal inputs
      >>> mask = jnp.array([[False, True, True]])
      >>> js.solvers.refit(w, mask, gram).w.tolist()
      [[0.0, 3.0, 3.0]]
    """
    _arguments.check_layer(w, gram)
    if mask is None:
        raise TypeError("refit needs a mask: True = kept.")
    _arguments.check_mask(mask, w)
    _arguments.check_dampings(damping, rel_damping)
    if iterations is not None:
        _checks.check_positive_int(iterations, name="iterations")
    if start is not None and (jnp.shape(start) != w.shape or iterations is None):
        raise ValueError(
            f"start must have the shape of w, {w.shape}, and be given with iterations; "
            f"got shape {jnp.shape(start)} and {iterations=}."
        )
    plain = _solved.plain_gram(w, gram)
    if isinstance(gram, GramFactor):
        damping = gram.damping
    given = (w, mask, plain, start, damping, rel_damping)
    return _solved.done(_refit(*given, iterations=iterations))


@_solved.jitted("iterations")
def _refit(w, mask, gram, start, damping, rel_damping, *, iterations) -> Solved:
    added = given_damping(jnp.diagonal(gram), damping, rel_damping)
    damped = gram + added * jnp.eye(gram.shape[0], dtype=gram.dtype)
    target = w.astype(gram.dtype)
    if iterations is None:
        moved = least_squares(target, mask, damped)
        failed = ~jnp.all(jnp.isfinite(moved))
    else:
        first = target if start is None else start.astype(gram.dtype)
        moved = conjugate_gradients(target, mask, damped, first, iterations)
        failed = jnp.zeros((), bool)
    return _solved.finish(w, moved, mask, gram, damping=added, failed=failed)


def least_squares(target: Array, mask: Array, gram: Array) -> Array:
    """The exact solution, row by row."""
    d_out, d_in = target.shape
    outputs = matmul(target, gram)
    empty = jnp.diagonal(gram) == 0

    def rows(wanted: Array, kept: Array, gram: Array, empty: Array) -> Array:
        # A removed weight, or a dead input, gets a row and a column of the identity.
        kept = kept & ~empty[None, :]
        both = kept[:, :, None] & kept[:, None, :]
        eye = jnp.eye(d_in, dtype=gram.dtype)[None]
        matrix = jnp.where(both, gram[None], jnp.zeros((), gram.dtype))
        matrix = jnp.where(kept[:, :, None], matrix, eye)
        return solve(matrix, jnp.where(kept, wanted, jnp.zeros_like(wanted)))

    # jaxlib 0.10 can stop for ever where large batches are factored at the same time.
    chunk = max(1, int(_FLOPS / (d_in**3 / 3)))
    floats = max(3 * d_in**2, scratch_bytes() // (8 * chunk))
    return over_blocks(rows, (d_out,), floats, outputs, mask, whole=(gram, empty))


def conjugate_gradients(
    target: Array, mask: Array, gram: Array, start: Array, iterations: int
) -> Array:
    """A better solution after each iteration, for all rows at once."""
    zero = jnp.zeros((), target.dtype)
    kept = lambda x: jnp.where(mask, x, zero)
    diagonal = jnp.diagonal(gram)
    scale = jnp.where(diagonal > 0, 1 / diagonal, jnp.zeros_like(diagonal))[None, :]
    dot = lambda a, b: jnp.sum(a * b, axis=1, keepdims=True)
    over = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1), zero)

    def step(_, state):
        x, residual, direction, size = state
        image = kept(matmul(direction, gram))
        length = over(size, dot(direction, image))
        x = x + length * direction
        residual = residual - length * image
        better = residual * scale
        new = dot(residual, better)
        return x, residual, better + over(new, size) * direction, new

    x = kept(start)
    residual = kept(matmul(target - x, gram))
    direction = residual * scale
    state = (x, residual, direction, dot(residual, direction))
    return lax.fori_loop(0, iterations, step, state)[0]
