"""Masks that are learned: scores beside the weights, trained by any optimizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, patterns
from jaxsparse._dtypes import widen
from jaxsparse._typing import Array, PyTree, Sparsity, Tree, Where
from jaxsparse.tree import AxesRule, leaves_with_paths, map_with_path, select


def init_scores(
    params: PyTree,
    *,
    init: Callable[[Array], Array] = jnp.zeros_like,
    where: Where = None,
) -> PyTree:
    """Make scores for the parameters that take part, to be trained beside them.

    Args:
      params: the parameters.
      init: from a parameter to its first scores: zeros for movement pruning, `jnp.abs`
        to begin with magnitudes, a random draw for edge-popup.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      A tree with the structure of `params`, of float32 arrays at least, and None for
      parameters that take no part.

    Raises:
      ValueError: a `where` that matches nothing.
      TypeError: an `init` that is not a function.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
      >>> js.masking.init_scores(params)
      {'bias': None, 'kernel': Array([[0., 0.]], dtype=float32)}
    """
    _checks.check_arrays(params=params)
    _checks.check_callable(1, init=init)
    make = lambda w, take: widen(init(w)) if take else None
    return jax.tree.map(make, params, select(params, where))


def masked_by_scores(
    params: Tree,
    scores: PyTree,
    sparsity: Sparsity = None,
    *,
    threshold: float | Array | None = None,
    pattern: patterns.Pattern = patterns.Unstructured(),
    axes: AxesRule = None,
    min_keep: int = 1,
) -> Tree:
    """Return the parameters under the masks of trained scores, `w * mask(s)`.

    The derivative treats the mask as the scores themselves. With `g` the gradient of
    the masked weights, a weight gets `mask * g`, and a score gets `w * g` whether its
    weight is kept or not. So a score rises while its weight moves away from 0. Scores
    are an ordinary tree: train both with `optax.partition`, at rates of their own::

        def loss_fn(trained, batch):
            return task_loss(js.masking.masked_by_scores(*trained, 0.9), batch)

        trained = params, js.masking.init_scores(params)
        tx = optax.partition(
            {"weights": optax.adamw(3e-5), "scores": optax.adamw(1e-2)},
            ("weights", "scores"))

    - Movement pruning (Sanh et al., 2020, arXiv:2005.07683): use scores that start at 0
      and a sparsity that rises. Soft movement: `threshold=0.1` through `s =
      logit(0.1)`, and a penalty `mean(sigmoid(s))` in the loss.
    - Edge-popup (Ramanujan et al., 2020, arXiv:1911.13299): `jax.lax.stop_gradient` of
      the weights, `jax.tree.map(jnp.abs, scores)`.

    The final masks are `jaxsparse.patterns.masks(scores, sparsity, ...)`.

    Differs from movement's code, which counts `int(density * n)` per matrix, and
    chooses 2:4 along the outputs.

    Args:
      params: the parameters.
      scores: by the parameters' paths, as `init_scores` makes; larger = keep.
        Parameters without scores stay dense.
      sparsity: the fraction to remove, possibly traced, or a tree or mapping of them,
        as for `jaxsparse.patterns.masks`. Give this, or `threshold`, or an `NM`.
      threshold: keep the scores above it, and the best `min_keep` of each parameter;
        possibly traced.
      pattern: which weights are removed together, and which compete.
      axes: as for `jaxsparse.patterns.masks`.
      min_keep: the least number of units that each group and each layer keeps.

    Returns:
      Parameters of the same structure, exactly 0 where pruned.

    Raises:
      ValueError: both a sparsity and a threshold, a threshold with a pattern of more
        than single weights, scores of another structure or shape, or as for
        `jaxsparse.patterns.masks`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> w, s = jnp.array([[3.0, -2.0]]), jnp.array([[0.0, 1.0]])
      >>> f = lambda w, s: jnp.sum(js.masking.masked_by_scores(w, s, 0.5) * 2)
      >>> jax.grad(f, argnums=(0, 1))(w, s)
      (Array([[0., 2.]], dtype=float32), Array([[ 6., -4.]], dtype=float32))
    """
    _checks.check_arrays(params=params, scores=scores)
    _check_scores(params, scores)
    frozen = lax.stop_gradient(scores)
    everything = lambda path, leaf: True
    if threshold is None:
        masks = patterns.masks(
            frozen,
            sparsity,
            pattern=pattern,
            where=everything,
            axes=axes,
            min_keep=min_keep,
        )
    elif sparsity is not None or not isinstance(pattern, patterns.Unstructured):
        raise ValueError(
            "threshold stands in place of a sparsity, and for single weights alone: "
            f"got {sparsity=}, pattern={pattern}."
        )
    else:
        masks = jax.tree.map(lambda s: _above(s, threshold, min_keep), frozen)
    found = dict(leaves_with_paths(scores))
    chosen = dict(leaves_with_paths(masks))

    def one(path: str, w: Array) -> Array:
        return _product(w, found[path], chosen[path]) if path in found else w

    return map_with_path(one, params)


def _check_scores(params: PyTree, scores: PyTree) -> None:
    """Raises where scores do not lie on the parameters."""
    shapes = {path: jnp.shape(w) for path, w in leaves_with_paths(params)}
    named = leaves_with_paths(scores)
    if not named:
        raise ValueError("No scores: js.masking.init_scores(params) makes them.")
    for path, score in named:
        if shapes.get(path) != jnp.shape(score):
            raise ValueError(
                f"{path or 'scores'}: scores of shape {jnp.shape(score)} for a "
                f"parameter of shape {shapes.get(path, 'none')}. "
                "js.masking.init_scores(params) makes scores that fit."
            )


def _above(score: Array, threshold: float | Array, min_keep: int) -> Array:
    """Scores above a threshold, and the best few."""
    (best,) = jax.tree.leaves(
        patterns.masks(
            score,
            jnp.float32(1.0),
            where=lambda path, leaf: True,
            min_keep=min(min_keep, score.size),
        )
    )
    return (score > jnp.asarray(threshold, score.dtype)) | best


@jax.custom_jvp
def _product(w: Array, score: Array, mask: Array) -> Array:
    del score
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


@_product.defjvp
def _(primals, tangents):
    w, _, mask = primals
    along_w, along_score, _ = tangents
    moved = _product(along_w, along_w, mask) + w * along_score.astype(w.dtype)
    return _product(*primals), moved


def soft_threshold(params: Tree, thresholds: PyTree) -> Tree:
    """Return the parameters shrunk by trained thresholds, `sign(w) max(|w| - t, 0)`.

    Soft threshold reparametrization (STR, Kusupati et al., 2020, arXiv:2002.03231):
    `t = sigmoid(s)` with one `s` a layer that is trained with the weights. Weight
    decay pulls on `s` and so makes the network sparse. The sparsity is not chosen; it
    results from the decay. All derivatives are those of the formula.

        loss_fn = lambda trained, batch: task_loss(
            js.masking.soft_threshold(*trained), batch)

    Args:
      params: the parameters.
      thresholds: the `s` by the parameters' paths, arrays that broadcast to them
        (scalars for one a layer); parameters without one stay dense.

    Returns:
      Parameters of the same structure. `jax.tree.map(lambda w: w != 0, ...)` of those
      with thresholds are the masks.

    Raises:
      ValueError: thresholds that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.array([[-2.0, 0.25]]), "bias": jnp.ones(2)}
      >>> thresholds = {"kernel": jnp.zeros(())}
      >>> js.masking.soft_threshold(params, thresholds)["kernel"]
      Array([[-1.5,  0. ]], dtype=float32)
    """
    _checks.check_arrays(params=params, thresholds=thresholds)
    owners, found = (dict(leaves_with_paths(x)) for x in (params, thresholds))
    for path, s in found.items():
        if path not in owners or not _checks.broadcasts(s.shape, owners[path].shape):
            raise ValueError(
                f"thresholds: {path or 'that'} has shape {s.shape}, which does not "
                f"broadcast to a parameter of that path, {_shape_of(owners.get(path))}."
            )

    def shrink(path: str, w: Array) -> Array:
        if path not in found:
            return w
        t = jax.nn.sigmoid(found[path]).astype(w.dtype)
        return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - t)

    return map_with_path(shrink, params)


def _shape_of(w: Array | None) -> str:
    return "which does not exist" if w is None else f"of shape {w.shape}"
