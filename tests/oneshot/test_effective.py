"""Kernels that the model scales, masks or standardises before it contracts them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

SCALE = np.linspace(0.2, 3.0, 6).astype(np.float32)[:, None]
MASK = np.random.default_rng(3).random((6, 8)) > 0.3
ONES = MASK.astype(np.float32)
norm = lambda v: jnp.linalg.norm(v, axis=0, keepdims=True)
spread = lambda v: v.std(0, keepdims=True) + 1e-5

PRODUCTS = {
    "a constant for each input": lambda p: p["v"] * SCALE,
    "a parameter for each output": lambda p: -p["v"] * p["g"] / 2.0,
    "a mask": lambda p: jnp.where(MASK, p["v"], 0.0),
    "a mask that is multiplied": lambda p: ONES * p["v"] * SCALE,
    "turned around": lambda p: (
        (p["v"].T.reshape(8, 2, 3) * SCALE.reshape(1, 2, 3)).reshape(8, 6).T
    ),
}
OTHERS = {
    "standardised": (lambda p: p["v"] - p["v"].mean(0, keepdims=True), "sub"),
    "divided by its spread": (lambda p: p["v"] / spread(p["v"]), "div"),
    "weight norm": (lambda p: p["g"] * p["v"] / norm(p["v"]), "div"),
    "squashed": (lambda p: jnp.tanh(p["v"]), "tanh"),
    "its own mask": (lambda p: jnp.where(abs(p["v"]) > 0.1, p["v"], 0.0), "abs"),
    "added to": (lambda p: p["v"] + p["a"] @ p["b"], "add"),
    "a mask with another number": (lambda p: jnp.where(MASK, p["v"], 1.0), "select_n"),
    "squared": (lambda p: p["v"] * p["v"], "mul"),
    "below the line": (lambda p: SCALE / p["v"], "div"),
}
PLAIN = {
    "cast and turned": lambda p: p["v"].T.reshape(4, 2, 6).reshape(8, 6).T,
    "0 added": lambda p: p["v"] + 0.0,
}


@functools.cache
def numbers():
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    shapes = {"v": (6, 8), "g": (1, 8), "a": (6, 2), "b": (2, 8), "o": (8, 3)}
    mix = np.eye(6) + 0.5 * rng.standard_normal((6, 6))
    x = jnp.asarray(rng.standard_normal((40, 6)) @ mix, jnp.float32)
    return {path: normal(*shape) for path, shape in shapes.items()}, x


def model(weight):
    return lambda p, x: jax.nn.relu(x @ weight(p)) @ p["o"]


def layerwise(weight, solver=js.solvers.sparsegpt, where="^v$"):
    params, x = numbers()
    options = {"sparsity": 0.5, "solver": solver, "where": where}
    return js.oneshot.layerwise(model(weight), params, [x], **options)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_solved_as_what_acts(name):
    weight, (params, x) = PRODUCTS[name], numbers()
    pruned = layerwise(weight)
    before, after = (np.asarray(weight(p), np.float64) for p in (params, pruned.params))
    mask, info = np.asarray(pruned.masks["v"]), pruned.info["v"]
    assert np.sum(~mask) == 24
    assert not after[~mask].any()
    np.testing.assert_array_equal(np.asarray(pruned.params["v"])[~mask], 0)
    rows = np.asarray(x, np.float64)
    lost, whole = (np.mean((rows @ w) ** 2, 0).sum() for w in (after - before, before))
    np.testing.assert_allclose(info.relative_error, lost / whole, rtol=1e-3)
    # As the solver does with the product itself.
    gram = jnp.asarray(rows.T @ rows / 40, jnp.float32)
    alone = js.solvers.sparsegpt(jnp.asarray(before.T, jnp.float32), gram, 0.5)
    if "mask" not in name:
        np.testing.assert_array_equal(mask.T, alone.mask)
    else:  # what the model's mask removes costs nothing
        assert lost / whole <= 1.05 * float(alone.info.relative_error) + 1e-6


def test_weights_that_a_solver_keeps_keep_their_bits():
    params, _ = numbers()
    pruned = layerwise(PRODUCTS["a constant for each input"], js.solvers.wanda)
    mask = np.asarray(pruned.masks["v"])
    np.testing.assert_array_equal(
        pruned.params["v"], np.where(mask, np.asarray(params["v"]), 0)
    )


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_is_refused_with_the_primitive_and_the_line(name):
    weight, primitive = OTHERS[name]
    pattern = rf"^v: `{primitive}` at .*test_effective.py:\d+ .*`where`, or fold it"
    with pytest.raises(ValueError, match=pattern):
        layerwise(weight)


@pytest.mark.parametrize("name", PLAIN)
def test_what_changes_no_entry_is_no_change(name):
    params, x = numbers()
    trace = js.trace(model(PLAIN[name]), params, x)
    assert trace.kernels["v"].changes == ()
    js.scores.wanda(params, js.calibration.run(trace, params, [x]), where="^v$")


def test_two_factors_of_one_kernel_are_not_pruned_at_once():
    weight = lambda p: p["v"] * p["w"]
    params, x = numbers()
    params = {**params, "w": params["v"] + 1}
    with pytest.raises(ValueError, match=r"^v: `mul` .* multiplied by w, which is"):
        js.oneshot.layerwise(model(weight), params, [x], sparsity=0.5, where="^v$|^w$")


def test_a_kernel_that_is_scaled_in_one_place_alone_is_refused():
    apply_fn = lambda p, x: (x @ p["v"]) + jnp.tanh(x) @ (SCALE * p["v"])
    params, x = numbers()
    with pytest.raises(ValueError, match=r"^v: .*`mul`.* not the same product at all"):
        js.oneshot.layerwise(apply_fn, params, [x], sparsity=0.5, where="^v$")


def test_layers_of_a_scan_are_scaled_each_by_its_own():
    rng = np.random.default_rng(1)
    stack = rng.standard_normal((2, 6, 6)).astype(np.float32)
    scales = rng.uniform(0.5, 2, (2, 1, 6)).astype(np.float32)
    params = {"stack": jnp.asarray(stack), "scale": jnp.asarray(scales)}

    def apply_fn(p, x):
        layer = lambda x, ws: (jnp.tanh(x @ (ws[0] * ws[1])), None)
        return jax.lax.scan(layer, x, (p["stack"], p["scale"]))[0]

    options = {"sparsity": 0.5, "where": "^stack$", "solver": js.solvers.wanda}
    found = js.oneshot.layerwise(apply_fn, params, [numbers()[1]], **options)
    folded = {"stack": params["stack"] * params["scale"], "scale": jnp.ones((2, 1, 6))}
    wanted = js.oneshot.layerwise(apply_fn, folded, [numbers()[1]], **options)
    np.testing.assert_array_equal(found.masks["stack"], wanted.masks["stack"])
    for got, want in ((found, wanted),):
        np.testing.assert_allclose(
            got.info["stack"].relative_error,
            want.info["stack"].relative_error,
            rtol=1e-4,
        )


@functools.cache
def channels(weight):
    params, x = numbers()
    apply_fn = lambda p, x: jax.nn.relu(x @ p["v"]) @ weight(p)
    trace = js.trace(apply_fn, params, x)
    groups = js.coupling.groups(trace)
    return groups, params, js.calibration.run(trace, params, [x])


@pytest.mark.parametrize(
    "weight",
    [lambda p: p["o"] - p["o"].mean(0, keepdims=True), lambda p: p["o"] * 2.0],
    ids=["standardised", "scaled"],
)
def test_channels_and_scores_of_what_is_changed_are_refused(weight):
    groups, params, stats = channels(weight)
    pattern = r"^o: `(sub|mul)` at .*test_effective.py:\d+ .*`where`, or fold it"
    with pytest.raises(ValueError, match=pattern):
        js.channels.obs_errors(groups, params, stats)
    with pytest.raises(ValueError, match=pattern):
        js.channels.obs_greedy(groups, params, stats, 0.5)
    name = next(n for n in groups if n.startswith("v"))
    drop = js.coupling.Drop({name: np.array([0])}, {name: 8})
    with pytest.raises(ValueError, match=pattern):
        js.channels.obs_refit(groups, params, stats, drop)
    for score in (js.scores.wanda, js.scores.flap):
        with pytest.raises(ValueError, match=pattern):
            score(params, stats, where="^o$")
        score(params, stats, where="^v$")
