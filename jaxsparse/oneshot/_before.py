"""A layer-wise run that goes on from masks: what they remove stays removed."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import patterns
from jaxsparse._typing import Array, PyTree
from jaxsparse.patterns.earlier_masks import may_have_lost_more, most_lost
from jaxsparse.tracing import Kernel
from jaxsparse.tree import leaves_with_paths, to_matrices


def masks_before(
    masks: PyTree,
    params: PyTree,
    kernels: Mapping[str, Kernel],
    wanted: Mapping[str, float | None],
    pattern: patterns.Pattern,
) -> dict[str, Array]:
    """The masks of the kernels that have lost something, of their shapes."""
    leaves = jax.tree.leaves(params)
    found = {}
    for (path, mask), w in zip(leaves_with_paths(masks), leaves, strict=True):
        if path not in kernels or (jnp.ndim(mask) == 0 and bool(mask)):
            continue
        found[path] = jnp.broadcast_to(mask, jnp.shape(w))
        _check_gone(path, found[path], kernels[path], wanted[path], pattern)
    return found


def _check_gone(
    path: str,
    mask: Array,
    kernel: Kernel,
    sparsity: float | None,
    pattern: patterns.Pattern,
) -> None:
    if sparsity is None or may_have_lost_more(sparsity, pattern):
        return
    gone = ~to_matrices(mask, kernel.view)
    lost, most, size = most_lost(gone, sparsity, pattern)
    if lost > most:
        raise ValueError(
            f"{path}: `masks` already remove {lost} of {size} weights that compete "
            f"({pattern}), more than the {most} that a sparsity of {sparsity:g} does. "
            "Ask for more, or leave `masks` out: then weights may come back."
        )


def check_takes_mask(solver: Any) -> None:
    """Raises unless a solver can be told what is gone."""
    parameters = inspect.signature(solver).parameters.values()
    if not any(p.name == "mask" or p.kind == p.VAR_KEYWORD for p in parameters):
        raise TypeError(
            f"With masks= the solver is called with mask=, what was pruned of its "
            f"matrix (True = kept) and has to stay so; {solver!r} has no such "
            "parameter. Those of js.solvers have."
        )
