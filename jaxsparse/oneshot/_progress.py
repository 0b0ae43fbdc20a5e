"""How far a layer-wise run has come: what its driver and its checkpoints share."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._host import on_host, spread_like
from jaxsparse._typing import Array, PyTree
from jaxsparse.oneshot._results import LayerInfo, Layerwise
from jaxsparse.tracing import Kernel, Trace
from jaxsparse.tree import MatrixView, from_matrices, to_matrices


class RunState(NamedTuple):
    """How far a run has come."""

    stage: int  # how many stages are done
    leaves: dict[str, Any]  # the parameters by path
    masks: dict[str, Any]  # by path, of the kernels that were solved
    info: dict[str, Any]  # by path, flat over each kernel's matrices
    run: dict[str, str] | None = None  # what decides the result, of `fingerprint`


class Solution(NamedTuple):
    """What a solver made of some matrices of one kernel: `[places, d_out, d_in]`."""

    w: Array
    mask: Array
    places: np.ndarray  # which of the kernel's flat batch indices they are
    info: LayerInfo


def put(
    state: RunState, leaves: dict[str, Array], path: str, part: Solution, kernel: Kernel
) -> None:
    """Puts the solved matrices of a kernel in their places."""
    view, (w, mask, places, info) = kernel.view, part
    total = int(np.prod(view.batch)) if view.batch else 1
    sharding = getattr(leaves[path], "sharding", None)
    leaf = _replaced(leaves[path], places, w, view)
    if sharding not in (None, leaf.sharding):
        # Only where it has to be: what is put somewhere stays there, and what is made
        # with it compiles anew.
        leaf = jax.device_put(leaf, sharding)
    leaves[path] = leaf
    if path not in state.masks:
        state.masks[path] = np.ones(view.shape, bool)
        empty = lambda x: np.full(total, np.nan if x.dtype.kind == "f" else 0, x.dtype)
        state.info[path] = _of_arrays(empty, info)._replace(seconds=0.0)
    known = to_matrices(state.masks[path], view)
    flat_mask = np.array(known.reshape(total, *known.shape[-2:]))
    flat_mask[places] = on_host(mask)
    state.masks[path] = np.asarray(from_matrices(flat_mask.reshape(known.shape), view))
    for whole, of_places in zip(state.info[path][:-1], info[:-1], strict=True):
        whole[places] = of_places
    state.info[path] = state.info[path]._replace(
        seconds=state.info[path].seconds + info.seconds
    )


@functools.partial(jax.jit, static_argnames="view")
def _replaced(w: Array, places: np.ndarray, new: Array, view: MatrixView) -> Array:
    """The parameter with some of its matrices replaced."""
    old = to_matrices(w, view)
    flat = old.reshape(-1, *old.shape[-2:])
    return from_matrices(
        flat.at[places].set(new.astype(flat.dtype)).reshape(old.shape), view
    )


def _of_arrays(f: Callable[[np.ndarray], np.ndarray], info: LayerInfo) -> LayerInfo:
    arrays = {k: f(x) for k, x in info._asdict().items() if k != "seconds"}
    return LayerInfo(**arrays, seconds=info.seconds)


def result_of(
    state: RunState,
    params: PyTree,
    before: PyTree,
    traced: Trace,
    kernels: Mapping[str, Kernel],
    left_dense: Mapping[str, str],
) -> Layerwise:
    """What a run that is done returns."""
    leaves, masks = [], []
    given = jax.tree.leaves(params)
    rest = jax.tree.leaves(before) or [jnp.asarray(True)] * len(given)
    for path, leaf, other in zip(traced.paths, given, rest, strict=True):
        leaves.append(state.leaves.get(path, leaf))
        mask, sharding = state.masks.get(path), getattr(leaf, "sharding", None)
        if mask is not None:
            other = jax.device_put(spread_like(mask, leaf), sharding)
        masks.append(other)
    shaped = {
        path: _of_arrays(lambda x, k=kernels[path]: x.reshape(k.view.batch), info)
        for path, info in state.info.items()
    }
    unflatten = functools.partial(jax.tree.unflatten, traced.treedef)
    return Layerwise(unflatten(leaves), unflatten(masks), shaped, left_dense)
