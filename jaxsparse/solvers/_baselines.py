"""Pruning a layer without changing the weights that are left: the baselines."""

import jax.numpy as jnp

from jaxsparse import patterns
from jaxsparse._typing import Array
from jaxsparse.linalg.energy import energy
from jaxsparse.linalg.gram import GramFactor
from jaxsparse.solvers import _arguments, _solved
from jaxsparse.solvers._arguments import LayerPattern
from jaxsparse.solvers._solved import Solved


def wanda(
    w: Array,
    gram: Array | GramFactor,
    sparsity: float | Array | None = None,
    *,
    pattern: LayerPattern = patterns.Unstructured("output"),
    mask: Array | None = None,
) -> Solved:
    """Keep the weights with the largest `|w_ij| sqrt(E[x_j^2])` unchanged.

    Sun et al. (2023, Wanda, arXiv:2306.11695). The solver for a layer whose score is
    `js.scores.wanda`; within each output by default, as in the paper. Weights of dead
    inputs are the first to go, the smallest of them first.

    Args:
      w: `[d_out, d_in]`, for outputs `x @ w.T`. Batches by `jax.vmap`.
      gram: `X^T X / n`, `[d_in, d_in]`, or what `js.curvature.factor_gram` made of it;
        or only its diagonal `[d_in]`, which is all that it reads. With the diagonal the
        error in the info assumes inputs without correlations.
      sparsity: the fraction to remove, in [0, 1), possibly traced; for `NM` it may be
        left out.
      pattern: `Unstructured("output" or "layer")`, `NM` or `Balanced`.
      mask: the mask of earlier pruning; True = kept. Removed weights stay removed and
        count toward the sparsity.

    Returns:
      The weights, mask and info.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf, a sparsity or group out of range,
        a mask that has already removed more than requested.
      TypeError: other patterns, types that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.solvers.wanda(jnp.array([[3.0, 2.0]]), jnp.array([1.0, 4.0]), 0.5).w
      Array([[0., 2.]], dtype=float32)
    """
    return _masked(w, gram, sparsity, mask, pattern=pattern, inputs=True)


def magnitude(
    w: Array,
    gram: Array | GramFactor,
    sparsity: float | Array | None = None,
    *,
    pattern: LayerPattern = patterns.Unstructured(),
    mask: Array | None = None,
) -> Solved:
    """Keep the largest weights unchanged; the inputs only determine the error.

    Args:
      w: `[d_out, d_in]`, for outputs `x @ w.T`. Batches by `jax.vmap`.
      gram: as for `wanda`.
      sparsity: the fraction to remove, in [0, 1), possibly traced; for `NM` it may be
        left out.
      pattern: `Unstructured("layer" or "output")`, `NM` or `Balanced`.
      mask: the mask of earlier pruning; True = kept. Removed weights stay removed and
        count toward the sparsity.

    Returns:
      The weights, mask and info.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf, a sparsity or group out of range,
        a mask that has already removed more than requested.
      TypeError: other patterns, types that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.solvers.magnitude(jnp.array([[3.0, 2.0]]), jnp.array([1.0, 4.0]), 0.5).w
      Array([[3., 0.]], dtype=float32)
    """
    return _masked(w, gram, sparsity, mask, pattern=pattern, inputs=False)


def _masked(w, gram, sparsity, mask, *, pattern, inputs: bool) -> Solved:
    solver = "wanda" if inputs else "magnitude"
    if not isinstance(gram, GramFactor) and jnp.ndim(gram) == 1:
        if jnp.shape(gram) != (w.shape[-1],):
            raise ValueError(
                f"The diagonal of a gram matrix has shape {jnp.shape(gram)}, but w of "
                f"shape {jnp.shape(w)} has {w.shape[-1]} inputs."
            )
        _arguments.check_layer(w, jnp.diag(jnp.ones_like(gram)))
    else:
        _arguments.check_layer(w, gram)
        gram = _solved.plain_gram(w, gram)
    sparsity = _arguments.check_choice(w, sparsity, pattern, mask, solver=solver)
    return _choose(w, gram, sparsity, mask, pattern=pattern, inputs=inputs)


@_solved.jitted("pattern", "inputs")
def _choose(w, gram, sparsity, before, *, pattern, inputs) -> Solved:
    diagonal = gram if gram.ndim == 1 else jnp.diagonal(gram)
    score = jnp.abs(w)
    if inputs:
        wide = _solved.compute_type(w, diagonal)
        norm = _solved.least_moments(jnp.sqrt(diagonal.astype(wide)))
        score = score.astype(wide) * norm[None, :]
    options = {"pattern": pattern, "axes": {"w": _solved.AXES}, "where": "w"}
    before = None if before is None else {"w": before}
    mask = patterns.masks({"w": score}, sparsity, masks=before, **options)["w"]
    kept = jnp.where(mask, w, jnp.zeros((), w.dtype))
    whole = jnp.diag(diagonal) if gram.ndim == 1 else gram
    none = jnp.zeros((), whole.dtype)
    failed = jnp.zeros((), bool)
    wide = w.astype(whole.dtype)
    error = energy((kept.astype(whole.dtype) - wide).T, whole)
    info = _solved.solve_info(wide.T, whole, error=error, damping=none, failed=failed)
    return Solved(kept, mask, info)
