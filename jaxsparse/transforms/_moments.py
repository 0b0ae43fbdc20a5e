"""Moment hygiene: what an optimizer remembers of coordinates whose mask changed.

A leaf of an optimizer state belongs to a parameter when its key path ends in the
parameter's and their shapes fit. That holds in chains, partitions, `optax.masked` and
`MultiSteps`. It leaves out factored moments (Adafactor, SM3) and histories (L-BFGS),
which mix coordinates or steps.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._typing import Array, PyTree
from jaxsparse.transforms._state import PruneScheduleState

# Fields in which optax's states keep running means of squared gradients.
_SECOND_MOMENTS = frozenset({"nu", "nu_max", "v", "sum_of_squares"})


def reset_moments(
    opt_state: PyTree, grads: PyTree, masks: PyTree, regrew: Array
) -> PyTree:
    """Clears the memory of pruned coordinates, and starts that of those that came back.

    Pruned coordinates get zeros. One that comes back starts with first moment 0 and
    second moment `g^2`: with both at 0, and a bias correction that has long faded,
    Adam's next steps would reach 6.5 times the learning rate; so they stay below it.

    It is applied before the optimizer's update, and is a select on numbers which that
    reads anyway. A coordinate that came back is told by its second moment, exactly 0
    until now. (A kept weight that never had a gradient looks the same, and starts in
    the same way, in a step that brings others back.)
    """
    gradients = jax.tree_util.tree_leaves_with_path(grads)
    owners = {
        path: (grad, mask)
        for (path, grad), mask in zip(gradients, jax.tree.leaves(masks), strict=True)
        if jnp.ndim(mask) > 0
    }
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda x: isinstance(x, PruneScheduleState)
    )
    return jax.tree.unflatten(
        treedef, [_reset_one(path, leaf, owners, regrew) for path, leaf in leaves]
    )


def _reset_one(path: tuple, leaf: Any, owners: dict, regrew: Array) -> Any:
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    for start in range(len(path) + 1):
        if path[start:] not in owners:
            continue
        grad, mask = owners[path[start:]]
        if leaf.shape != grad.shape:
            return leaf
        kept = jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))
        field = getattr(path[start - 1], "name", None) if start else None
        if field not in _SECOND_MOMENTS:
            return kept
        fresh = regrew & mask & (leaf == 0)
        return jnp.where(fresh, jnp.square(grad).astype(leaf.dtype), kept)
    return leaf
