"""Penalties that make whole indices of groups small or zero: group lasso and decay."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse._typing import Array, PyTree
from jaxsparse.channels.nesting import nesting
from jaxsparse.channels.scaling import factors_of, scaled_updates
from jaxsparse.channels.slices import (
    PRODUCERS,
    Slices,
    paths_of,
    slices_of,
)
from jaxsparse.channels.sums import entry_counts, squared_norms, sums
from jaxsparse.coupling import Group
from jaxsparse.penalties.terms import (
    add_scaled,
    check_strength,
    in_each_step,
    moved_leaves,
    soft_threshold,
    weakness,
)
from jaxsparse.schedules.horizon import evaluate


def group_lasso(
    groups: Mapping[str, Group],
    *,
    strength: Any,
    roles: Collection[str] = PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Add the gradient of the group lasso, which makes whole channels small.

    The penalty is `strength * sum_c sqrt(n_c) * ||w_c||_2`, where w_c are the n_c
    entries of all slices of channel c (for a batched group, in each copy), and its
    gradient `strength * sqrt(n_c) * w_c / ||w_c||`, 0 at `w_c = 0`. Yuan & Lin (2006);
    for the filters of a network Wen et al. (2016, arXiv:1608.03665).

    Put it before the optimizer, which then treats its gradient like the loss's::

        tx = optax.chain(js.penalties.group_lasso(groups, strength=1e-4),
                         optax.sgd(0.1))

    An optimizer that divides by second moments (Adam) evens out the penalty. Between
    `optax.scale_by_adam()` and `optax.scale_by_learning_rate(...)` it is decoupled,
    like AdamW's decay. A subgradient comes near zero but never stays there; for exact
    zeros use `prox_group_lasso`.

    By default w_c are the slices of the producers: outputs of kernels, and the biases
    and scales along them. If those are zero the channel has no effect. Slices of
    consumers (role "input") overlap with the producers' slices of another group: here
    both penalties add up; in `prox_group_lasso` that is an error. Slices of whole heads
    contain the slices of their entries.

    Args:
      groups: groups by name, all prunable: `js.coupling.groups(trace).prunable`, or a
        dictionary with some of them.
      strength: a number, or a schedule step -> number.
      roles: which members of a group take part, of "input", "output", "batch", "other".
        Statistics (of a BatchNorm) are members, too, unless you trace a function of the
        trained parameters alone.

    Returns:
      A gradient transformation. Its state is a `PenaltyState`.

    Raises:
      ValueError: a negative strength, groups that are not prunable or without members
        of these roles; at `init`, groups of other parameters; at `update`, without
        `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "down": jnp.ones((2, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((5, 2))))
      >>> tx = js.penalties.group_lasso(groups.prunable, strength=0.1)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> grads, state = tx.update(zeros, tx.init(params), params)
      >>> [round(x, 3) for x in grads["up"][:, 0].tolist()]   # 0.1 * sqrt(2) * w / 5
      [0.085, 0.113]
      >>> grads["up"][:, 1].tolist()
      [0.0, 0.0]
    """
    slices = slices_of(groups, roles=roles)
    check_strength(strength)

    def penalty(step: Array, params: PyTree) -> dict[str, Array]:
        counts = entry_counts(slices, params)
        result = {}
        for name, squared in squared_norms(slices, params).items():
            scale = jnp.asarray(np.sqrt(counts[name]), squared.dtype)
            weight = jnp.asarray(evaluate(strength, step), squared.dtype)
            # At 0 the subgradient of the smallest norm. The root of what is not 0: its
            # derivative at 0 is infinite.
            safe = jnp.where(squared > 0, squared, jnp.ones_like(squared))
            per = weight * scale / jnp.sqrt(safe)
            result[name] = jnp.where(squared > 0, per, jnp.zeros_like(per))
        return result

    return _decay(slices, penalty)


