"""Scores from curvature: what the loss says of each weight, to second order."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype, widen
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.scores._range import fourth_root, lifted
from jaxsparse.tree import leaves_with_paths, map_with_path, select


def obd(params: PyTree, diagonal: PyTree, *, where: Where = None) -> PyTree:
    """Score by Optimal Brain Damage, `1/2 H_qq w_q^2`.

    The score is the increase of the loss, at a minimum and with a diagonal Hessian,
    when a weight is removed and no other changes. LeCun, Denker & Solla (1989). The
    papers on language models put the diagonal of the Fisher matrix for `H_qq`.

    Args:
      params: a tree of arrays.
      diagonal: `H_qq`, or of the Fisher matrix, for what takes part: `jax.tree.map(
        jnp.reciprocal, js.curvature.inverse_diagonal(fisher))` of a
        `diagonal_fisher`. None for the others.
      where: which parameters have to have one; see `jaxsparse.tree.select`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep; zeros for
      parameters that take no part.

    Raises:
      ValueError: a selected parameter has no curvature, or of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.array([[2.0, 1.0]])}
      >>> js.scores.obd(params, {"kernel": jnp.array([[1.0, 8.0]])})
      {'kernel': Array([[2., 4.]], dtype=float32)}
    """

    def score(w: Array, h: Array) -> Array:
        one_by_one = jnp.abs(w) * (jnp.abs(w) * h / 2)
        scores = jnp.where(_square_is_lost(w), one_by_one, jnp.square(w) * h / 2)
        return _lifted(scores, jnp.square(fourth_root(w)) * fourth_root(h / 2), h)

    return _each(score, params, diagonal, where, "diagonal")


def obs(params: PyTree, inverse_diagonal: PyTree, *, where: Where = None) -> PyTree:
    """Score by Optimal Brain Surgeon, `w_q^2 / (2 [H^-1]_qq)`.

    The score is the increase of the loss, at a minimum, when a weight is removed and
    all others take their best values. Hassibi & Stork (1992); with blocks of the
    empirical Fisher matrix for H: WoodFisher (arXiv:2004.14340), oBERT
    (arXiv:2203.07259), M-FAC (arXiv:2107.03356). `js.solvers.obs` makes that change as
    well.

    Differs from WoodFisher, which leaves the 1/2 out and adds 1e-10 to the score and
    to the diagonal, and from oBERT's implementation, which adds 1.2e-7 to the latter:
    where the damping is large that decides about small weights.

    Args:
      params: a tree of arrays.
      inverse_diagonal: `[H^-1]_qq` for what takes part, from
        `js.curvature.inverse_diagonal(fisher)`; None for the others.
      where: which parameters have to have one; see `jaxsparse.tree.select`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep; zeros for
      parameters that take no part.

    Raises:
      ValueError: a selected parameter has no curvature, or of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.array([[2.0, 1.0]])}
      >>> js.scores.obs(params, {"kernel": jnp.array([[1.0, 0.125]])})
      {'kernel': Array([[2., 4.]], dtype=float32)}
    """

    def score(w: Array, d: Array) -> Array:
        one_by_one = jnp.abs(w) * (jnp.abs(w) / (2 * d))
        scores = jnp.where(_square_is_lost(w), one_by_one, jnp.square(w) / (2 * d))
        return _lifted(scores, jnp.square(fourth_root(w)) / fourth_root(2 * d), d)

    return _each(score, params, inverse_diagonal, where, "inverse_diagonal")


def _square_is_lost(w: Array) -> Array:
    # Whether it is 0, or near; the loss is not where the curvature is large.
    return jnp.square(w) < float(jnp.finfo(w.dtype).tiny) * 2.0**24


def _lifted(scores: Array, root: Array, curvature: Array) -> Array:
    # A negative curvature (of a Hessian) is no score that underflowed.
    return jnp.where(curvature >= 0, lifted(scores, root), scores)


def _each(
    score: Callable[[Array, Array], Array],
    params: PyTree,
    curvature: PyTree,
    where: Where,
    name: str,
) -> PyTree:
    _checks.check_arrays(params=params)
    _checks.check_arrays(**{name: curvature})
    found = dict(leaves_with_paths(curvature))

    def one(path: str, w: Array, taken: bool) -> Array:
        if path not in found:
            if taken:
                raise ValueError(
                    f"{path}: selected by `where`, but there is no curvature for it, "
                    f"only for {list(found)[:4]}. Take the gradients with the same "
                    "`where`."
                )
            return jnp.zeros_like(widen(w))
        c = found[path]
        if jnp.shape(c) != jnp.shape(w):
            raise ValueError(
                f"{path}: curvature of shape {jnp.shape(c)} for a parameter of shape "
                f"{jnp.shape(w)}. Was it made for another model?"
            )
        result = wide_dtype(w.dtype)
        wide = max(result, c.dtype, key=lambda dtype: dtype.itemsize)
        return score(w.astype(wide), c.astype(wide)).astype(result)

    return map_with_path(one, params, select(params, where))
