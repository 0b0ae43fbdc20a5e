"""`enforce`: the wrapper that can keep the whole promise."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _checks
from jaxsparse._loops import when
from jaxsparse._typing import Array, PyTree
from jaxsparse.transforms._mfac import forget_pruned, hide_pruned
from jaxsparse.transforms._moments import reset_moments
from jaxsparse.transforms._order import check_sees_gradients
from jaxsparse.transforms._project import add_change, project
from jaxsparse.transforms._state import (
    NO_STATE,
    NOT_A_STATE,
    PruneScheduleState,
    find_states,
    masks_like,
    put_states,
)

Look = Callable[..., list[PruneScheduleState]]
"""The pruning states after a step, of the arguments of its update."""


def enforce(
    tx: optax.GradientTransformation, *, skip_updates: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Keep what `prune_schedule` pruned at exactly zero, whatever the optimizer does.

    After `optax.apply_updates` every pruned coordinate is exactly 0.0: the final update
    is projected onto the masks in the parameter's dtype, `u <- u where mask, else -w`.
    So momentum, weight decay and noise cannot bring a weight back. The optimizer's
    moments of weights that were pruned or came back are reset (a weight that comes back
    starts at 0 with first moment 0 and second moment `g^2`).

    The state is that of `tx` itself. The training loop, flax's `TrainState` and
    `nnx.Optimizer` stay as they are.

    It has to be the outermost transformation that changes parameters. A wrapper outside
    of it that averages them (`optax.ema` of updates, `optax.lookahead`,
    `optax.contrib.schedule_free`, an average kept by hand) mixes steps with different
    masks and breaks the zeros: apply the masks to the average,
    `js.patterns.apply(average, js.masks_of(opt_state))`. Around or inside it,
    `optax.MultiSteps`, `apply_if_finite`, `masked`, `partition` and
    `inject_hyperparams` keep them.

    Args:
      tx: a transformation with `prune_schedule` somewhere inside, first in its chain,
        where it sees raw gradients.
      skip_updates: whether the optimizer rests in the steps that choose masks, as RigL
        has it: kept weights stay what they are, and so does its memory of them. Its
        counters go on, so that learning rates stay in step.

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
    _checks.check_transformation(tx=tx)
    return _enforced(tx, _look_at(tx), skip_updates)


def enforce_chain(
    schedule: optax.GradientTransformationExtraArgs,
    tx: optax.GradientTransformation,
    skip_updates: bool,
) -> optax.GradientTransformationExtraArgs:
    """`enforce(optax.chain(schedule, tx))`, in which an update runs `tx` once."""
    _checks.check_transformation(tx=tx)
    chain = optax.chain(schedule, tx)
    look_at_all = _look_at(chain)

    def look(updates, state, params, **extra_args):
        own, rest = state
        if find_states(rest):
            return look_at_all(updates, state, params, **extra_args)
        return [schedule.update(updates, own, params, **extra_args)[1]]

    return _enforced(chain, look, skip_updates)


def _look_at(tx: optax.GradientTransformation) -> Look:
    """Runs all of an optimizer.

    Only that knows which gradients the schedules inside of it see, and in which steps.
    What else it does is dead code that jit drops.
    """
    inner = optax.with_extra_args_support(tx)

    def look(updates, state, params, **extra_args):
        return find_states(inner.update(updates, state, params, **extra_args)[1])

    return look


def _enforced(
    tx: optax.GradientTransformation, look: Look, skip_updates: bool
) -> optax.GradientTransformationExtraArgs:
    """`enforce`, with a way to the masks of a step."""
    _checks.check_bool(skip_updates=skip_updates)
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: PyTree) -> optax.OptState:
        state = inner.init(params)
        if not find_states(state):
            raise ValueError(f"enforce: nothing to enforce. {NO_STATE}")
        check_sees_gradients(state)
        return state

    def update_fn(updates, state, params=None, **extra_args):
        _checks.check_has_params(params)
        if not find_states(state):
            found = f"a {type(state).__name__} without masks"
            raise TypeError(NOT_A_STATE.format(found))
        # With the masks of this step in place the optimizer's memory is put in order
        # before it is used: afterwards would cost a copy of all moments in every step.
        chosen = look(updates, state, params, **extra_args)
        held = put_states(state, [s._replace(updated=None) for s in chosen])
        masks = masks_like(params, held)
        regrew = functools.reduce(jnp.logical_or, [s.regrew for s in chosen])
        held = reset_moments(held, updates, masks, regrew)
        updated = [jnp.asarray(s.updated, bool) for s in chosen]
        changed = functools.reduce(jnp.logical_or, updated)
        held = forget_pruned(held, masks, changed)
        shown = hide_pruned(params, masks, held)
        move = lambda *given: inner.update(*given, **extra_args)
        if skip_updates:
            updates, state = _move_unless(changed, move, updates, held, shown)
        else:
            updates, state = move(updates, held, shown)
        updates = add_change(updates, chosen)
        return project(updates, masks, params), put_states(state, chosen)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _move_unless(
    resting: Array, move: Callable, grads: PyTree, held: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """The optimizer's step; where it rests, none, and its memory as it was.

    Counters go on all the same. (A select in place of `when` would hold the old and the
    new moments at once, which copies them in every step.)
    """
    moved = jax.eval_shape(move, grads, held, params)[0]
    wider = lambda g, u: g.astype(jnp.promote_types(g.dtype, u.dtype))
    wide = jax.tree.map(wider, grads, moved)

    def move_on(carry: Any, params: PyTree) -> Any:
        given = jax.tree.map(lambda w, g: w.astype(g.dtype), carry[0], grads)
        found = move(given, carry[1], params)
        return jax.tree.map(_as, found, carry)

    updates, state = when(~resting, move_on, (wide, held), params)
    counted = move(grads, held, params)[1]
    one = lambda new, s: s if jnp.issubdtype(s.dtype, jnp.inexact) else new
    stopped = lambda u, m: jnp.where(resting, 0, u).astype(m.dtype)
    return jax.tree.map(stopped, updates, moved), jax.tree.map(one, counted, state)


def _as(x: Array, like: Array) -> Array:
    return x if x.dtype == like.dtype else x.astype(like.dtype)
