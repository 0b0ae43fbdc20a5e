"""Masks of sharded parameters: those of one device, where the parameter lies.

Each parameter is sharded over 8 devices along a different axis; one compilation selects
in all of them. Neither a gather nor a sort may be in what XLA makes of it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import selection

import jaxsparse as js

dense = js.Axes(input=(0,), output=(1,))
query = js.Axes(input=(0,), output=(1, 2))
stacked = js.Axes(input=(1,), output=(2,), batch=(0,))
LEAVES = {
    "inputs": ((64, 32), P("x", None), None),
    "outputs": ((64, 32), P(None, "x"), None),
    "query_heads": ((32, 8, 16), P(None, "x", None), query),
    "layers": ((8, 16, 64), P("x", None, None), stacked),
    "outputs_of_layers": ((8, 16, 64), P(None, None, "x"), stacked),
}
AXES = {name: axes for name, (_, _, axes) in LEAVES.items() if axes}
EVERYWHERE = [js.Unstructured("global"), js.Unstructured("output"), js.NM(2, 4)]
IN_EACH = [js.Unstructured(), js.Block((4, 2)), js.Balanced((4, 2)), js.Channel()]
UNITS_IN_ALL = [
    js.Block((2, 2), reduce="max", scope="global"),
    js.Channel(axis=0, reduce="max", scope="global"),
]


def patterns(*first, rest):
    """Which units there are and who competes are two things: each pattern is on one of
    the meshes."""
    rest = [pytest.param(p, marks=pytest.mark.exhaustive) for p in rest]
    return pytest.mark.parametrize("pattern", [*first, *rest], ids=repr)


QUICKLY = {"xla_backend_optimization_level": 0}
COLLECTIVES = r"all-gather|all-to-all|collective-permute|\bsort\("


def scores_of(shapes):
    """Multiples of 1/8, many of them equal: sums are exact in whatever order."""
    rng = np.random.default_rng(0)
    return {
        k: (rng.integers(0, 32, size=shape) / 8).astype(np.float32)
        for k, shape in sorted(shapes.items())
    }


@functools.partial(jax.jit, static_argnames="pattern")
def select(scores, pattern):
    sparsity = None if isinstance(pattern, js.NM) else 0.6
    axes = {k: v for k, v in AXES.items() if k in scores}
    return js.patterns.masks(scores, sparsity, pattern=pattern, axes=axes, where=".")


def by_sorting(scores, pattern):
    axes = [AXES.get(k, dense) for k in scores]
    if getattr(pattern, "scope", "layer") == "global":
        full = selection.global_masks(list(scores.values()), 0.6, pattern, axes)
        return dict(zip(scores, full, strict=True))
    sparsity = 0.5 if isinstance(pattern, js.NM) else 0.6
    return {
        k: selection.mask(x, sparsity, pattern, a)
        for (k, x), a in zip(scores.items(), axes, strict=True)
    }


def check(pattern, kind, names):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    scores = scores_of({k: LEAVES[k][0] for k in names})
    shardings = {k: NamedSharding(mesh, LEAVES[k][1]) for k in names}
    sharded = jax.device_put(scores, shardings)
    lowered = select.lower(sharded, pattern)
    compiled = lowered.compile(QUICKLY)
    masks = compiled(sharded)
    for name, expected in by_sorting(scores, pattern).items():
        mask = masks[name]
        full = np.broadcast_to(mask, expected.shape)
        np.testing.assert_array_equal(full, expected, err_msg=name)
        if mask.shape == expected.shape:
            assert mask.sharding.is_equivalent_to(shardings[name], mask.ndim), name
    assert "stablehlo.sort" not in lowered.as_text()
    text = compiled.as_text()
    assert not re.findall(COLLECTIVES, text)
    assert ("all-reduce" in text) == (not isinstance(pattern, js.NM))


@patterns(*EVERYWHERE, *IN_EACH, rest=UNITS_IN_ALL)
def test_masks_lie_where_the_parameter_does_and_are_those_of_a_sort(pattern):
    check(pattern, AxisType.Auto, ["inputs", "outputs", "query_heads", "layers"])


@patterns(*EVERYWHERE, *UNITS_IN_ALL, rest=IN_EACH)
def test_the_same_on_a_mesh_of_explicit_axes(pattern):
    check(pattern, AxisType.Explicit, ["inputs", "outputs_of_layers"])


straddling = pytest.mark.parametrize(
    "pattern", [js.NM(4, 8), js.Block((8, 2), reduce="max")], ids=repr
)


@straddling
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_groups_and_tiles_that_lie_on_two_devices_are_selected_too(pattern, kind):
    # 32 inputs over 8 devices are 4 on each; here XLA has to exchange scores.
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    scores = scores_of({"w": (32, 8)})
    sharding = NamedSharding(mesh, P("x", None))
    mask = select(jax.device_put(scores, {"w": sharding}), pattern)["w"]
    np.testing.assert_array_equal(mask, by_sorting(scores, pattern)["w"])
    if kind == AxisType.Explicit or isinstance(pattern, js.NM):
        assert mask.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_what_is_done_with_masks_is_done_where_they_lie(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P(None, "x"))
    params = jax.device_put(scores_of({"w": (64, 32)}), sharding)
    pattern = js.NM(2, 4)
    masks = js.patterns.masks(params, pattern=pattern)
    pruned = js.patterns.apply(params, masks)["w"]
    for x in (masks["w"], pruned):
        assert x.sharding.is_equivalent_to(sharding, 2)
    assert js.patterns.sparsity_of(masks, params) == {"w": 0.5}
    js.patterns.verify(masks, params, pattern=pattern)
    with pytest.raises(ValueError, match="kept in part"):
        js.patterns.verify(masks, params, pattern=js.Block((4, 4)))
    unpacked = js.patterns.unpack(js.patterns.pack(masks))
    np.testing.assert_array_equal(unpacked["w"], masks["w"])


def test_channels_that_nearly_agree_are_ranked_alike_on_one_device_and_on_many():
    """Columns that are permutations of one vector: a sum's order tells them apart."""
    rng = np.random.default_rng(0)
    column = rng.normal(size=64).astype(np.float32)
    scores = np.abs(np.stack([rng.permutation(column) for _ in range(32)], axis=1))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    choose = jax.jit(lambda s: js.patterns.masks({"w": s}, 0.5, pattern=js.Channel()))
    alone = np.asarray(choose(jnp.asarray(scores))["w"])
    np.testing.assert_array_equal(choose(jax.device_put(scores, spec))["w"], alone)
    # All are equal, so the lower ones stay.
    np.testing.assert_array_equal(alone[0], np.arange(32) < 16)
