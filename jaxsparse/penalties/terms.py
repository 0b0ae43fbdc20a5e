"""What the penalties of groups share: their strengths, adding and thresholding."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._typing import Array, PyTree
from jaxsparse.channels.scaling import map_at, spread
from jaxsparse.channels.slices import Slices, check_params, wide_leaves
from jaxsparse.tree import leaves_with_paths


def check_strength(strength: Any, *, name: str = "strength") -> None:
    """Raises unless it is a schedule or a number of at least 0."""
    if callable(strength):
        return
    if isinstance(strength, float) and strength == math.inf:
        return  # growing_regularization's limit is none
    try:
        _checks.check_number(least=0, **{name: strength})
    except TypeError:
        raise TypeError(
            f"{name}: a number or a schedule step -> number; got "
            f"{_checks.shown(strength)}."
        ) from None


class PenaltyState(NamedTuple):
    """The state of `group_lasso`, `prox_group_lasso`, `group_norm_decay`, `wgsef_prox`.

    Attributes:
      step: the number of updates made, int32.
    """

    step: Array


def in_each_step(
    slices: Mapping[str, Slices],
    change: Callable[[PyTree, Array, PyTree], PyTree],
    check: Callable[[PyTree], Any] = lambda params: None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation `change(updates, step, params) -> updates`."""

    def init_fn(params: PyTree) -> PenaltyState:
        check_params(slices, params)
        check(params)
        return PenaltyState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _checks.check_has_params(params)
        step = jnp.asarray(optax.safe_increment(state.step))
        return change(updates, state.step, params), PenaltyState(step)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def add_scaled(
    updates: PyTree,
    params: PyTree,
    slices: Mapping[str, Slices],
    vectors: Mapping[str, Array],
) -> PyTree:
    """`updates + factor * params`, with a factor for each index of each group."""
    leaves = dict(leaves_with_paths(params))
    ndims = {path: np.ndim(x) for path, x in leaves.items()}
    factors = spread(slices, vectors, ndims, combine=jnp.add, fill=0.0)

    def add(u: Array, factor: Array, w: Array) -> Array:
        wide = as_wide(w)
        step = u.astype(wide.dtype) + factor.astype(wide.dtype) * wide
        return jnp.where(factor == 0, u, step.astype(u.dtype))

    return map_at(add, updates, factors, leaves)


def moved_leaves(
    slices: Mapping[str, Slices], updates: PyTree, params: PyTree
) -> dict[str, Array]:
    """`params + updates` where slices lie, by path, in float32 at least."""
    steps = wide_leaves(slices, updates)
    held = wide_leaves(slices, params)
    return {p: w + steps[p].astype(w.dtype) for p, w in held.items()}


def soft_threshold(norm: Array, threshold: Array) -> Array:
    """`max(0, 1 - threshold / norm)`, and 1 where nothing is taken away."""
    above = norm > threshold
    safe = jnp.where(above, norm, jnp.ones_like(norm))
    shrunk = jnp.where(above, 1 - threshold / safe, jnp.zeros_like(norm))
    return jnp.where(threshold > 0, shrunk, jnp.ones_like(norm))


def weakness(norms: Array) -> Array:
    """`(max - I) / (max - min)` along the last axis, 0 where all are equal."""
    most = jnp.max(norms, axis=-1, keepdims=True)
    width = most - jnp.min(norms, axis=-1, keepdims=True)
    safe = jnp.where(width > 0, width, jnp.ones_like(width))
    return jnp.where(width > 0, (most - norms) / safe, jnp.zeros_like(norms))
