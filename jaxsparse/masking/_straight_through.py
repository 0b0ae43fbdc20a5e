"""Straight-through pruning: a sparse forward pass with dense gradients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _calls, _checks, patterns, scores
from jaxsparse._typing import Array, PyTree, Sparsity, Tree, Where
from jaxsparse.tree import AxesRule, like


def straight_through(
    params: Tree,
    sparsity: Sparsity = None,
    *,
    score: Callable[..., PyTree] = scores.magnitude,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    min_keep: int = 1,
    axis_name: patterns.AxisName | None = None,
    masks: PyTree = None,
    decay: float = 0.0,
) -> Tree:
    """Return the pruned parameters, with the derivative of the identity.

    The forward pass computes `w * mask(w)`, with masks chosen anew at each call. The
    backward pass gives the gradient of the sparse network with respect to all weights,
    so a pruned weight continues to learn and may return. Call it in the loss, on the
    dense parameters that are trained::

        loss = lambda params, batch: task_loss(js.straight_through(params, 0.9), batch)

    Bengio et al. (2013, arXiv:1308.3432); for top-k masks Jayakumar et al. (2020) and
    Wortsman et al. (2019, DNW). With `decay` it is SR-STE (Zhou et al., 2021,
    arXiv:2102.04010): it adds `decay * w` to the gradient of each pruned weight, which
    keeps N:M masks from flickering. The paper uses 2e-4 with `pattern=js.NM(2, 4)`.

    Differs from SR-STE's code, which chooses the groups along its layers' last axes:
    here they run along the inputs.

    Args:
      params: the dense parameters.
      sparsity: the fraction to remove, in [0, 1), possibly traced, or a tree or mapping
        of them, as for `jaxsparse.patterns.masks`.
      score: a function of `params`, larger = keep; it may ask for `sparsity` by name.
      pattern: which weights are removed together, and which compete.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      min_keep: the least number of units that each group and each layer keeps.
      axis_name: the axis of shards under `shard_map`, as for
        `jaxsparse.patterns.masks`.
      masks: masks to use instead of choosing them here. Masks chosen only every few
        steps do not flicker, which keeps training stable at high sparsities and
        learning rates.
      decay: the strength that pulls pruned weights to 0, relative to the loss's
        gradient. With it the result has only reverse-mode derivatives.

    Returns:
      Parameters of the same structure, exactly 0 where pruned.

    Raises:
      ValueError: both a sparsity and masks, masks of another model, or as for
        `jaxsparse.patterns.masks`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> loss = lambda w: jnp.sum(js.straight_through(w, 0.5) ** 2) / 2
      >>> jax.value_and_grad(loss)(jnp.array([[1.0, 3.0]]))
      (Array(4.5, dtype=float32), Array([[0., 3.]], dtype=float32))
    """
    _checks.check_score(score)
    _checks.check_arrays(params=params)
    _checks.check_pattern(patterns.Pattern, pattern)
    _checks.check_number(least=0, decay=decay)
    if masks is None:
        frozen = lax.stop_gradient(params)
        scored = _calls.ask(score, frozen, sparsity=sparsity)
        _checks.check_like(frozen, scores=scored)
        masks = patterns.masks(
            scored,
            sparsity,
            pattern=pattern,
            where=where,
            axes=axes,
            min_keep=min_keep,
            axis_name=axis_name,
        )
    elif sparsity is not None:
        raise ValueError(
            "straight_through takes a sparsity, by which it chooses masks, or `masks`; "
            "got both."
        )
    else:
        masks = like(masks, params, name="masks")
        patterns.check_masks(masks, params)
    if decay:
        return jax.tree.map(lambda w, mask: _decayed(w, mask, decay), params, masks)
    return jax.tree.map(_mask_forward, params, masks)


@jax.custom_jvp
def _mask_forward(w: Array, mask: Array) -> Array:
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


@_mask_forward.defjvp
def _(primals, tangents):
    return _mask_forward(*primals), tangents[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _decayed(w: Array, mask: Array, decay: float) -> Array:
    """The same, with the gradient of `decay / 2 * sum(w^2)` of pruned weights."""
    return _mask_forward(w, mask)


def _decayed_forward(w: Array, mask: Array, decay: float):
    return _mask_forward(w, mask), (w, mask)


def _decayed_backward(decay: float, saved, grad: Array):
    w, mask = saved
    pulled = jnp.where(mask, jnp.zeros((), w.dtype), w) * decay
    return grad + pulled.astype(grad.dtype), None


_decayed.defvjp(_decayed_forward, _decayed_backward)
