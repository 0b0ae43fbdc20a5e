"""BiP: masks and weights as two levels of one problem."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.tree import AxesRule, leaves_with_paths, map_with_path


def bip(
    loss_fn: Callable[..., Any],
    *,
    sparsity: float,
    gamma: float = 1.0,
    pattern: patterns.Pattern = patterns.Unstructured("global"),
    axes: AxesRule = None,
) -> Callable[..., tuple[Array, tuple[PyTree, PyTree]]]:
    """Return a function that computes the gradients of bi-level pruning.

    The masks `m` keep the largest scores. With `g` the gradient of the loss at the
    pruned weights `z = m * w`, the lower level trains the weights with `m * g + gamma *
    w`, and the upper level the scores with `(w - g / gamma) * g`: the second term
    accounts for how the lower level's solution moves with the masks. Zhang et al.
    (2022, BiP, arXiv:2210.04092)::

        value_and_grads = js.masking.bip(loss_fn, sparsity=0.9)
        trained = params, js.masking.init_scores(params, init=jnp.abs)
        loss, grads = value_and_grads(trained, batch)
        updates, opt_state = tx.update(grads, opt_state, trained)

    with `optax.partition` for two optimizers, as for `masked_by_scores`. The paper
    trains the two levels on different batches: call it twice, and use one half of each
    result.

    Differs from the reference implementation, which multiplies the scores' gradient by
    itself in place of `g * g`, and adds the weight decay and momentum of both
    optimizers to both. This follows the paper's formula.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> loss`.
      sparsity: the fraction to remove, in [0, 1).
      gamma: the strength of the weights' regularization, above 0.
      pattern: which weights are removed together, and which compete.
      axes: as for `jaxsparse.patterns.masks`.

    Returns:
      `f((params, scores), *args, **kwargs) -> (loss, (grads, score_grads))`; scores as
      `init_scores` makes them.

    Raises:
      ValueError: a sparsity outside [0, 1), a `gamma` that is not above 0, or as for
        `jaxsparse.patterns.masks`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> value_and_grads = js.masking.bip(lambda w: jnp.sum(3 * w), sparsity=0.5)
      >>> w = jnp.array([[2.0, 1.0]])
      >>> loss, grads = value_and_grads((w, jnp.abs(w)))
      >>> grads                               # 3 m + w, and (w - 3) 3
      (Array([[5., 1.]], dtype=float32), Array([[-3., -6.]], dtype=float32))
    """
    _checks.check_callable(None, loss_fn=loss_fn)
    _checks.check_sparsity(sparsity)
    _checks.check_number(above=0, gamma=gamma)
    _checks.check_pattern(patterns.Pattern, pattern)
    _checks.check_axes(axes)
    everything: Where = lambda path, leaf: True

    def value_and_grads(trained: tuple[PyTree, PyTree], *args: Any, **kwargs: Any):
        params, scores = trained
        masks = patterns.masks(
            scores, sparsity, pattern=pattern, where=everything, axes=axes
        )
        chosen = dict(leaves_with_paths(masks))
        kept = lambda path, w: jnp.where(chosen[path], w, 0) if path in chosen else w
        pruned = map_with_path(kept, params)
        value, grads = jax.value_and_grad(loss_fn)(pruned, *args, **kwargs)
        own = dict(leaves_with_paths(params))
        along = dict(leaves_with_paths(grads))
        lower = map_with_path(lambda path, g: kept(path, g) + gamma * own[path], grads)
        upper = map_with_path(
            lambda path, _: (own[path] - along[path] / gamma) * along[path], scores
        )
        return value, (lower, upper)

    return value_and_grads
