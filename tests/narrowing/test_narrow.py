"""A narrowed model gives what the masked one gives; nothing of it is built anew."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from zoo.checks import (
    assert_narrowed_equals_masked,
    close,
    each_one,
    half_of_all,
    masked,
)
from zoo.models import ZOO, array, filled, linen, loosely
from zoo.oddities import ODDITIES

import jaxsparse as js

MODELS = ZOO | ODDITIES
WITH_GRADIENTS = {
    *("mlp", "residual", "attention_flax", "scan_remat", "own_gradients"),
    *("dropout_scan", "modulated"),
}


# What these consist of is in others: layers in a scan, attention, gates, nnx's state.
LIKE_OTHERS = {
    *("attention_separate", "attention_split", "rope_halves", "vit", "scan"),
    *("gru", "optimized_lstm", "nnx"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("drops", "name"),
    [
        pytest.param(drops, name, marks=[] if few else pytest.mark.exhaustive)
        for drops in (half_of_all, each_one)
        for name in MODELS
        for few in [drops is half_of_all and name not in LIKE_OTHERS]
    ],
)
def test_narrowed_equals_masked(name, drops):
    rng = np.random.default_rng(0)
    changes = assert_narrowed_equals_masked(
        *MODELS[name](),
        drops=functools.partial(drops, rng=rng),
        gradients=name in WITH_GRADIENTS and drops is half_of_all,
    )
    assert all(changes)


UP_DOWN = {"up": np.ones((3, 4), np.float32), "down": np.ones((4, 2), np.float32)}


def test_derivatives_of_their_own_are_kept():
    """relu's derivative at 0 is 0, not that of the maximum it consists of."""

    def apply_fn(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    params, x = UP_DOWN, np.zeros((1, 3), np.float32)
    small = js.narrowing.narrow(js.trace(apply_fn, params, x), params, {"up[1]": [1]})
    slope = jax.jit(jax.grad(lambda x: small.apply_fn(small.params, x).sum()))(x)
    np.testing.assert_array_equal(slope, np.zeros((1, 3)))


def test_a_rule_that_changes_the_gradient_is_kept():
    @jax.custom_jvp
    def softsign(x, sharpness):
        return x / (1 + jnp.abs(x) * sharpness)

    @softsign.defjvp
    def _(primals, tangents):
        x, sharpness = primals
        return softsign(x, sharpness), 7.0 * tangents[0]

    apply_fn = lambda p, x: softsign(x @ p["up"], 2.0) @ p["down"]
    params, x = UP_DOWN, np.ones((1, 3), np.float32)
    small = js.narrowing.narrow(js.trace(apply_fn, params, x), params, {"up[1]": [1]})
    slope = jax.jit(jax.grad(lambda x: small.apply_fn(small.params, x).sum()))(x)
    np.testing.assert_allclose(slope, np.full((1, 3), 7.0 * 3 * 2))


def on_host(tree):
    """What is cut there compiles nothing."""
    return jax.tree.map(np.asarray, tree)


class Norms(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        x = nn.LayerNorm()(nn.gelu(x))
        x = nn.RMSNorm()(nn.Dense(self.width)(x) + x)
        return nn.Dense(3)(nn.LayerNorm(use_fast_variance=False)(x))


def test_resized_norms_are_those_of_a_module_of_that_width():
    with jax.enable_x64(True):
        apply_fn, params, inputs = linen(Norms(12), array(4, 5))
        params = on_host(params)
        trace = js.trace(apply_fn, params, *inputs)
        (name,) = js.coupling.groups(trace, allow=("zeros",)).prunable
        small = js.narrowing.narrow(
            trace, params, {name: range(0, 8, 2)}, norms="resized"
        )
        built, _, _ = linen(Norms(8), array(4, 5))
        other = js.narrowing.narrow(
            trace, params, {name: range(0, 8, 2)}, allow=("zeros",)
        )

        @jax.jit
        def run(params, others):
            resized = small.apply_fn(params, *inputs)
            return resized, built(params, *inputs), other.apply_fn(others, *inputs)

        resized, of_that_width, kept = run(small.params, other.params)
        close(resized, of_that_width)
        assert not np.allclose(kept, of_that_width)


@pytest.mark.parametrize("body", ["mean", "times", "unbiased", "rms"])
def test_ways_of_writing_a_mean(body):
    ways = {
        "mean": lambda y: y.mean(-1, keepdims=True),
        "times": lambda y: y.sum(-1, keepdims=True) * (1 / y.shape[-1]),
        "unbiased": lambda y: y.var(-1, ddof=1, keepdims=True),
        "rms": lambda y: jnp.sqrt((y**2).sum(-1, keepdims=True) / y.shape[-1]),
    }
    with jax.enable_x64(True):
        apply_fn = loosely(
            lambda p, x: (ways[body](x @ p["a"]) * (x @ p["a"])) @ p["b"]
        )
        params = on_host({"a": array(3, 8), "b": array(8, 2)})
        x = array(4, 3, seed=5)
        trace = js.trace(apply_fn, params, x)
        small = js.narrowing.narrow(trace, params, {"a[1]": [0, 3, 4]}, norms="resized")
        close(*jax.jit(lambda p: (small.apply_fn(p, x), apply_fn(p, x)))(small.params))


def test_experts_are_counted_anew():
    with jax.enable_x64(True):
        apply_fn, params, inputs = ZOO["moe"]()
        params = on_host(params)
        trace = js.trace(apply_fn, params, *inputs)
        # The router's columns and the experts know of each other by number alone.
        with pytest.raises(ValueError, match="its entries are sorted"):
            js.narrowing.narrow(trace, params, {"router[1]": [1]})
        with pytest.raises(ValueError, match="its positions are used as numbers"):
            js.narrowing.narrow(trace, params, {"gate[0]": [1]})
        gone = {"router[1]": [1], "gate[0]": [1]}
        allow = {"sorted", "zeros", "position"}
        small = js.narrowing.narrow(
            trace, params, gone, positions="renumber", allow=allow
        )
        # The same as a model of the other three experts.
        kept = np.array([0, 2, 3])
        three = params | {k: params[k][kept] for k in ("gate", "up", "down")}
        three["router"] = params["router"][:, kept]
        jax.tree.map(np.testing.assert_array_equal, small.params, three)

        def by_hand(p, x):
            rows = []
            for row in x @ p["in"]:
                logits, y = row @ p["router"], row
                chosen = np.argsort(logits)[-2:]
                for e in chosen:
                    weight = np.exp(logits[e]) / np.exp(logits[chosen]).sum()
                    gate = row @ p["gate"][e]
                    h = gate / (1 + np.exp(-gate)) * (row @ p["up"][e])
                    y = y + weight * (h @ p["down"][e])
                rows.append(y)
            return np.stack(rows) @ p["out"]

        got = jax.jit(small.apply_fn)(small.params, *inputs)
        close(got, by_hand(three, *on_host(inputs)))


def test_inputs_of_other_shapes_and_types_are_traced_anew_once():
    with jax.enable_x64(True):
        apply_fn, params, (x,) = ZOO["attention_split"]()
        calls = []

        def counted(params, x):
            calls.append(x.shape)
            return apply_fn(params, x)

        params = on_host(params)
        trace = js.trace(counted, params, x)
        drop = {"Dense_0/kernel[1]": [0, 5], "Dense_1/kernel[1.0]": [2]}
        small = js.narrowing.narrow(trace, params, drop)
        longer = array(2, 9, 6, seed=3)
        # A new function each time: JAX has no trace of it.
        shape = lambda *args: jax.eval_shape(loosely(small.apply_fn), *args)
        for _ in range(2):
            shape(small.params, longer)
        assert calls == [(2, 5, 6), (2, 9, 6)]

        @jax.jit
        def run(small_params, params, x):
            one = lambda x: small.apply_fn(small_params, x[None])[0]
            want = apply_fn(masked(trace, params, drop), x)
            return small.apply_fn(small_params, x), jax.vmap(one)(x), want

        got, each, want = run(small.params, params, longer)
        close(got, want)
        close(each, want)
        assert calls == [(2, 5, 6), (2, 9, 6), (1, 9, 6)]
        half = jax.tree.map(lambda w: w.astype(np.float32), small.params)
        assert shape(half, on_host(longer).astype(np.float32)).dtype == jnp.float64


@pytest.mark.usefixtures("x64")
def test_inputs_for_which_the_model_leaves_parameters_out():
    def apply_fn(p, x):
        y = jnp.tanh(x @ p["a"])
        if x.shape[1] > 1:
            y = y * p["scale"]
        return y @ p["b"]

    apply_fn = loosely(apply_fn)
    params = {"a": array(3, 4), "scale": array(4, seed=1), "b": array(4, 2, seed=2)}
    params = on_host(params)
    trace = js.trace(apply_fn, params, array(2, 5, 3))
    small = js.narrowing.narrow(trace, params, {"a[1]": [1]})
    zeroed = masked(trace, params, {"a[1]": [1]})
    both = jax.jit(
        lambda xs: [(small.apply_fn(small.params, x), apply_fn(zeroed, x)) for x in xs]
    )
    for got, want in both([array(2, steps, 3, seed=3) for steps in (1, 2)]):
        close(got, want)
    with pytest.raises(ValueError, match=r"a: the narrowed model has the shape"):
        small.apply_fn(params, array(2, 1, 3))


class Dropping(nn.Module):
    """Layers in a scan, each with a key of its own."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dropout(0.5, deterministic=False)(nn.tanh(nn.Dense(8)(x)))
        return x + nn.Dense(8)(y), None


def test_layers_that_stay_keep_their_random_keys():
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    axes["split_rngs"]["dropout"] = True
    model = nn.scan(Dropping, length=4, **axes)()
    x, key = array(5, 8), jax.random.key(3)
    init = lambda key: model.init({"params": key, "dropout": key}, x, None)
    params = on_host(filled(jax.eval_shape(init, key)))
    apply_fn = loosely(
        lambda p, x, key: model.apply(p, x, None, rngs={"dropout": key})[0]
    )
    trace = js.trace(apply_fn, params, x, key)
    found = js.coupling.groups(trace, allow={"layer"}).prunable
    (name,) = (n for n, g in found.items() if "layer" in g.flags)
    small = js.narrowing.narrow(trace, params, {name: [0, 2]}, allow={"layer"})
    zeroed = masked(trace, params, {name: [0, 2]})
    got, want = jax.jit(
        lambda key: (small.apply_fn(small.params, x, key), apply_fn(zeroed, x, key))
    )(key)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dropout_scan", "dropout_vmap"])
def test_random_numbers_may_be_drawn_at_the_new_sizes(name):
    apply_fn, params, inputs = MODELS[name]()
    params = on_host(params)
    trace = js.trace(apply_fn, params, *inputs)
    width = next(n for n, g in js.coupling.groups(trace).items() if g.size == 8)
    drop = {width: np.arange(3) + np.arange(4)[:, None]}
    small = js.narrowing.narrow(trace, params, drop, positions="renumber")
    drawn = lambda f, p: str(jax.make_jaxpr(f)(p, *inputs)).count("shape=(3, 5)")
    assert drawn(small.apply_fn, small.params) == 1
    whole = js.narrowing.narrow(trace, params, drop)
    assert drawn(whole.apply_fn, small.params) == 0
    got, want = jax.jit(lambda p: [f.apply_fn(p, *inputs) for f in (small, whole)])(
        small.params
    )
    assert got.shape == want.shape
    assert not np.allclose(got, want)


def test_a_derivative_that_cannot_be_followed_is_an_error():
    @jax.custom_vjp
    def reversing(x):
        return 2 * x

    # The rule turns the channels round, the function does not.
    reversing.defvjp(lambda x: (2 * x, None), lambda _, g: (jnp.flip(g, -1),))
    apply_fn = lambda p, x: reversing(x @ p["a"]) @ p["b"]
    params, x = PARAMS, X
    small = js.narrowing.narrow(js.trace(apply_fn, params, x), params, {"a[1]": [1]})
    assert jax.eval_shape(small.apply_fn, small.params, x).shape == (4, 2)
    loss = lambda p: small.apply_fn(p, x).sum()
    with pytest.raises(NotImplementedError, match=r"test_narrow\.py.*rule of its own"):
        jax.eval_shape(jax.grad(loss), small.params)
    # JAX keeps what it has traced of `flip`, whose lines are none of the model's.
    flips = js.trace(lambda p, x: jnp.flip(x @ p["a"], -1) @ p["b"], params, x)
    assert "test_narrow.py" in str(js.coupling.groups(flips)["a[1]"].reasons)


def test_shardings_within_the_model_hold_where_they_still_divide():
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec(None, "m"))

    def apply_fn(p, x):
        h = jax.lax.with_sharding_constraint(x @ p["a"], spread)
        return jnp.tanh(h) @ p["b"]

    params, x = on_host({"a": array(3, 16), "b": array(16, 2)}), array(4, 3)
    trace = js.trace(apply_fn, params, x)
    for gone in (range(8), range(5)):
        small = js.narrowing.narrow(trace, params, {"a[1]": gone})
        got = jax.jit(small.apply_fn)(small.params, x)
        kept = np.setdiff1d(np.arange(16), gone)
        hidden = np.tanh(np.asarray(x, np.float64) @ params["a"][:, kept])
        want = hidden @ params["b"][kept]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_nothing_retraces_under_jit():
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = on_host({"a": array(3, 8), "b": array(8, 2)})
    trace = js.trace(apply_fn, params, array(4, 3))
    small = js.narrowing.narrow(trace, params, {"a[1]": [0, 3]})
    run = jax.jit(small.apply_fn)
    for seed in range(3):
        run(small.params, array(4, 3, seed=seed))
    assert run._cache_size() == 1


def test_inputs_without_the_dropped_features():
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params, x = on_host({"a": array(5, 8), "b": array(8, 2)}), on_host(array(4, 5))
    trace = js.trace(apply_fn, params, x)
    small = js.narrowing.narrow(trace, params, {"a[0]": [1, 2]}, allow=("input",))
    kept = np.array([0, 3, 4])
    want = apply_fn({"a": params["a"][kept], "b": params["b"]}, x[:, kept])
    np.testing.assert_allclose(small.apply_fn(small.params, x[:, kept]), want, 1e-6)
    more = on_host(array(7, 5))[:, kept]
    assert jax.eval_shape(small.apply_fn, small.params, more).shape == (7, 2)


def test_abstract_and_host_parameters():
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": np.ones((3, 8), np.float32), "b": np.ones((8, 2), np.float32)}
    trace = js.trace(apply_fn, params, array(4, 3))
    small = js.narrowing.narrow(trace, params, {"a[1]": [0, 3]})
    assert all(isinstance(w, np.ndarray) for w in small.params.values())
    abstract = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    shapes = js.narrowing.narrow(trace, abstract, {"a[1]": [0, 3]}).params
    assert jax.tree.map(lambda w: w.shape, shapes) == {"a": (3, 6), "b": (6, 2)}
    traced = jax.jit(lambda p: js.narrowing.narrow(trace, p, {"a[1]": [0, 3]}).params)
    jax.tree.map(np.testing.assert_array_equal, traced(params), small.params)


def test_shardings_are_kept_where_the_mesh_still_divides():
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    place = lambda w, *spec: jax.device_put(w, on(*spec))
    whole = on_host({"a": array(16, 32), "b": array(32, 8)})
    params = {"a": place(whole["a"], None, "m"), "b": place(whole["b"], "m", None)}
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    trace = js.trace(apply_fn, whole, array(4, 16))
    for gone, spec in ((range(8), "m"), (range(5), None)):
        small = js.narrowing.narrow(trace, params, {"a[1]": gone}).params
        one = js.narrowing.narrow(trace, whole, {"a[1]": gone}).params
        jax.tree.map(np.testing.assert_array_equal, small, one)
        assert small["a"].sharding.is_equivalent_to(on(None, spec), 2)
        back = js.narrowing.widen(trace, small, {"a[1]": gone})
        again = js.narrowing.widen(trace, one, {"a[1]": gone})
        jax.tree.map(np.testing.assert_array_equal, back, again)


PARAMS = {"a": np.ones((3, 8), np.float32), "b": np.ones((8, 2), np.float32)}
X = np.ones((4, 3), np.float32)
BAD = {
    "another model": (
        js.coupling.Drop({"a[1]": np.array([1])}, {"a[1]": 16}),
        r"a\[1\]: the drop was made for a group of 16 indices, here it has 8",
    ),
    "unknown": ({"c[1]": [1]}, r"c\[1\]: not a group of this model. Similar: .*a\[1\]"),
    "too large": ({"a[1]": [1, 8]}, r"a\[1\]: has the indices 0 to 7, got 1 to 8"),
    "negative": ({"a[1]": [-1]}, r"a\[1\]: has the indices 0 to 7, got -1 to -1"),
    "twice": ({"a[1]": [1, 1]}, r"a\[1\]: an index is given twice"),
    "more than exist": ({"a[1]": range(9)}, r"a\[1\]: has the indices 0 to 7"),
    "all": ({"a[1]": range(8)}, r"a\[1\]: all 8 indices would be dropped"),
    "no indices": ({"a[1]": [0.5]}, r"a\[1\]: expected integer indices"),
    "rank": ({"a[1]": [[1], [2]]}, r"a\[1\]: expected indices of shape \[k\], got"),
    "output": ({"b[1]": [0]}, r"b\[1\]: its indices may not be dropped:\n  output"),
    "input": ({"a[0]": [0]}, r"a\[0\].*\n  input: .*\nallow=\['input'\] takes them"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_drops(name):
    drop, message = BAD[name]
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    trace = js.trace(apply_fn, PARAMS, X)
    with pytest.raises(ValueError, match=message):
        js.narrowing.narrow(trace, PARAMS, drop)
    with pytest.raises(ValueError, match=message):
        js.narrowing.drop_masks(trace, drop)


def test_bad_parameters():
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    trace = js.trace(apply_fn, PARAMS, X)
    small = js.narrowing.narrow(trace, PARAMS, {"a[1]": [0]})
    with pytest.raises(
        ValueError, match=r"a: traced with shape \(3, 8\), got \(3, 7\)"
    ):
        js.narrowing.narrow(trace, small.params, {"a[1]": [0]})
    with pytest.raises(ValueError, match=r"a: the narrowed model has .*\(3, 7\)"):
        small.apply_fn(PARAMS, X)
    with pytest.raises(ValueError, match=r"a: expected the narrowed shape \(3, 7\)"):
        js.narrowing.widen(trace, PARAMS, {"a[1]": [0]})
    with pytest.raises(ValueError, match="another structure"):
        js.narrowing.narrow(trace, {"a": PARAMS["a"]}, {"a[1]": [0]})
    with pytest.raises(ValueError, match=re.escape("norms must be one of")):
        js.narrowing.narrow(trace, PARAMS, {"a[1]": [0]}, norms="new")


def test_frozen_axes_say_at_which_line():
    apply_fn = lambda p, x: jnp.flip(x @ p["a"], -1) @ p["b"]
    trace = js.trace(apply_fn, PARAMS, X)
    with pytest.raises(ValueError, match=r"frozen: rev at .*test_narrow\.py") as error:
        js.narrowing.narrow(trace, PARAMS, {"a[1]": [0]}, allow=("frozen",))
    assert "takes them anyway" not in str(error.value)
