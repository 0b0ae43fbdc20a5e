"""Penalties that make whole indices of groups small: group lasso and growing decay."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from optax._src.base import NO_PARAMS_MSG

from jaxsparse import _checks
from jaxsparse._loops import when
from jaxsparse._sharded import sharded_like
from jaxsparse._typing import Array, Cadence, PyTree
from jaxsparse.structured import Group
from jaxsparse.structured import _slices as sl
from jaxsparse.transforms._horizon import as_cadence, evaluate
from jaxsparse.tree import leaves_with_paths, map_with_path


class PenaltyState(NamedTuple):
    """The state of `group_lasso`, `prox_group_lasso`, `group_norm_decay`, `wgsef_prox`.

    Attributes:
      step: how many updates were made, int32.
    """

    step: Array


class GrowingRegularizationState(NamedTuple):
    """The state of `growing_regularization`.

    Attributes:
      step: how many updates were made, int32.
      strengths: each index's penalty, `[*copies, size]` float32 by the groups' names.
    """

    step: Array
    strengths: dict[str, Array]


def group_lasso(
    groups: Mapping[str, Group],
    *,
    strength: Any,
    roles: Collection[str] = sl.PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the group lasso: indices compete, whole ones become small.

    The penalty is `strength * sum_c sqrt(n_c) * ||w_c||_2`, where w_c are the n_c
    entries of all slices of index c (for a batched group, of each copy's index), and
    its gradient `strength * sqrt(n_c) * w_c / ||w_c||`, 0 at `w_c = 0`. Yuan & Lin
    (2006); for the filters of a network Wen et al. (2016, arXiv:1608.03665).

    It stands before the optimizer, where its gradient is treated like the loss's::

        tx = optax.chain(js.transforms.group_lasso(groups, strength=1e-4),
                         optax.sgd(0.1))

    An optimizer that divides by second moments (Adam) evens the penalty out; between
    `optax.scale_by_adam()` and `optax.scale_by_learning_rate(...)` it is decoupled, as
    AdamW's decay. A subgradient comes near zero and never stays there; for exact zeros
    use `prox_group_lasso`.

    By default w_c are the slices of the producers: outputs of kernels, the biases and
    scales along them. If those are zero the index does nothing. Slices of consumers
    (role "input") overlap with the producers' slices of another group: here both
    penalties add up, in `prox_group_lasso` that is an error. Also the slices of whole
    heads hold those of the entries of heads.

    Args:
      groups: groups by name, all prunable: `js.structured.groups(trace).prunable`, or a
        dictionary with some of them.
      strength: a number, or a schedule step -> number.
      roles: which members of a group take part, of "input", "output", "batch",
        "other". Statistics (of a BatchNorm) are members too: trace a function of the
        trained parameters alone, and they are none.

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
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((5, 2))))
      >>> tx = js.transforms.group_lasso(groups.prunable, strength=0.1)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> grads, state = tx.update(zeros, tx.init(params), params)
      >>> [round(x, 3) for x in grads["up"][:, 0].tolist()]   # 0.1 * sqrt(2) * w / 5
      [0.085, 0.113]
      >>> grads["up"][:, 1].tolist()
      [0.0, 0.0]
    """
    slices = sl.slices_of(groups, roles=roles)
    check_strength(strength)

    def penalty(step: Array, params: PyTree) -> dict[str, Array]:
        counts = sl.entry_counts(slices, params)
        result = {}
        for name, squared in sl.squared_norms(slices, params).items():
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
    roles: Collection[str] = sl.PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Adds a decay that is stronger for weaker indices (DepGraph's sparse training).

    `g <- g + strength * gamma_c * w_c`, `gamma_c = ratio^((max - I_c) / (max - min))`
    with `I_c = ||w_c||_2` and the largest and least of it in the group (for a batched
    group, in the copy): 1 for the strongest index, `ratio` for the weakest. gamma is
    taken as constant. Fang et al. (2023, DepGraph, arXiv:2301.12900).

    It stands before the optimizer, like `group_lasso`; see there.

    Differs from Torch-Pruning's `GroupNormPruner`, which takes all members: here by
    default those that make the channel. Give `roles=("input", "output", "batch",
    "other")` for all. Equal norms give gamma = 1 instead of NaN.

    Args:
      groups: groups by name, all prunable.
      strength: a number, or a schedule step -> number.
      ratio: how much stronger the weakest index is pulled than the strongest, 2^4 in
        the paper.
      roles: as for `group_lasso`.

    Returns:
      A gradient transformation. Its state is a `PenaltyState`.

    Raises:
      ValueError: a negative strength, a ratio below 1, and as `group_lasso`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[4.0, 2.0, 3.0]]), "down": jnp.ones((3, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((5, 1))))
      >>> tx = js.transforms.group_norm_decay(groups.prunable, strength=1.0)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> grads, _ = tx.update(zeros, tx.init(params), params)
      >>> grads["up"].tolist()
      [[4.0, 32.0, 12.0]]
    """
    slices = sl.slices_of(groups, roles=roles)
    check_strength(strength)
    if not ratio >= 1:
        raise ValueError(f"{ratio=} must be at least 1; DepGraph takes 2^4.")

    def penalty(step: Array, params: PyTree) -> dict[str, Array]:
        result = {}
        for name, squared in sl.squared_norms(slices, params).items():
            weight = jnp.asarray(evaluate(strength, step), squared.dtype)
            base = jnp.asarray(ratio, squared.dtype)
            result[name] = weight * base ** _weakness(jnp.sqrt(squared))
        return result

    return _decay(slices, penalty)


def growing_regularization(
    groups: Mapping[str, Group],
    *,
    increment: float,
    every: int | Cadence,
    init: float = 0.0,
    limit: float = float("inf"),
    roles: Collection[str] = sl.PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Adds a decay per index that keeps growing, faster for weaker indices.

    `g <- g + reg_c * w_c`; when `every` says yes, first `reg_c <- min(reg_c + increment
    * (max - I_c) / (max - min), limit)`, `I_c = ||w_c||_2` and the largest and least of
    it in the group (for a batched group, in the copy). The strongest index is never
    pulled harder. Neural pruning via growing regularization: Wang et al. (2021,
    arXiv:2012.09243), in the form of DepGraph (Fang et al. 2023, arXiv:2301.12900).

    It stands before the optimizer, like `group_lasso`; see there.

    Differs from Wang et al., who choose the filters first and let one penalty of those
    grow (GReg-1), or let the penalty of all grow alike and choose by the norms that
    result (GReg-2), and from Torch-Pruning's `GrowingRegPruner`, which is told by hand
    when to grow, takes all members and has no limit.

    Args:
      groups: groups by name, all prunable.
      increment: by how much the weakest index's penalty grows each time.
      every: when penalties grow: a number of steps, or a cadence of
        `jaxsparse.schedules`.
      init: the penalty of all indices at the start.
      limit: no penalty grows beyond it; 1 in the paper.
      roles: as for `group_lasso`.

    Returns:
      A gradient transformation. Its state is a `GrowingRegularizationState`.

    Raises:
      ValueError: a negative number, a limit below `init`, and as `group_lasso`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[4.0, 2.0, 3.0]]), "down": jnp.ones((3, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((5, 1))))
      >>> tx = js.transforms.growing_regularization(
      ...     groups.prunable, increment=0.5, every=10)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> grads, state = tx.update(zeros, tx.init(params), params)
      >>> grads["up"].tolist()
      [[0.0, 1.0, 0.75]]
    """
    slices = sl.slices_of(groups, roles=roles)
    cadence = as_cadence(every)
    for name, value in (("increment", increment), ("init", init), ("limit", limit)):
        check_strength(value, name=name)
    if limit < init:
        raise ValueError(f"{limit=} is below {init=}: penalties could not grow.")

    def init_fn(params: PyTree) -> GrowingRegularizationState:
        sl.check_params(slices, params)
        start = {
            name: jnp.full(s.shape, init, jnp.float32) for name, s in slices.items()
        }
        return GrowingRegularizationState(jnp.zeros((), jnp.int32), start)

    def grow(strengths: dict[str, Array], params: PyTree) -> dict[str, Array]:
        squared = sl.squared_norms(slices, params)
        grown = lambda now, s: jnp.minimum(
            now + increment * _weakness(jnp.sqrt(s)).astype(now.dtype), limit
        )
        return {name: grown(strengths[name], s) for name, s in squared.items()}

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        due = jnp.asarray(cadence(state.step), bool)
        strengths = when(due, grow, state.strengths, params)
        step = jnp.asarray(optax.safe_increment(state.step))
        added = add_scaled(updates, params, slices, strengths)
        return added, GrowingRegularizationState(step, strengths)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def prox_group_lasso(
    groups: Mapping[str, Group],
    *,
    strength: Any,
    roles: Collection[str] = sl.PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """The proximal step of the group lasso: whole indices become exactly zero.

    `params + u' = v * max(0, 1 - strength * sqrt(n_c) / ||v_c||)` with `v = params +
    u`, which minimises `1/2 ||x - v||^2 + strength * sum_c sqrt(n_c) * ||x_c||`; w_c
    and n_c as for `group_lasso`. After `optax.apply_updates` an index below the
    threshold is exactly 0.0 in all its slices; it comes back if the gradient pulls it
    beyond.

    It stands LAST, where it sees the finished update. `strength` is the threshold
    itself: the step's learning rate times the penalty's weight::

        tx = optax.chain(optax.sgd(rate),
                         js.transforms.prox_group_lasso(groups, strength=rate * 1e-3))

    With a learning rate schedule let `strength` be one too, `lambda step: weight *
    rate(step)`. After an optimizer with its own scale for each weight (Adam) it is no
    longer the proximal step of that metric, but the usual decoupled one.

    Slices have to be disjoint, or one has to lie in the other: heads and the entries of
    heads. Then one step after the other, the smaller slices first, is the step of the
    sum of both penalties (Jenatton et al. 2011, arXiv:1009.2139). Slices of consumers
    (role "input") cross those of the next layer's producers: an error.

    `js.structured.zero_indices(params, groups)` finds what has become zero.

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
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((5, 2))))
      >>> tx = optax.chain(optax.sgd(0.1), js.transforms.prox_group_lasso(
      ...     groups.prunable, strength=0.5**0.5))
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(zeros, tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)["up"]
      >>> [round(x, 3) for x in moved.ravel().tolist()]
      [2.4, 0.0, 3.2, 0.0]
    """
    slices = sl.slices_of(groups, roles=roles)
    check_strength(strength)

    def init_fn(params: PyTree) -> PenaltyState:
        sl.check_params(slices, params)
        sl.nesting(slices, params)
        return PenaltyState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        counts = sl.entry_counts(slices, params)
        moved = moved_leaves(slices, updates, params)
        factors: dict[str, Array] = {}
        for name in sl.nesting(slices, params):
            one = {name: slices[name]}
            now = {p: moved[p] for p in sl.paths_of(one) if p in moved}
            now = {p: v * factors[p] if p in factors else v for p, v in now.items()}
            norm = jnp.sqrt(sl.sums(one, {p: v * v for p, v in now.items()})[name])
            weight = jnp.asarray(evaluate(strength, state.step), norm.dtype)
            threshold = weight * jnp.asarray(np.sqrt(counts[name]), norm.dtype)
            shrunk = soft_threshold(norm, threshold)
            for path, factor in sl.factors_of(one, {name: shrunk}, now).items():
                before = factors.get(path)
                factors[path] = factor if before is None else before * factor
        step = jnp.asarray(optax.safe_increment(state.step))
        return sl.scaled_updates(updates, params, factors), PenaltyState(step)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def soft_threshold(norm: Array, threshold: Array) -> Array:
    """`max(0, 1 - threshold / norm)`, and 1 where nothing is taken away."""
    above = norm > threshold
    safe = jnp.where(above, norm, jnp.ones_like(norm))
    shrunk = jnp.where(above, 1 - threshold / safe, jnp.zeros_like(norm))
    return jnp.where(threshold > 0, shrunk, jnp.ones_like(norm))


def moved_leaves(
    slices: Mapping[str, sl.Slices], updates: PyTree, params: PyTree
) -> dict[str, Array]:
    """`params + updates` where slices lie, by path, in float32 at least."""
    steps = sl.wide_leaves(slices, updates)
    held = sl.wide_leaves(slices, params)
    return {p: w + steps[p].astype(w.dtype) for p, w in held.items()}


def add_scaled(
    updates: PyTree,
    params: PyTree,
    slices: Mapping[str, sl.Slices],
    vectors: Mapping[str, Array],
) -> PyTree:
    """`updates + factor * params`, with a factor for each index of each group.

    Args:
      updates: gradients.
      params: the parameters.
      slices: of the groups.
      vectors: `[*copies, size]` by the groups' names; those of groups that share an
        entry add up.

    Returns:
      A tree like `updates`, with its dtypes. Where the factor is 0 the same bits.
    """
    leaves = dict(leaves_with_paths(params))
    ndims = {path: np.ndim(x) for path, x in leaves.items()}
    factors = sl.spread(slices, vectors, ndims, combine=jnp.add, fill=0.0)

    def one(path: str, u: Array) -> Array:
        if path not in factors:
            return u
        return sharded_like(add, [u], leaves[path], factors[path])[0]

    def add(us: list[Array], w: Array, factor: Array) -> list[Array]:
        wide, kind = sl.widen(w), us[0].dtype
        step = us[0].astype(wide.dtype) + factor.astype(wide.dtype) * wide
        return [jnp.where(factor == 0, us[0], step.astype(kind))]

    return map_with_path(one, updates)


def check_strength(strength: Any, *, name: str = "strength") -> None:
    """Raises unless it is a schedule or a number of at least 0.

    Args:
      strength: what the caller passed.
      name: the argument's name.

    Raises:
      TypeError: neither a number nor callable.
      ValueError: negative or NaN.
    """
    if callable(strength) or not _checks.is_concrete(strength):
        return
    try:
        value = float(strength)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: a number or a schedule step -> number; got {strength!r}."
        ) from None
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}.")


def _decay(slices: Mapping[str, sl.Slices], penalty: Any) -> Any:
    """A transformation that adds `penalty(step, params)` times the slices."""

    def init_fn(params: PyTree) -> PenaltyState:
        sl.check_params(slices, params)
        return PenaltyState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        vectors = penalty(state.step, params)
        step = jnp.asarray(optax.safe_increment(state.step))
        return add_scaled(updates, params, slices, vectors), PenaltyState(step)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weakness(norms: Array) -> Array:
    """`(max - I) / (max - min)` along the last axis, 0 where all are equal."""
    most = jnp.max(norms, axis=-1, keepdims=True)
    spread = most - jnp.min(norms, axis=-1, keepdims=True)
    safe = jnp.where(spread > 0, spread, jnp.ones_like(spread))
    return jnp.where(spread > 0, (most - norms) / safe, jnp.zeros_like(norms))