def group_norm_decay(
    groups: Mapping[str, Group],
    *,
    strength: Any,
    ratio: float = 16.0,
    roles: Collection[str] = PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Add a decay that is stronger for weaker channels (DepGraph's sparse training).

    `g <- g + strength * gamma_c * w_c`, `gamma_c = ratio^((max - I_c) / (max - min))`
    with `I_c = ||w_c||_2` and max and min over the group (for a batched group, over the
    copy): 1 for the strongest channel, `ratio` for the weakest. gamma counts as a
    constant. Fang et al. (2023, DepGraph, arXiv:2301.12900).

    Put it before the optimizer, like `group_lasso`.

    Differs from Torch-Pruning's `GroupNormPruner`, which takes all members; here the
    default is those that produce the channel. Pass `roles=("input", "output", "batch",
    "other")` for all. Equal norms give gamma = 1 instead of NaN.

    Args:
      groups: groups by name, all prunable.
      strength: a number, or a schedule step -> number.
      ratio: the decay of the weakest channel over that of the strongest, 2^4 in the
        paper.
      roles: as for `group_lasso`.

    Returns:
      A gradient transformation. Its state is a `PenaltyState`.

    Raises:
      ValueError: a negative strength, a ratio below 1, and as `group_lasso`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[4.0, 2.0, 3.0]]), "down": jnp.ones((3, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((5, 1))))
      >>> tx = js.penalties.group_norm_decay(groups.prunable, strength=1.0)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> grads, _ = tx.update(zeros, tx.init(params), params)
      >>> grads["up"].tolist()
      [[4.0, 32.0, 12.0]]
    """
    slices = slices_of(groups, roles=roles)
    check_strength(strength)
    if not ratio >= 1:
        raise ValueError(f"{ratio=} must be at least 1; DepGraph takes 2^4.")

    def penalty(step: Array, params: PyTree) -> dict[str, Array]:
        result = {}
        for name, squared in squared_norms(slices, params).items():
            weight = jnp.asarray(evaluate(strength, step), squared.dtype)
            base = jnp.asarray(ratio, squared.dtype)
            result[name] = weight * base ** weakness(jnp.sqrt(squared))
        return result

    return _decay(slices, penalty)


def prox_group_lasso(
    groups: Mapping[str, Group],
    *,
    strength: Any,
    roles: Collection[str] = PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Apply the proximal step of the group lasso: whole channels become exactly zero.

    `params + u' = v * max(0, 1 - strength * sqrt(n_c) / ||v_c||)` with `v = params +
    u`, which minimizes `1/2 ||x - v||^2 + strength * sum_c sqrt(n_c) * ||x_c||`; w_c
    and n_c as for `group_lasso`. After `optax.apply_updates` a channel below the
    threshold is exactly 0.0 in all its slices; it comes back if the gradient moves it
    above the threshold.

    Place it last in a chain, where it sees the final update. `strength` is the
    threshold itself: the step's learning rate times the penalty's weight::

        tx = optax.chain(optax.sgd(rate),
                         js.penalties.prox_group_lasso(groups, strength=rate * 1e-3))

    With a learning rate schedule let `strength` be one too, `lambda step: weight *
    rate(step)`. After an optimizer with its own scale for each weight (Adam) it is no
    longer the proximal step of that metric, but the usual decoupled one.

    Slices have to be disjoint, or one has to lie in the other: heads and the entries of
    heads. Then one step after the other, the smaller slices first, is the step of the
    sum of both penalties (Jenatton et al. 2011, arXiv:1009.2139). Slices of consumers
    (role "input") cross slices of the next layer's producers, which is an error.

    `js.channels.zero_indices(params, groups)` finds the channels that are zero.

    Args:
      groups: groups by name, all prunable.
      strength: a number, or a schedule step -> number; the learning rate is in it.
      roles: as for `group_lasso`.

    Returns:
      A gradient transformation. Its state is a `PenaltyState`.

    Raises:
      ValueError: as `group_lasso`; at `init`, also for groups whose slices overlap.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[3.0, 0.1], [4.0, 0.1]]), "down": jnp.ones((2, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((5, 2))))
      >>> tx = optax.chain(optax.sgd(0.1), js.penalties.prox_group_lasso(
      ...     groups.prunable, strength=0.5**0.5))
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(zeros, tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)["up"]
      >>> [round(x, 3) for x in moved.ravel().tolist()]
      [2.4, 0.0, 3.2, 0.0]
    """
    slices = slices_of(groups, roles=roles)
    check_strength(strength)

    def shrink(updates: PyTree, step: Array, params: PyTree) -> PyTree:
        counts = entry_counts(slices, params)
        moved = moved_leaves(slices, updates, params)
        factors: dict[str, Array] = {}
        for name in nesting(slices, params):
            one = {name: slices[name]}
            now = {p: moved[p] for p in paths_of(one) if p in moved}
            now = {p: v * factors[p] if p in factors else v for p, v in now.items()}
            norm = jnp.sqrt(sums(one, {p: v * v for p, v in now.items()})[name])
            weight = jnp.asarray(evaluate(strength, step), norm.dtype)
            threshold = weight * jnp.asarray(np.sqrt(counts[name]), norm.dtype)
            shrunk = soft_threshold(norm, threshold)
            for path, factor in factors_of(one, {name: shrunk}, now).items():
                before = factors.get(path)
                factors[path] = factor if before is None else before * factor
        return scaled_updates(updates, params, factors)

    return in_each_step(slices, shrink, lambda params: nesting(slices, params))


def _decay(slices: Mapping[str, Slices], penalty: Any) -> Any:
    """A transformation that adds `penalty(step, params)` times the slices."""

    def add(updates: PyTree, step: Array, params: PyTree) -> PyTree:
        return add_scaled(updates, params, slices, penalty(step, params))

    return in_each_step(slices, add)
