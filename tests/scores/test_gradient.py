"""Scores from gradients of a small net, against their definitions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gradients

import jaxsparse as js


def net(dtype=np.float64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 5)), rng.standard_normal((5, 3))
    x, t = rng.standard_normal((7, 4)), rng.standard_normal((7, 3))
    return [v.astype(dtype) for v in (a, b, x, t)]


def loss(params, batch):
    x, t = batch
    y = jax.nn.relu(x @ params["a"]) @ params["b"]
    return jnp.sum((y - t) ** 2) / 2


@functools.cache
def setting(dtype=np.float64):
    a, b, x, t = (jnp.asarray(v) for v in net(dtype))
    params = {"a": a, "b": b}
    return params, (x, t), jax.jit(jax.grad(loss))(params, (x, t))


def test_taylor_is_the_change_of_the_loss_to_first_order(x64):
    params, _, grads = setting()
    scores = js.scores.taylor(params, grads)
    numeric = gradients.gradient(*net())
    for got, w, g in zip(scores.values(), net()[:2], numeric, strict=True):
        np.testing.assert_allclose(got, np.abs(w * g), rtol=1e-6, atol=1e-8)


def test_taylor_is_the_loss_of_a_weight_where_the_loss_is_linear():
    slope = {"w": jnp.array([2.0, -3.0, 0.5])}
    params = {"w": jnp.array([1.0, 2.0, -4.0])}
    total = lambda w: float(np.sum(np.asarray(slope["w"]) * w))
    w = np.asarray(params["w"])
    changes = [
        abs(total(np.where(np.arange(3) == i, 0, w)) - total(w)) for i in range(3)
    ]
    assert js.scores.taylor(params, slope)["w"].tolist() == changes


def test_snip_is_the_derivative_by_a_gate_on_each_weight(x64):
    params, _, grads = setting()
    scores = js.scores.snip(params, grads)
    for got, expected in zip(scores.values(), gradients.snip(*net()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_snip_is_normalised_over_the_selected_parameters():
    params, _, grads = setting(np.float32)
    scores = js.scores.snip(params, grads, where="a")
    assert np.isclose(np.asarray(scores["a"]).sum(), 1, rtol=1e-6)
    taylor = {k: abs(np.float64(w) * np.float64(grads[k])) for k, w in params.items()}
    np.testing.assert_allclose(scores["b"], taylor["b"] / taylor["a"].sum(), rtol=1e-6)


def test_snip_without_any_gradient_is_zero_and_not_nan():
    params, _, grads = setting(np.float32)
    nothing = jax.tree.map(lambda g: jnp.asarray(np.zeros_like(g)), grads)
    scores = js.scores.snip(params, nothing)
    assert all((np.asarray(s) == 0).all() for s in scores.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_snip_sums_many_small_numbers_in_float32(dtype, request):
    if dtype == "float16":
        request.getfixturevalue("float16")
    # A bfloat16 sum of ones stands still at 256; a float16 one overflows at 65504.
    ones = {"w": jnp.asarray(np.ones((300, 300)), dtype)}
    score = jax.jit(js.scores.snip)(ones, ones)["w"]
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score, 1 / 90_000, rtol=1e-5)


def test_snip_adds_up_parameters_of_different_types():
    ones = np.ones((2, 2))
    params = {"a": jnp.asarray(ones, jnp.bfloat16), "b": jnp.asarray(ones, jnp.float32)}
    scores = jax.jit(js.scores.snip)(params, params)
    assert {s.dtype.name for s in scores.values()} == {"float32"}
    assert all((np.asarray(s) == 0.125).all() for s in scores.values())


def test_grasp_is_the_dense_hessian_times_the_gradient(x64):
    params, batch, grads = setting()
    hessian = jax.jit(jax.hessian(loss))(params, batch)
    for name, score in js.scores.grasp(loss, params, batch).items():
        product = sum(
            np.einsum("abcd,cd->ab", hessian[name][other], grads[other])
            for other in params
        )
        expected = np.asarray(params[name]) * product
        np.testing.assert_allclose(score, expected, rtol=1e-12, atol=1e-12)


grasp = jax.jit(js.scores.grasp, static_argnums=0)


def test_grasp_of_a_quadratic_loss_by_hand(x64):
    rng = np.random.default_rng(0)
    root, c, w = (
        rng.standard_normal((5, 5)),
        rng.standard_normal(5),
        rng.standard_normal(5),
    )
    matrix = root @ root.T
    quadratic = lambda p, m: p["w"] @ m @ p["w"] / 2 - p["w"] @ jnp.asarray(c)
    score = grasp(quadratic, {"w": w}, matrix)["w"]
    np.testing.assert_allclose(score, w * (matrix @ (matrix @ w - c)), rtol=1e-12)


def test_grasp_says_what_the_gradient_norm_loses(x64):
    """Removing a little of a weight changes `|g|^2` by `-2 * step * score`."""
    params, batch, _ = setting()
    scores = grasp(loss, params, batch)

    @jax.jit
    def squared_norm(p):
        return sum(jnp.sum(g**2) for g in jax.grad(loss)(p, batch).values())

    for name, index in (("a", (1, 2)), ("b", (3, 0))):
        step = 1e-6
        less, more = np.array(params[name]), np.array(params[name])
        less[index] *= 1 - step
        more[index] *= 1 + step
        change = float(squared_norm(params | {name: less})) - float(
            squared_norm(params | {name: more})
        )
        expected = np.asarray(scores[name])[index]
        np.testing.assert_allclose(change / (-4 * step), expected, rtol=1e-5)


@pytest.mark.parametrize("score", [js.scores.taylor, js.scores.snip])
def test_gradients_of_another_structure_are_refused(score):
    with pytest.raises(ValueError, match=r"grads must have .* missing 'b'"):
        score({"a": np.ones((2, 2)), "b": np.ones((2, 2))}, {"a": np.ones((2, 2))})
