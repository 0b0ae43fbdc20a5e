"""How far a layer-wise run has come: what its driver and its checkpoints share."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._bits import Packed
from jaxsparse._host import on_host, spread_like
from jaxsparse._typing import Array, PyTree
from jaxsparse.oneshot._results import LayerInfo, Layerwise
from jaxsparse.tracing import Kernel, Trace
from jaxsparse.tree import MatrixView, from_matrices, to_matrices


class RunState(NamedTuple):
    """How far a run has come."""

    stage: int  # how many stages are done
    leaves: dict[str, Any]  # the parameters by path
    masks: dict[str, Packed]  # by path, of the kernels that were solved
    info: dict[str, Any]  # by path, flat over each kernel's matrices
    run: dict[str, str] | None = None  # what decides the result, of `fingerprint`


def put(
    state: RunState,
    path: str,
    places: np.ndarray,
    mask: Array,
    info: LayerInfo,
    view: MatrixView,
) -> None:
    """Notes the masks and infos of the matrices of a kernel that were solved."""
    total = int(np.prod(view.batch)) if view.batch else 1
    whole = np.ones(view.shape, bool)
    if path in state.masks:
        whole = state.masks[path].bools()
    else:
        empty = lambda x: np.full(total, np.nan if x.dtype.kind == "f" else 0, x.dtype)
        state.info[path] = _of_arrays(empty, info)._replace(seconds=0.0)
    known = to_matrices(whole, view)
    flat_mask = np.array(known.reshape(total, *known.shape[-2:]))
    flat_mask[places] = on_host(mask)
    solved = from_matrices(flat_mask.reshape(known.shape), view)
    state.masks[path] = Packed.of(np.asarray(solved))
    for whole, of_places in zip(state.info[path][:-1], info[:-1], strict=True):
        whole[places] = of_places
    state.info[path] = state.info[path]._replace(
        seconds=state.info[path].seconds + info.seconds
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
    # What is taken is let go, so that no mask is there twice.
    leaves, masks = [], []
    given = jax.tree.leaves(params)
    rest = jax.tree.leaves(before) or [jnp.asarray(True)] * len(given)
    for path, leaf, other in zip(traced.paths, given, rest, strict=True):
        leaves.append(state.leaves.get(path, leaf))
        packed, sharding = state.masks.pop(path, None), getattr(leaf, "sharding", None)
        if packed is not None:
            other = jax.device_put(spread_like(packed.bools(), leaf), sharding)
        masks.append(other)
    shaped = {
        path: _of_arrays(lambda x, k=kernels[path]: x.reshape(k.view.batch), info)
        for path, info in state.info.items()
    }
    unflatten = functools.partial(jax.tree.unflatten, traced.treedef)
    return Layerwise(unflatten(leaves), unflatten(masks), shaped, left_dense)
