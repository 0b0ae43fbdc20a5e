"""Parameters that must be those that a trace was made with."""

from typing import Any

import jax

from jaxsparse._typing import PyTree
from jaxsparse.tracing._trace import Trace


def checked_leaves(trace: Trace, params: PyTree) -> list[Any]:
    """The leaves of parameters that have the traced structure and shapes."""
    leaves, treedef = jax.tree.flatten(params)
    check_structure(trace, treedef)
    for path, x, dims in zip(trace.paths, leaves, trace.dims.values(), strict=True):
        shape = tuple(d.size for d in dims)
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{path}: traced with shape {shape}, got {tuple(x.shape)}. Give the "
                "parameters of the model with all its channels."
            )
    return leaves


def check_structure(trace: Trace, treedef: Any) -> None:
    """Raises a ValueError for another structure than the traced one."""
    if treedef != trace.treedef:
        raise ValueError(
            "params have another structure than those that were traced: got "
            f"{treedef}, expected {trace.treedef}."
        )
