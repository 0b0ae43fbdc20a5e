"""`keep_sparse`: masks held by the last member of a chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _checks, patterns
from jaxsparse._typing import PyTree
from jaxsparse.transforms._project import project
from jaxsparse.transforms._prune_schedule import PruneSchedule
from jaxsparse.transforms._state import PruneScheduleState, check_state
from jaxsparse.tree import like


def keep_sparse(masks: PyTree | PruneSchedule) -> optax.GradientTransformationExtraArgs:
    """Hold pruned weights at exactly zero, as the LAST member of a chain.

    `u <- u where mask, else -w`. Use it for fixed masks (fine-tuning a pruned model),
    or for masks chosen on a schedule by a score that needs no gradients. It sees the
    finished update, so zeros stay exact under every optimizer. It does not see raw
    gradients: the gradients of pruned weights still enter clipping norms and the
    optimizer's statistics, and its moments are not reset. `enforce` hides these
    gradients and resets the moments.

    Args:
      masks: a tree of bools with the structure of the parameters, or with leaves at the
        same paths; or what `prune_schedule` returned.

    Returns:
      A gradient transformation. Its state is a `PruneScheduleState`.

    Raises:
      ValueError: at `init`, for masks of another model and for a score that needs
        gradients; at `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> params, masks = js.prune({"w": jnp.array([[3.0, 1.0]])}, 0.5)
      >>> tx = optax.chain(optax.sgd(0.1), js.keep_sparse(masks))
      >>> updates, state = tx.update({"w": jnp.ones((1, 2))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([[2.9, 0. ]], dtype=float32)}
    """
    if not isinstance(masks, PruneSchedule):
        _checks.check_bools(masks)
    inner: Any = masks if isinstance(masks, PruneSchedule) else _fixed(masks)

    def init_fn(params: PyTree) -> Any:
        _checks.check_arrays(abstract=True, params=params)
        state = inner.init(params)
        # A score that needs gradients says so here and not in the first step.
        jax.eval_shape(lambda p: inner.update(None, state, p), params)
        return state

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _checks.check_has_params(params)
        check_state(state)
        _checks.check_like(params, updates=updates)
        _, state = inner.update(None, state, params)
        return project(updates, state.masks, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fixed(masks: PyTree) -> optax.GradientTransformationExtraArgs:
    """A pruning transformation that never changes its masks."""

    def init_fn(params: PyTree) -> Any:
        if jax.tree.leaves(params):
            fits = like(masks, params, name="masks")
            patterns.check_masks(fits, params)
            # Copies: a step that donates its state must not take the caller's masks.
            held = jax.tree.map(lambda m: jnp.array(m, copy=True), fits)
        else:  # optax's placeholder
            held = params
        return PruneScheduleState(
            step=jnp.zeros((), jnp.int32),
            masks=held,
            score_state=(),
            updated=jnp.zeros((), bool),
            regrew=jnp.zeros((), bool),
            leaked=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return updates, state._replace(step=optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
