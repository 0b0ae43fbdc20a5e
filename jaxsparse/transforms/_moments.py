"""Moment hygiene: what an optimizer remembers of coordinates whose mask changed."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._typing import Array, PyTree
from jaxsparse.transforms._loops import when
from jaxsparse.transforms._state import PruneScheduleState

# Fields in which optax's states keep running means of squared gradients.
_SECOND_MOMENTS = frozenset({"nu", "nu_max", "v", "sum_of_squares"})


def reset_moments(
    opt_state: PyTree,
    params: PyTree,
    grads: PyTree,
    masks: PyTree,
    *,
    updated: Array,
    regrown: PyTree,
) -> PyTree:
    """Clears the memory of coordinates that were pruned or came back.

    Pruned coordinates get zeros. A coordinate that comes back gets first moment 0 and
    second moment `g^2`: with both at 0, and a bias correction that has long faded,
    Adam's next steps would reach 6.5 times the learning rate; so they stay below it.

    A leaf of the state belongs to a parameter when its key path ends in the
    parameter's and it has the parameter's shape. That holds in chains, partitions,
    `optax.masked`, `MultiSteps`, and leaves out factored moments (Adafactor, SM3) and
    histories (L-BFGS), which mix coordinates.

    Args:
      opt_state: the state after the optimizer's update.
      params: the parameters.
      grads: the raw gradients of this step.
      masks: a tree of bools, True = kept; scalar where nothing is pruned.
      updated: whether masks changed in this step; if not, nothing is read or written.
      regrown: a tree of bools, the coordinates that came back.

    Returns:
      A state like `opt_state`.
    """
    owners = _owners(params, grads, masks, regrown)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda x: isinstance(x, PruneScheduleState)
    )
    values = [leaf for _, leaf in leaves]
    matched = {
        i: match
        for i, (path, leaf) in enumerate(leaves)
        if (match := _owner_of(path, leaf, owners)) is not None
    }
    if not matched:
        return opt_state

    def reset(moments: list[Array]) -> list[Array]:
        return [
            _reset_one(moment, *match)
            for moment, match in zip(moments, matched.values(), strict=True)
        ]

    fresh = when(updated, reset, [values[i] for i in matched])
    for i, moment in zip(matched, fresh, strict=True):
        values[i] = moment
    return jax.tree.unflatten(treedef, values)


def _owners(*trees: PyTree) -> dict[tuple, tuple[Array, ...]]:
    """(param, grad, mask, regrown) by key path, where a parameter is pruned."""
    with_paths = jax.tree_util.tree_leaves_with_path(trees[0])
    rest = [jax.tree.leaves(t) for t in trees[1:]]
    return {
        path: (w, *others)
        for (path, w), *others in zip(with_paths, *rest, strict=True)
        if jnp.ndim(others[1]) > 0
    }


def _owner_of(
    path: tuple, leaf: Any, owners
) -> tuple[Array, Array, Array, bool] | None:
    """The gradient, mask and regrown coordinates that a state's leaf goes with."""
    if isinstance(leaf, PruneScheduleState) or not hasattr(leaf, "dtype"):
        return None
    for start in range(len(path) + 1):
        if path[start:] not in owners:
            continue
        w, grad, mask, regrown = owners[path[start:]]
        if leaf.shape != w.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return None
        field = getattr(path[start - 1], "name", None) if start else None
        return grad, mask, regrown, field in _SECOND_MOMENTS
    return None


def _reset_one(
    moment: Array, grad: Array, mask: Array, regrown: Array, second: bool
) -> Array:
    start = jnp.square(grad).astype(moment.dtype) if second else jnp.zeros_like(moment)
    kept = jnp.where(mask, moment, jnp.zeros((), moment.dtype))
    return jnp.where(regrown, start, kept)
