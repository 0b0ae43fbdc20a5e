"""Checkpoints of a layer-wise run: killed, it goes on after its last layer."""

import warnings
from typing import Any

import jax
import numpy as np

from jaxsparse._bits import Packed
from jaxsparse._host import on_host
from jaxsparse.oneshot._fingerprint import differences
from jaxsparse.oneshot._progress import RunState
from jaxsparse.oneshot._results import LayerInfo
from jaxsparse.tracing import Trace

_SHOWN = 4
_TYPES = {x: np.dtype(x) for x in ("bool", "int32", "int64", "float32", "float64")}


def save_state(directory: Any, state: RunState, trace: Trace) -> None:
    """Writes a checkpoint of what is done; the one before goes when it is whole."""
    from jaxsparse import checkpoint  # brings orbax

    unflatten = lambda leaves: jax.tree.unflatten(trace.treedef, leaves)
    masks = [state.masks.get(path, np.asarray(True)) for path in trace.paths]
    info = {
        path: [[x.tolist(), x.dtype.name] for x in layer[:-1]] + [layer.seconds]
        for path, layer in state.info.items()
    }
    checkpoint.save(
        directory,
        step=state.stage,
        params=unflatten([state.leaves[path] for path in trace.paths]),
        masks=unflatten(masks),
        extra={
            "layerwise": info,
            "solved": sorted(state.masks),
            "run": state.run,
        },
        keep=1,
    )


def load_state(directory: Any, state: RunState, trace: Trace, stages: Any) -> RunState:
    """What a directory holds of an earlier run, or the state as it is."""
    from jaxsparse import checkpoint

    template = jax.tree.unflatten(
        trace.treedef, [state.leaves[path] for path in trace.paths]
    )
    try:
        restored = checkpoint.restore(directory, params=template)
    except FileNotFoundError:
        return state
    info = restored.extra.get("layerwise")
    if info is not None:
        _check_run(directory, restored.extra.get("run"), state.run)
    done = {u.path for s in stages[: restored.step] for b in s.bundles for u in b.units}
    solved = restored.extra.get("solved")
    if info is None or not isinstance(solved, list) or sorted(done) != solved:
        raise ValueError(
            f"{directory}: a checkpoint of another run: it has solved "
            f"{solved}, this one would have solved "
            f"{sorted(done)} after {restored.step} stages. Give another directory."
        )
    leaves = dict(zip(trace.paths, jax.tree.leaves(restored.params), strict=True))
    every = dict(zip(trace.paths, jax.tree.leaves(restored.masks), strict=True))
    # In one order in all processes, which gather them together.
    masks = {path: Packed.of(on_host(every[path])) for path in solved}
    try:
        layers = {path: _layer(said) for path, said in info.items()}
        if layers.keys() != masks.keys():
            raise ValueError(f"it is of {sorted(layers)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory}: what its checkpoint says of the layers that are solved is "
            f"not what layerwise wrote ({type(error).__name__}: {error}). Give another "
            "directory, or delete this one to begin anew."
        ) from error
    return RunState(restored.step, leaves, masks, layers, state.run)


def _layer(said: Any) -> LayerInfo:
    *arrays, seconds = said
    return LayerInfo._make([
        *(np.array(x, _TYPES[dtype]) for x, dtype in arrays),
        float(seconds),
    ])


def _check_run(
    directory: Any, there: dict[str, str] | None, here: dict[str, str] | None
) -> None:
    if there is None or here is None:
        warnings.warn(
            f"{directory}: its checkpoint is of a version that did not write which "
            "weights, data and settings it is of, so it is not checked whether they "
            "are those of this call. Give another directory if they may differ.",
            stacklevel=4,
        )
        return
    differ = differences(there if isinstance(there, dict) else {}, here)
    if differ:
        shown = "; ".join(differ[:_SHOWN])
        more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise ValueError(
            f"{directory}: a checkpoint of another run, whose result this call would "
            f"return. What differs: {shown}{more}. Give another directory, or delete "
            "this one to begin anew."
        )
