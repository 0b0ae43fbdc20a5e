"""Gates of channels against the narrowed model, and their derivatives slowly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from penalties import group_models as gm

import jaxsparse as js


def closed(groups, seed=0):
    """Gates of 0 and 1, as many 0 in each copy."""
    rng = np.random.default_rng(seed)
    gates = {}
    for name, g in groups.items():
        order = np.argsort(rng.random((*g.copies, g.size)), axis=-1)
        gates[name] = (order >= g.size // 2).astype(np.float64)
    return gates


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", gm.MODELS)
def test_gates_of_0_and_1_give_the_narrowed_model(name):
    params, x, groups = gm.make(name, dtype="float64")
    gates = jax.tree.map(jnp.asarray, closed(groups))
    drop = js.channels.drop_closed(gates)
    trace = js.trace(gm.MODELS[name], params, x)
    small = js.narrowing.narrow(trace, params, drop)
    expected = jax.jit(small.apply_fn)(small.params, x)
    for roles in (None, ("output", "other")):

        @jax.jit
        def run(params, gates, x, roles=roles):
            scaled = js.channels.scale_channels(groups, params, gates, roles=roles)
            return gm.MODELS[name](scaled, x), scaled

        got, scaled = run(params, gates, x)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
        assert sum(np.sum(np.asarray(w) == 0) for w in scaled.values()) > 0


@pytest.mark.usefixtures("x64")
def test_derivatives_are_those_of_the_product_also_at_0():
    params, x, groups = gm.make("mlp", dtype="float64")
    rng = np.random.default_rng(1)
    gates = {n: rng.random((*g.copies, g.size)) for n, g in groups.items()}
    gates = {n: jnp.asarray(np.where(g < 0.4, 0, g)) for n, g in gates.items()}

    def loss(params, gates):
        scaled = js.channels.scale_channels(groups, params, gates)
        return jnp.sum(gm.mlp(scaled, x) ** 2)

    along, by_gate = jax.jit(jax.grad(loss, (0, 1)))(params, gates)
    factor = {
        (name, copy, i): float(np.asarray(gates[name])[(*copy, i)])
        for name, g in groups.items()
        for copy, i in gm.indices(g)
    }
    scaled = gm.scaled(groups, params, factor, roles=("input",))
    grads = jax.grad(lambda p: jnp.sum(gm.mlp(p, x) ** 2))(
        jax.tree.map(jnp.asarray, scaled)
    )
    expected = gm.scaled(groups, grads, factor, roles=("input",))
    for path, g in along.items():
        np.testing.assert_allclose(g, expected[path], rtol=1e-10, atol=1e-12)
    own, of_loss = (gm.slices(groups, t, roles=("input",)) for t in (params, grads))
    for (name, copy, i), w in own.items():
        np.testing.assert_allclose(
            by_gate[name][(*copy, i)], w @ of_loss[name, copy, i], rtol=1e-9, atol=1e-12
        )


def test_zero_is_selected_types_are_kept_and_the_rest_is_left_alone():
    params, _, groups = gm.make("mlp", dtype="bfloat16")
    params["b"] = params["b"].at[0].set(jnp.nan)
    name = next(n for n, g in groups.items() if g.size == 8)
    gates = {name: jnp.asarray([0.0, *[0.5] * 7], jnp.float32)}
    got = js.channels.scale_channels(groups, params, gates)
    assert {p: w.dtype for p, w in got.items()} == {
        p: w.dtype for p, w in params.items()
    }
    assert not np.any(np.asarray(got["b"][0], np.float32))
    half = np.asarray(params["b"][1:], np.float32) / 2
    np.testing.assert_array_equal(np.asarray(got["b"][1:], np.float32), half)
    assert all(got[p] is params[p] for p in params if p != "b")
    assert js.channels.scale_channels(groups, params, {}) is params


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_parameters_keep_their_shardings(kind):
    params, _, groups = gm.make("conv")
    rng = np.random.default_rng(2)
    gates = {
        n: rng.random((*g.copies, g.size)).astype(np.float32) for n, g in groups.items()
    }
    run = jax.jit(functools.partial(js.channels.scale_channels, groups))
    expected = run(params, gates)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(getattr(AxisType, kind),))
    specs = {"b": P(None, None, "x"), "c": P("x")}
    with jax.set_mesh(mesh):
        put = {
            p: jax.device_put(np.asarray(w), NamedSharding(mesh, specs.get(p, P())))
            for p, w in params.items()
        }
        got = run(put, gates)
    for path, w in expected.items():
        np.testing.assert_allclose(np.asarray(got[path]), w, rtol=1e-6)
        assert got[path].sharding.is_equivalent_to(put[path].sharding, w.ndim)


def test_what_is_closed():
    marked = {
        "a": np.array([[0.0, 1, 0], [1, 1, 0]], np.float32),  # two copies
        "b": np.ones(3, np.float32),
    }
    drop = js.channels.drop_closed(marked)
    assert {n: x.tolist() for n, x in drop.indices.items()} == {"a": [[0], [2]]}
    assert drop.sizes == {"a": 3}
    with pytest.raises(ValueError, match="b: the gates of all 3 channels are 0"):
        js.channels.drop_closed({"b": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="a: 1 of the 2 entries of gates are NaN"):
        js.channels.drop_closed({"a": np.array([np.nan, 0], np.float32)})
    with pytest.raises(TypeError, match="gates is traced"):
        jax.jit(js.channels.drop_closed)({"b": np.ones(3, np.float32)})


def test_errors():
    params, _, groups = gm.make("mlp")
    name = next(n for n, g in groups.items() if g.size == 8)
    scale = functools.partial(js.channels.scale_channels, groups)
    ones = np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"a\[9\]: gates name it, .* the nearest"):
        scale(params, {"a[9]": ones})
    with pytest.raises(ValueError, match=r"gates of shape \(3,\) for a group of \(8,"):
        scale(params, {name: ones[:3]})
    with pytest.raises(TypeError, match=r"gates.*floating-point numbers, got bool"):
        scale(params, {name: ones > 0})
    with pytest.raises(ValueError, match="the nearest"):
        scale({"other": ones}, {name: ones})
    with pytest.raises(ValueError, match="role"):
        scale(params, {name: ones}, roles=("batch",))
    trace = js.trace(gm.mlp, params, np.ones((2, 5), np.float32))
    frozen = js.coupling.groups(trace)
    flagged = next(n for n, g in frozen.items() if not g.prunable)
    with pytest.raises(ValueError, match="it has gates, but it is not prunable"):
        js.channels.scale_channels(frozen, params, {flagged: ones[:1]})
