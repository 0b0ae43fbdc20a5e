"""Scores from gradients of a small net, against their definitions in float64."""

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


def setting(dtype=np.float64):
    a, b, x, t = (jnp.asarray(v) for v in net(dtype))
    params = {"a": a, "b": b}
    return params, (x, t), jax.grad(loss)(params, (x, t))


def test_taylor_is_the_change_of_the_loss_to_first_order(x64):
    params, _, grads = setting()
    scores = js.scores.taylor(params, grads)
    numeric = gradients.gradient(*net())
    for got, w, g in zip(scores.values(), net()[:2], numeric, strict=True):
        np.testing.assert_allclose(got, np.abs(w * g), rtol=1e-6, atol=1e-8)


def test_taylor_is_the_loss_of_a_weight_where_the_loss_is_linear():
    slope = {"w": jnp.array([2.0, -3.0, 0.5])}
    params = {"w": jnp.array([1.0, 2.0, -4.0])}
    total = lambda p: float(jnp.sum(slope["w"] * p["w"]))
    changes = [
        abs(total({"w": params["w"].at[i].set(0)}) - total(params)) for i in range(3)
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
    taylor = js.scores.taylor(params, grads)
    assert np.isclose(scores["a"].sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(scores["b"], taylor["b"] / taylor["a"].sum(), rtol=1e-6)


def test_snip_without_any_gradient_is_zero_and_not_nan():
    params, _, grads = setting(np.float32)
    scores = js.scores.snip(params, jax.tree.map(jnp.zeros_like, grads))
    assert all((s == 0).all() for s in scores.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_snip_sums_many_small_numbers_in_float32(dtype):
    # A bfloat16 sum of ones stands still at 256; a float16 one overflows at 65504.
    ones = {"w": jnp.full((300, 300), 1, dtype)}
    score = js.scores.snip(ones, ones)["w"]
    assert score.dtype == dtype
    np.testing.assert_allclose(np.asarray(score, np.float64), 1 / 90_000, rtol=2.0**-7)


def test_snip_adds_up_parameters_of_different_types():
    params = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones((2, 2))}
    scores = js.scores.snip(params, params)
    assert {k: s.dtype.name for k, s in scores.items()} == {
        "a": "bfloat16",
        "b": "float32",
    }
    assert all((s == 0.125).all() for s in scores.values())


def test_grasp_is_the_dense_hessian_times_the_gradient(x64):
    params, batch, grads = setting()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.hessian(lambda w: loss(unravel(w), batch))(flat)
    g = jax.flatten_util.ravel_pytree(grads)[0]
    expected = unravel(flat * (hessian @ g))
    scores = js.scores.grasp(loss, params, batch)
    for name, score in scores.items():
        np.testing.assert_allclose(score, expected[name], rtol=1e-12, atol=1e-12)


def test_grasp_of_a_quadratic_loss_by_hand(x64):
    rng = np.random.default_rng(0)
    root, c, w = (
        rng.standard_normal((5, 5)),
        rng.standard_normal(5),
        rng.standard_normal(5),
    )
    matrix = root @ root.T
    quadratic = lambda p, m: p["w"] @ m @ p["w"] / 2 - p["w"] @ jnp.asarray(c)
    score = js.scores.grasp(quadratic, {"w": jnp.asarray(w)}, jnp.asarray(matrix))["w"]
    np.testing.assert_allclose(score, w * (matrix @ (matrix @ w - c)), rtol=1e-12)


def test_grasp_says_what_the_gradient_norm_loses(x64):
    """Removing a little of a weight changes `|g|^2` by `-2 * step * score`."""
    params, batch, _ = setting()
    scores = js.scores.grasp(loss, params, batch)

    def squared_norm(p):
        return sum(jnp.sum(g**2) for g in jax.grad(loss)(p, batch).values())

    for name, index in (("a", (1, 2)), ("b", (3, 0))):
        step = 1e-6
        less = params[name].at[index].multiply(1 - step)
        more = params[name].at[index].multiply(1 + step)
        change = squared_norm(params | {name: less}) - squared_norm(
            params | {name: more}
        )
        np.testing.assert_allclose(change / (-4 * step), scores[name][index], rtol=1e-5)


@pytest.mark.parametrize("score", [js.scores.taylor, js.scores.snip])
def test_gradients_of_another_structure_are_refused(score):
    with pytest.raises(ValueError, match=r"grads must have .* missing 'b'"):
        score({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, {"a": jnp.ones((2, 2))})
