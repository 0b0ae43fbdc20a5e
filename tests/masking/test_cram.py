"""CrAM's gradient against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import masking

KEY = jax.random.key(0)


def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {"a": draw(6, 8), "b": draw(8, 4), "bias": draw(4)}, draw(16, 6), draw(16, 4)


def loss_fn(params, x, y):
    return jnp.mean((x @ params["a"] @ params["b"] + params["bias"][None] - y) ** 2)


def gradient(params, x, y):
    """By hand, in float64."""
    params, x, y = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, y))
    h = x @ params["a"]
    e = 2 * (h @ params["b"] + params["bias"] - y) / y.size
    return {"a": x.T @ (e @ params["b"].T), "b": h.T @ e, "bias": e.sum(0)}


def largest(params, count):
    """The masks of the largest of both kernels together."""
    flat = np.abs(np.concatenate([params["a"].ravel(), params["b"].ravel()]))
    cut = np.sort(flat)[-count]
    masks = {k: np.abs(params[k]) >= cut for k in ("a", "b")}
    return {**masks, "bias": np.ones(4, bool)}


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("sparse_grads", [True, False])
def test_the_gradient_at_the_compressed_point(plus, sparse_grads):
    params, x, y = problem()
    g = gradient(params, x, y)
    moved = {k: params[k] + 0.05 * g[k] for k in params}
    masks = largest(moved, 20)  # of 80
    h = gradient({k: moved[k] * masks[k] for k in moved}, x, y)
    expected = {k: (h[k] * masks[k] if sparse_grads else h[k]) for k in h}
    if plus:
        expected = {k: expected[k] + g[k] for k in g}
    value_and_grad = jax.jit(
        masking.cram(loss_fn, sparsities=(0.75,), plus=plus, sparse_grads=sparse_grads)
    )
    value, found = value_and_grad(params, x, y, key=KEY)
    np.testing.assert_allclose(value, loss_fn(params, x, y), rtol=1e-6)
    for k in expected:
        np.testing.assert_allclose(found[k], expected[k], rtol=1e-4, atol=1e-6)


def test_without_compression_it_is_the_plain_gradient():
    params, x, y = problem()
    f = masking.cram(loss_fn, sparsities=(0.0,), rho=0.0, plus=False)
    found = f(params, x, y, key=KEY)[1]
    expected = gradient(params, x, y)
    for k in expected:
        np.testing.assert_allclose(found[k], expected[k], rtol=1e-4, atol=1e-6)


def test_sparsities_and_patterns_are_drawn_anew():

    def count(params, x, y):
        return loss_fn(params, x, y), jnp.zeros(())

    @jax.jit
    def zeros(params, x, y, key):
        f = masking.cram(count, sparsities=(0.25, 0.5), plus=False, has_aux=True)
        (_, aux), grads = f(params, x, y, key=key)
        del aux
        return sum(jnp.sum(grads[k] == 0) for k in ("a", "b"))

    params, x, y = problem()
    seen = {int(zeros(params, x, y, jax.random.key(i))) for i in range(12)}
    assert seen == {20, 40}
    f = masking.cram(
        lambda w, x: jnp.sum(x @ w), choices=(js.NM(2, 4), js.NM(1, 4)), plus=False
    )
    w = jnp.asarray(np.random.default_rng(1).standard_normal((8, 5)), jnp.float32)
    f = jax.jit(f)
    counts = {int((f(w, w.T, key=jax.random.key(i))[1] != 0).sum()) for i in range(9)}
    assert counts == {20, 10}


def test_one_shot_pruning_costs_less_after_it():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 16)).astype(np.float32)
    y = np.tanh(x @ rng.standard_normal((16, 4))).astype(np.float32)

    def loss_fn(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)

    def train(value_and_grad):
        draw = np.random.default_rng(1).standard_normal
        params = {"up": draw((16, 32)) * 0.3, "down": draw((32, 4)) * 0.3}
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
        tx = optax.sgd(0.1, momentum=0.9)

        def step(carry, key):
            params, state = carry
            grads = value_and_grad(params, x, y, key=key)[1]
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(KEY, 300)
        params = jax.jit(lambda c: jax.lax.scan(step, c, keys))((
            params,
            tx.init(params),
        ))
        params = params[0][0]
        pruned = js.prune(params, 0.8, pattern=js.Unstructured("global")).params
        return loss_fn(params, x, y), loss_fn(pruned, x, y)

    dense = jax.value_and_grad(loss_fn)
    plain = train(lambda params, x, y, key: dense(params, x, y))
    aware = train(masking.cram(loss_fn, sparsities=(0.5, 0.8), rho=0.05))
    assert aware[1] < 0.25 * plain[1]
    assert aware[0] < 2 * plain[0] + 0.02


def test_errors():
    with pytest.raises(ValueError, match="draws one of"):
        masking.cram(loss_fn, sparsities=())
    with pytest.raises(ValueError, match="sparsities: a sparsity"):
        masking.cram(loss_fn, sparsities=(1.5,))
    mixed = (js.Unstructured("global"), js.Channel(axis=1))
    params, x, y = problem()
    with pytest.raises(ValueError, match="different shapes"):
        masking.cram(loss_fn, choices=mixed)(params, x, y, key=KEY)
