"""HESSO: the weakest indices are shrunk to zero, period by period, while training."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._loops import when
from jaxsparse._typing import Array, PyTree
from jaxsparse.channels.scaling import factors_of, map_at, scaled_updates, spread
from jaxsparse.channels.slices import (
    PRODUCERS,
    Slices,
    check_params,
    dtype_of,
    slices_of,
)
from jaxsparse.coupling import Group
from jaxsparse.coupling.drop import Drop, drop_of
from jaxsparse.penalties.saliency import Criteria, lowest, removed_by, saliency
from jaxsparse.tree import leaves_with_paths, unwrap_variables


class HessoState(NamedTuple):
    """The state of `hesso`.

    Attributes:
      step: the number of updates made, int32.
      shrinking: bools `[*copies, size]` by the groups' names, True for channels chosen
        in this period.
      zero: the same, True for channels that are held at zero.
      inner: the optimizer's state.
    """

    step: Array
    shrinking: dict[str, Array]
    zero: dict[str, Array]
    inner: Any


def hesso(
    optimizer: optax.GradientTransformation,
    groups: Mapping[str, Group],
    *,
    sparsity: float,
    begin: int,
    periods: int,
    duration: int,
    criteria: Criteria = Criteria(),  # noqa: B008  (a NamedTuple of numbers)
    scores: Mapping[str, Any] | None = None,
    roles: Collection[str] = PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Prune channels within one training: choose, shrink, hold at zero (HESSO).

    From `begin` on there are `periods` of `duration` steps each. The first step of a
    period chooses the channels of lowest saliency over all groups, the same number in
    each period. After each of the optimizer's steps t = 0 ... duration - 1 their slices
    are multiplied by `(duration - t - 1) / (duration - t)`, so they shrink linearly to
    exactly 0.0 in the period's last step. Then they are held at 0.0, and their
    gradients are hidden from the optimizer. Chen et al. (2024, OTO's hybrid efficient
    structured sparse optimizer, arXiv:2409.09085).

    It stands around the whole optimizer, since it reads raw gradients and has the last
    word::

        tx = js.penalties.hesso(optax.adam(1e-3), groups.prunable, sparsity=0.5,
                                 begin=1_000, periods=5, duration=200)
        ...                                        # train
        drop = js.penalties.dropped(opt_state)    # for js.narrowing.narrow

    Saliency is a weighted sum of `Criteria`. By default x are the slices of the
    producers (outputs of kernels, the biases and scales along them), as in OTO's
    zero-invariant groups: once they are zero the channel has no effect.

    It removes `floor(sparsity * n + 1/2)` channels, where n is the sum of the groups'
    sizes. A batched group (the entries of each head) loses the same number of channels
    in every copy, and they count once; the r-th weakest channels of all copies compete
    together, with their mean saliency. Each group keeps at least one channel.

    Cost: in the first step of a period one pass over parameters and gradients; in
    others one multiply and select a parameter.

    Differs from the reference implementation, whose own Adam starts its first moment at
    g instead of (1 - beta) g: here any optimizer is wrapped. The cosine counts as `1 -
    cos(x, g)`, not `1 + cos(x, g)`: where `x . g > 0` the descent step -g shrinks x,
    and removing x lowers the loss to first order, so that channel is less important
    (the half-space intuition of the same authors). Shrinking starts in the step of the
    choice, not one later. Gradients of zeroed channels are hidden, so they leave
    clipping norms and moments.

    Args:
      optimizer: the whole optimizer, including clipping, weight decay and so on.
      groups: groups by name, all prunable: `js.coupling.groups(trace).prunable`, or a
        dictionary with some of them. Heads and their entries may both be there.
      sparsity: the fraction of all channels to remove.
      begin: the first step of the first period.
      periods: the number of periods.
      duration: the number of steps in each.
      criteria: weights of the saliency's parts.
      scores: fixed scores, `[*copies, size]` by the groups' names, larger = keep, in
        place of the saliency: from `js.contrib.cric`, or any others.
      roles: as for `js.penalties.group_lasso`.

    Returns:
      A gradient transformation. Its state is a `HessoState`.

    Raises:
      ValueError: a sparsity outside [0, 1), or one that would leave a group without any
        index; numbers of steps below 1; groups that are not prunable or without members
        of these roles; scores of other shapes; at `init`, groups of other parameters;
        at `update`, without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[4.0, 1.0, 3.0, 2.0]]), "down": jnp.ones((4, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((5, 1))))
      >>> tx = js.penalties.hesso(optax.sgd(0.1), groups.prunable, sparsity=0.5,
      ...                          begin=0, periods=1, duration=2)
      >>> zeros, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(zeros, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["up"])
      [[4.  0.5 3.  1. ]]
      [[4. 0. 3. 0.]]
      >>> js.penalties.dropped(state).indices
      {'up[1]': array([1, 3], dtype=int32)}
    """
    _checks.check_transformation(optimizer=optimizer)
    slices = slices_of(groups, roles=roles)
    _checks.check_sparsity(sparsity)
    for name, value in (("periods", periods), ("duration", duration)):
        _checks.check_positive_int(value, name=name)
    _checks.check_positive_int(begin, name="begin", least=0)
    removed = removed_by(slices, sparsity, periods)
    fixed = None if scores is None else check_scores(scores, slices)
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> HessoState:
        check_params(slices, params)
        none = lambda: {n: jnp.zeros(s.shape, bool) for n, s in slices.items()}
        return HessoState(jnp.zeros((), jnp.int32), none(), none(), inner.init(params))

    def choose(_: Any, state: HessoState, period: Array, params: PyTree, grads: PyTree):
        scored = fixed or saliency(slices, params, grads, criteria=criteria)
        count = jnp.asarray(removed, jnp.int32)[period]
        chosen = lowest(scored, count, first=state.zero)
        return {name: x & ~state.zero[name] for name, x in chosen.items()}

    def update_fn(updates, state, params=None, **extra_args):
        _checks.check_has_params(params)
        elapsed = state.step - begin
        active = (elapsed >= 0) & (elapsed < periods * duration)
        t = jnp.where(active, elapsed % duration, 0)
        period = jnp.clip(elapsed // duration, 0, periods - 1)
        looked = state._replace(inner=())
        shrinking = when(
            active & (t == 0), choose, state.shrinking, looked, period, params, updates
        )
        grads = _hide(slices, state.zero, updates)
        moved, inner_state = inner.update(grads, state.inner, params, **extra_args)
        left = duration - t.astype(dtype_of(slices, params))
        factor = jnp.where(active, (left - 1) / left, 1.0)
        vectors = {
            name: jnp.where(state.zero[name], 0.0, jnp.where(x, factor, 1.0))
            for name, x in shrinking.items()
        }
        ended = active & (t == duration - 1)
        zero = {name: z | (shrinking[name] & ended) for name, z in state.zero.items()}
        shrinking = {name: x & ~ended for name, x in shrinking.items()}
        moved = scaled_updates(moved, params, factors_of(slices, vectors, params))
        step = jnp.asarray(optax.safe_increment(state.step))
        return moved, HessoState(step, shrinking, zero, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def dropped(opt_state: PyTree) -> Drop:
    """Return the channels that `hesso` has set to zero so far.

    Args:
      opt_state: the state of `hesso`, of any wrapper around it, or of
        `nnx.Optimizer`, with values.

    Returns:
      Pass them to `js.narrowing.narrow`. Groups that lost nothing are left out.

    Raises:
      ValueError: no `HessoState` inside, or several.

    Example: see `hesso`.
    """
    is_state = lambda x: isinstance(x, HessoState)
    leaves = jax.tree.leaves(unwrap_variables(opt_state), is_leaf=is_state)
    states = [x for x in leaves if is_state(x)]
    if len(states) != 1:
        raise ValueError(
            f"Expected one HessoState in this optimizer state, found {len(states)}. "
            "tx = js.penalties.hesso(optimizer, groups, ...) makes one."
        )
    return drop_of(states[0].zero)


def check_scores(
    scores: Mapping[str, Any], slices: Mapping[str, Slices]
) -> dict[str, Array]:
    """Scores in the order of the groups, as arrays of one dtype, float32 at least."""
    found = {}
    dtypes = (jnp.result_type(scores[name]) for name in slices if name in scores)
    wide = wide_dtype(*(x for x in dtypes if jnp.issubdtype(x, jnp.floating)))
    for name, s in slices.items():
        if name not in scores or np.shape(scores[name]) != s.shape:
            got = np.shape(scores[name]) if name in scores else "none"
            raise ValueError(f"scores: {name!r} needs shape {s.shape}, got {got}.")
        found[name] = jnp.asarray(scores[name], wide)
        _checks.check_no_nan({f"scores: {name}": found[name]})
    return found


def _hide(
    slices: Mapping[str, Slices], zero: Mapping[str, Array], grads: PyTree
) -> PyTree:
    """Gradients without those of what is held at zero."""
    ndims = {path: np.ndim(g) for path, g in leaves_with_paths(grads)}
    gone = spread(slices, zero, ndims, combine=jnp.logical_or, fill=False)

    hide = lambda g, out: jnp.where(out, jnp.zeros((), g.dtype), g)
    return map_at(hide, grads, gone)
