"""No layer vanishes: what every pattern and scope keeps at the highest sparsities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import selection

import jaxsparse as js

STACKED = js.Axes(input=(1,), output=(2,), batch=(0,))
AXES = {"stacked": STACKED}
PATTERNS = [
    js.Unstructured(),
    js.Unstructured("output"),
    js.Unstructured("global"),
    js.Block((2, 2)),
    js.Balanced((2, 2)),
    js.Block((2, 2), reduce="max", scope="global"),
    js.Channel(),
    js.Channel(axis=-2, reduce="max", scope="global"),
    js.NM(1, 4),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)


@functools.cache
def scores():
    """One layer above all others, one below, and stacked ones of both kinds."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(1, 9, shape).astype(np.float32)
    stacked = draw(4, 8, 4) * np.asarray([1, 64, 1, 64], np.float32)[:, None, None]
    return {"big": draw(16, 16) * 64, "small": draw(8, 4), "stacked": stacked}


@functools.partial(jax.jit, static_argnames=("pattern", "min_keep"))
def select(tree, sparsity, pattern, min_keep):
    if isinstance(pattern, js.NM):
        sparsity = None
    options = {"pattern": pattern, "axes": AXES, "min_keep": min_keep}
    return js.patterns.masks(tree, sparsity, **options)


def layers_of(masks):
    """Flags of every layer: the stacked ones each for itself."""
    return [masks["big"], masks["small"], *masks["stacked"]]


@every_pattern
def test_no_layer_vanishes_at_any_sparsity(pattern):
    for sparsity in (0.5, 0.9, 0.99, 0.9999):
        masks = select(scores(), np.float32(sparsity), pattern, 1)
        assert all(np.asarray(m).any() for m in layers_of(masks)), sparsity
        if pattern == js.Unstructured("output"):
            columns = [np.asarray(m).any(axis=-2).all() for m in masks.values()]
            assert all(columns)


@pytest.mark.parametrize("pattern", PATTERNS[:-1], ids=repr)
def test_the_rule_is_that_of_a_sort(pattern):
    dense = js.Axes(input=(0,), output=(1,))
    axes = [AXES.get(k, dense) for k in scores()]
    for sparsity in (0.25, 0.95):
        masks = select(scores(), np.float32(sparsity), pattern, 1)
        arrays = list(scores().values())
        if pattern.scope == "global":
            expected = selection.global_masks(arrays, sparsity, pattern, axes)
        else:
            expected = [
                selection.mask(x, sparsity, pattern, a)
                for x, a in zip(arrays, axes, strict=True)
            ]
        for mask, full in zip(masks.values(), expected, strict=True):
            np.testing.assert_array_equal(np.broadcast_to(mask, full.shape), full)


def test_the_total_is_exact_where_it_holds_the_least_of_all_layers():
    pattern = js.Unstructured("global")
    n = sum(x.size for x in scores().values())
    for sparsity, min_keep in ((0.9, 1), (0.9, 3), (0.99, 1), (0.99, 0)):
        masks = select(scores(), np.float32(sparsity), pattern, min_keep)
        kept = sum(int(m.sum()) for m in masks.values())
        least = sum(min(min_keep, m.size) for m in layers_of(masks))
        expected = max(n - js.patterns.removed_count(sparsity, n), least)
        assert kept == expected
        assert all(m.sum() >= min(min_keep, m.size) for m in layers_of(masks))


def test_small_layers_are_kept_whole_and_0_lets_layers_vanish():
    pattern = js.Unstructured("global")
    whole = select(scores(), np.float32(0.9), pattern, 32)
    assert np.asarray(whole["small"]).all()
    none = select(scores(), np.float32(0.9), pattern, 0)
    assert not np.asarray(none["small"]).any()
    alone = js.patterns.masks({"w": scores()["small"]}, 0.99, min_keep=0)
    assert not np.asarray(alone["w"]).any()


def test_on_eight_devices_it_is_that_of_one():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spec = {"big": P("x", "y"), "small": P("x"), "stacked": P("x", None, "y")}
    shardings = {k: NamedSharding(mesh, s) for k, s in spec.items()}
    sharded = jax.device_put(scores(), shardings)
    for min_keep in (1, 3):
        static = js.Unstructured("global"), min_keep
        got = select(sharded, np.float32(0.97), *static)
        one = select(scores(), np.float32(0.97), *static)
        jax.tree.map(np.testing.assert_array_equal, got, one)


def test_prune_and_schedules_keep_layers():
    draw = np.random.default_rng(1).standard_normal
    params = {"big": draw((20, 20)), "small": draw((10, 4)) * 1e-3}
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    for pattern in (js.Unstructured(), js.Unstructured("global")):
        assert int(js.prune(params, 0.99, pattern=pattern).masks["small"].sum()) == 1
        for min_keep in (1, 2):
            options = {"every": 1, "pattern": pattern, "min_keep": min_keep}
            schedule = js.prune_schedule(0.99, **options)
            masks = schedule.init(params).masks
            assert int(masks["small"].sum()) == min_keep
    masks = js.prune(params, 0.99, min_keep=3).masks
    assert int(masks["small"].sum()) == 3


def test_a_negative_min_keep_is_an_error():
    with pytest.raises(ValueError, match="min_keep must be at least 0, got -1"):
        js.patterns.masks(scores(), 0.5, min_keep=-1)
    with pytest.raises(TypeError, match="min_keep must be an integer"):
        js.patterns.masks(scores(), 0.5, min_keep=0.5)
