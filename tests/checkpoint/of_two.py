"""What two processes do with parameters that both have a part of; see `one_of_two.py`.

The results are those of one process, with the same numbers.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse._host import on_host

RNG = np.random.default_rng(1)
draw = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
HOST = {"a": draw(8, 16), "b": draw(16, 4), "bias": draw(16)}
SPECS = {"a": P(None, "d"), "b": P("d"), "bias": P("d")}
BATCHES = [draw(12, 8), draw(12, 8)]


def apply_fn(p, x):
    return jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["b"]


def solver(w, gram, sparsity, *, pattern):
    """Compiles quickly: half of what magnitude leaves."""
    axes = js.Axes(input=(1,), output=(0,))
    mask = js.patterns.masks({"w": abs(w)}, sparsity, pattern=pattern, axes=axes)["w"]
    error, none = gram[0, 0], jnp.zeros(())
    info = js.solvers.SolveInfo(
        error, error, none, none.astype(jnp.int32), jnp.array(False)
    )
    return js.solvers.Solved(jnp.where(mask, 0.5 * w, 0).astype(w.dtype), mask, info)


def spread(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    put = lambda x, spec: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, spec), lambda index: x[index]
    )
    return {name: put(x, SPECS[name]) for name, x in HOST.items()}


def same(got, expected, **near):
    """Equal, or with a relative distance near."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        compare = np.testing.assert_allclose if near else np.testing.assert_array_equal
        compare(on_host(x), np.asarray(y), **near)


def layerwise(directory):
    run = lambda params, **settings: js.oneshot.layerwise(
        apply_fn, params, BATCHES, sparsity=0.5, solver=solver, show=False, **settings
    )
    params, expected = spread(AxisType.Auto), run(HOST)
    for _ in range(2):  # and gone on with
        found = run(params, directory=directory)
        same(found.masks, expected.masks)
        same(found.params, expected.params)
        for path, info in found.info.items():
            same(info[:1], expected.info[path][:1], rtol=1e-5)
        for name, w in found.params.items():
            assert w.sharding.is_equivalent_to(params[name].sharding, w.ndim)
    masked = jax.jit(js.patterns.apply)(params, found.masks)
    same(masked, js.patterns.apply(HOST, expected.masks))
    with pytest.raises(ValueError, match="a checkpoint of another run"):
        js.oneshot.layerwise(
            apply_fn, params, BATCHES, sparsity=0.25, solver=solver, directory=directory
        )


def structured(kind):
    params = spread(kind)
    trace = js.trace(apply_fn, HOST, BATCHES[0])
    groups = js.coupling.groups(trace)
    score = lambda p: js.channels.lamp(
        js.channels.channel_scores(groups, js.scores.magnitude(p))
    )
    scores, expected = score(params), score(HOST)
    same(scores, expected, rtol=1e-6)
    drop = js.channels.drop_lowest(groups, scores, 0.5)
    same(drop.indices, js.channels.drop_lowest(groups, expected, 0.5).indices)
    small, whole = (js.narrowing.narrow(trace, p, drop) for p in (params, HOST))
    same(small.params, whole.params)
    assert not small.params["a"].is_fully_addressable
    if kind == AxisType.Explicit:  # the rest is the same
        return small.params, whole.params
    same(
        js.narrowing.widen(trace, small.params, drop),
        js.narrowing.widen(trace, whole.params, drop),
    )
    state = js.narrowing.narrow_like(trace, {"m": params}, drop)
    same(state["m"], whole.params)
    gone = js.narrowing.drop_masks(trace, drop)
    empty = js.channels.zero_indices(js.patterns.apply(params, gone), groups.prunable)
    same(empty.indices, drop.indices)
    return small.params, whole.params


def export(directory, params, expected):
    for ending in ("npz", "safetensors"):
        file = directory / f"small.{ending}"
        js.checkpoint.export(file, params)
        same(js.checkpoint.load_export(file).params, expected)
    multihost_utils.sync_global_devices("read")
    # One that the first process cannot write is an error in both.
    with pytest.raises(OSError, match=r"could not be exported|The first process fai"):
        js.checkpoint.export(directory / "none" / "small.npz", params)


def main(directory):
    directory = pathlib.Path(directory)
    layerwise(directory / "layerwise")
    structured(AxisType.Explicit)
    export(directory, *structured(AxisType.Auto))
    refused(directory)


def refused(directory):
    """What the first process may not do is an error in both."""
    lock = directory / "layerwise" / ".lock"
    if jax.process_index() == 0:
        lock.write_text("{}")
    multihost_utils.sync_global_devices("locked")
    with pytest.raises(OSError, match=r"another run saves|The first process failed"):
        js.checkpoint.save(directory / "layerwise", step=9, params=HOST)
