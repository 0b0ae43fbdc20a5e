"""Holding pruned weights at exactly zero."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _checks, patterns
from jaxsparse._loops import when
from jaxsparse._typing import Array, PyTree, Tree
from jaxsparse.transforms._state import (
    NO_STATE,
    PruneScheduleState,
    find_states,
    masks_like,
)


def project(updates: PyTree, masks: PyTree, params: PyTree) -> PyTree:
    """Updates after which pruned weights are zero: `u <- u where mask, else -w`.

    `w + (-w)` is exactly +0.0 in every floating-point format as long as both have one
    dtype, so the update takes the parameter's. (A NaN or Inf stays what it is: no
    number added to it gives 0.)
    """

    def one(u: Array, mask: Array, w: Array) -> Array:
        if jnp.ndim(mask) == 0:
            return u
        return jnp.where(mask, u.astype(w.dtype), -w)

    return jax.tree.map(one, updates, masks, params)


def add_change(tree: PyTree, states: list[PruneScheduleState]) -> PyTree:
    """Adds what this step's choice of masks changes in the weights that are kept."""
    for state in states:
        if state.change is None:
            continue

        def add(tree: PyTree, change: PyTree) -> PyTree:
            found = dict(jax.tree_util.tree_leaves_with_path(change))
            return jax.tree_util.tree_map_with_path(
                lambda path, x: (
                    (x.astype(found[path].dtype) + found[path]).astype(x.dtype)
                    if path in found
                    else x
                ),
                tree,
            )

        assert state.updated is not None
        tree = when(state.updated, add, tree, state.change)
    return tree


def apply_updates(params: Tree, updates: PyTree, opt_state: PyTree) -> Tree:
    """Apply updates like `optax.apply_updates`, then set pruned weights to zero.

    It completes the literal chain `optax.chain(prune_schedule, optimizer)`, whose first
    member cannot undo what the optimizer adds after it. Under `enforce` it changes
    nothing. NaN and Inf of pruned weights become 0, too.

    Args:
      params: the parameters.
      updates: what `tx.update` returned.
      opt_state: the state that the same call returned.

    Returns:
      The new parameters.

    Raises:
      ValueError: `opt_state` holds no pruning transformation; updates of another
        structure or shape.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = optax.chain(js.prune_schedule(0.5, every=1), optax.sgd(0.1))
      >>> params = {"w": jnp.array([[3.0, 1.0]])}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> js.apply_updates(params, updates, state)
      {'w': Array([[2.7, 0. ]], dtype=float32)}
    """
    if not find_states(opt_state):
        raise ValueError(NO_STATE)
    _checks.check_like(params, updates=updates)
    moved: Any = optax.apply_updates(cast(Any, params), updates)
    moved = add_change(moved, find_states(opt_state))
    return patterns.apply(moved, masks_like(params, opt_state))


def init_sparse(
    tx: optax.GradientTransformation, params: Tree
) -> tuple[Tree, optax.OptState]:
    """Initialize an optimizer state, and mask the parameters from the very start.

    Where the schedule starts sparse (a constant, a mask that was adopted) the state
    holds masks before the first step. A train state keeps the parameters it is given,
    so give it these: with others its first forward pass would be dense.

    Args:
      tx: a transformation with a pruning transformation inside.
      params: the dense parameters.

    Returns:
      The masked parameters and the optimizer state.

    Raises:
      ValueError: `tx` holds no pruning transformation.
      TypeError: `tx` is no transformation, or `params` holds a leaf that is no array
        (perhaps the two are swapped).

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.prune_schedule(0.5, every=1).wrap(optax.sgd(0.1))
      >>> params, opt_state = js.init_sparse(tx, {"w": jnp.array([[3.0, 1.0]])})
      >>> params
      {'w': Array([[3., 0.]], dtype=float32)}
    """
    _checks.check_transformation(tx=tx)
    _checks.check_arrays(params=params)
    opt_state = tx.init(cast(Any, params))
    if not find_states(opt_state):
        raise ValueError(NO_STATE)
    return patterns.apply(params, masks_like(params, opt_state)), opt_state
