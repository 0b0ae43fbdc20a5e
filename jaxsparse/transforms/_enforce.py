"""`enforce`: the wrapper that can keep the whole promise."""

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from jaxsparse._typing import Array, PyTree
from jaxsparse.transforms._moments import reset_moments
from jaxsparse.transforms._project import project
from jaxsparse.transforms._state import NO_STATE, find_states, masks_like


def enforce(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps what `prune_schedule` pruned at exactly zero, whatever the optimizer does.

    After `optax.apply_updates` every pruned coordinate is exactly 0.0: the final update
    is projected onto the masks in the parameter's dtype, `u <- u where mask, else -w`.
    So momentum, weight decay and noise cannot bring a weight back. And what the
    optimizer remembers of coordinates that were pruned or came back is reset
    (a weight that comes back starts at 0 with first moment 0 and second moment `g^2`).

    The state is that of `tx` itself. The training loop, flax's `TrainState` and
    `nnx.Optimizer` stay as they are.

    It has to be outermost among all that changes parameters. A wrapper outside of it
    that averages them (`optax.ema` of updates, `optax.lookahead`,
    `optax.contrib.schedule_free`, an average kept by hand) mixes steps with different
    masks and breaks the zeros: apply the masks to the average,
    `js.patterns.apply(average, js.masks_of(opt_state))`. Around or inside it,
    `optax.MultiSteps`, `apply_if_finite`, `masked`, `partition` and
    `inject_hyperparams` keep them.

    Args:
      tx: a transformation with `prune_schedule` somewhere inside, first in its chain,
        where it sees raw gradients.

    Returns:
      A transformation with the same state.

    Raises:
      ValueError: at `init`, when `tx` holds no pruning transformation; at `update`,
        without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> prune_schedule = js.prune_schedule(
      ...     js.schedules.polynomial(final=0.5, begin=0, end=2), every=1)
      >>> tx = js.enforce(optax.chain(prune_schedule, optax.adam(0.1)))
      >>> params = {"w": jnp.array([[3.0, -1.0], [2.0, 4.0]])}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"] == 0
      Array([[False,  True],
             [ True, False]], dtype=bool)
    """
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: PyTree) -> optax.OptState:
        state = inner.init(params)
        if not find_states(state):
            raise ValueError(f"enforce: nothing to enforce. {NO_STATE}")
        return state

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        grads = updates
        updates, state = inner.update(grads, state, params, **extra_args)
        masks = masks_like(params, state)
        regrown = jax.tree.map(_came_back(state), masks, params)
        updated = _any([s.updated for s in find_states(state)])
        state = reset_moments(
            state, params, grads, masks, updated=updated, regrown=regrown
        )
        # What came back waits one step at zero, until its moments are its own.
        moving = jax.tree.map(lambda m, r: m & ~r, masks, regrown)
        return project(updates, moving, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _came_back(state: PyTree):
    """Which coordinates came back in this step.

    A pruned weight is exactly 0, so one that is kept and 0 in a step that brought
    weights back is one of them. Comparing with the masks of the step before would need
    a second copy of them in every step.
    """
    regrew = _any([s.updated & s.regrew for s in find_states(state)])

    def one(mask: Array, w: Array) -> Array:
        if jnp.ndim(mask) == 0:
            return jnp.zeros((), bool)
        return mask & (w == 0) & regrew

    return one


def _any(flags: list[Array]) -> Array:
    result = flags[0]
    for flag in flags[1:]:
        result = result | flag
    return result
