"""Sums over masked entries that are not zero, as those of a variance of centred values.

The narrowed model has none of those entries and still gives the masked model's sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from zoo.checks import (
    assert_narrowed_equals_masked,
    choose,
    each_one,
    half_of_all,
)
from zoo.models import array, loosely

import jaxsparse as js


def centred(x, axes=-1, ddof=0):
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(axes, keepdims=True, ddof=ddof) + 1e-2)


def layer_norm(p, x):
    x = x @ p["in"]
    for name in ("a", "b"):
        y = centred(x) * p[name]["scale"] + p[name]["bias"]
        x = x + jnp.tanh(y @ p[name]["up"]) @ p[name]["down"]
    return centred(x, ddof=1) @ p["out"]


def unbiased(p, x):
    y = x @ p["in"]
    return (y / (1 + y.std(-1, ddof=1, keepdims=True))) @ p["out"]


def group_norm(p, x):
    y = (x @ p["in"]).reshape(*x.shape[:-1], 4, 6)
    y = centred(y, (0, -1)).reshape(*x.shape[:-1], 24) * p["scale"] + p["bias"]
    return jax.nn.relu(y) @ p["out"]


def standardized_kernels(p, x):
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x,
        (w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-2),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(conv(x.reshape(2, 2, 2, 4), p["in"]))
    x = x + conv(jax.nn.relu(conv(x, p["up"])), p["down"])
    return conv(jax.nn.relu(x), p["out"])


def square(p, x):
    """A kernel that is zero where its output is masked, but not where its input is."""
    y, w = x @ p["in"], p["w"]
    return (y + y @ ((w - w.mean(0)) / (w.std(0) + 1e-2))) @ p["out"]


def two_axes(p, x):
    y = jnp.einsum("bi,ihd->bhd", x, p["in"])
    y = centred(y, (1, 2)) * p["scale"]
    return jnp.einsum("bhd,hdo->bo", y, p["out"])


def each_head(p, x):
    y = jnp.einsum("bi,ihd->bhd", x, p["in"])
    return jnp.einsum("bhd,hdo->bo", centred(y) * p["scale"], p["out"])


def joined(p, x):
    y = jnp.concatenate([x @ p["in"], jnp.tanh(x @ p["other"])], axis=-1)
    return (centred(y) * p["scale"]) @ p["out"]


def stacked(p, x):
    def layer(x, w):
        y = centred(x) * w["scale"]
        return x + jnp.tanh(y @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x @ p["in"], p["layers"])
    return centred(x) @ p["out"]


def of_constants(p, x):
    y = x @ p["in"]
    share = jax.nn.sigmoid(y).sum(-1, keepdims=True) + jnp.ones_like(y).sum(-1)[:, None]
    logits = jnp.exp(y)
    return (y * share + y * logits.mean(-1, keepdims=True)) @ p["out"]


def each_example(p, x):
    one = lambda x: centred(x @ p["in"]) * p["scale"]
    return jax.vmap(one)(x) @ p["out"]


SHAPES = {
    layer_norm: {
        "in": (4, 12),
        "out": (12, 3),
        **{
            k: {"scale": (12,), "bias": (12,), "up": (12, 9), "down": (9, 12)}
            for k in "ab"
        },
    },
    unbiased: {"in": (4, 9), "out": (9, 2)},
    group_norm: {"in": (4, 24), "scale": (24,), "bias": (24,), "out": (24, 3)},
    standardized_kernels: {
        "in": (1, 1, 4, 8),
        "up": (3, 3, 8, 6),
        "down": (3, 3, 6, 8),
        "out": (3, 3, 8, 2),
    },
    square: {"in": (4, 8), "w": (8, 8), "out": (8, 2)},
    two_axes: {"in": (4, 5, 6), "scale": (5, 6), "out": (5, 6, 2)},
    each_head: {"in": (4, 5, 6), "scale": (6,), "out": (5, 6, 2)},
    joined: {"in": (4, 7), "other": (4, 5), "scale": (12,), "out": (12, 2)},
    stacked: {
        "in": (4, 8),
        "layers": {"scale": (3, 8), "up": (3, 8, 6), "down": (3, 6, 8)},
        "out": (8, 2),
    },
    of_constants: {"in": (4, 9), "out": (9, 2)},
    each_example: {"in": (4, 9), "scale": (9,), "out": (9, 2)},
}


def parameters(model):
    """On the host, where they are cut without a compilation."""
    rng, leaf = np.random.default_rng(1), lambda s: isinstance(s, tuple)
    draw = lambda shape: rng.normal(size=shape) * 0.5
    return jax.tree.map(draw, SHAPES[model], is_leaf=leaf)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("model", SHAPES, ids=lambda f: f.__name__)
def test_narrowed_equals_masked_in_values_and_gradients(model):
    rng = np.random.default_rng(0)

    def drops(found):
        sizes = [g.size for g in found.values() if not g.flags]
        assert len(sizes) >= {group_norm: 2, two_axes: 2, joined: 2}.get(model, 1)
        return each_one(found, rng)[:1] + half_of_all(found, rng)

    apply_fn, params = loosely(model), parameters(model)
    inputs = (array(8, 4, seed=3),)
    changes = assert_narrowed_equals_masked(
        apply_fn, params, inputs, drops=drops, gradients=True
    )
    assert all(changes)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("model", [layer_norm, each_head], ids=lambda f: f.__name__)
def test_results_are_sharded_as_the_models(model, kind):
    params, x = parameters(model), array(8, 4, seed=3)
    apply_fn, rng = loosely(model), np.random.default_rng(0)
    trace = js.trace(apply_fn, params, x)
    found = js.coupling.groups(trace).prunable
    drop = {n: choose(g, g.size // 3, rng) for n, g in found.items()}
    small = js.narrowing.narrow(trace, params, drop)
    want = jax.device_get(jax.jit(small.apply_fn)(small.params, x))
    # An operation at a time is much to compile: of one model.
    runs = [jax.jit(small.apply_fn)] + [small.apply_fn] * (model is each_head)
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    with jax.sharding.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        params = jax.device_put(small.params, NamedSharding(mesh, P()))
        last = params["in"].ndim - 1
        assert params["in"].shape[last] % 2 == 0
        spec = P(*[None] * last, "model")
        params["in"] = jax.device_put(params["in"], NamedSharding(mesh, spec))
        for run in runs:
            got = run(params, x)
            assert got.sharding.spec[0] == "data"
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_module_of_that_width_has_no_such_entries():
    with jax.enable_x64(True):
        params, x = parameters(layer_norm), array(8, 4, seed=3)
        trace = js.trace(loosely(layer_norm), params, x)
        (name,) = (n for n, g in js.coupling.groups(trace).items() if g.size == 12)
        small = js.narrowing.narrow(trace, params, {name: range(5)}, norms="resized")
        got, built = jax.jit(
            lambda p: (small.apply_fn(p, x), loosely(layer_norm)(p, x))
        )(small.params)
        np.testing.assert_allclose(got, built, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_softmax_still_counts_its_masked_entries():
    """Where they act elsewhere too, what is taken out is taken out of all sums."""
    params, x = {"in": array(4, 6), "out": array(6, 2, seed=1)}, array(3, 4, seed=2)
    params = jax.tree.map(np.asarray, params)
    apply_fn = loosely(lambda p, x: jax.nn.softmax(x @ p["in"]) @ p["out"])
    trace = js.trace(apply_fn, params, x)
    group = js.coupling.groups(trace)["in[1]"]
    assert group.flags == {"zeros"}
    small = js.narrowing.narrow(trace, params, {"in[1]": [0, 3]}, allow={"zeros"})
    got, want = jax.jit(lambda p: (small.apply_fn(p, x), apply_fn(p, x)))(small.params)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_rules_for_derivatives_sum_over_what_they_like():
    @jax.custom_vjp
    def norm(x):
        return centred(x)

    norm.defvjp(lambda x: (centred(x), x), lambda x, g: (g * x.std(-1, keepdims=True),))
    params = {"in": array(4, 6), "out": array(6, 2, seed=1)}
    apply_fn = loosely(lambda p, x: norm(x @ p["in"]) @ p["out"])
    trace = js.trace(apply_fn, params, array(3, 4))
    assert js.coupling.groups(trace)["in[1]"].flags == {"zeros"}
