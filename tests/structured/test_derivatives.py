"""Gradients of narrowed models whose functions have rules of their own for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structured.zoo import array, loosely, of_shapes

import jaxsparse as js


def ruled(forward, backward):
    """A function of one array with its own gradient."""
    function = jax.custom_vjp(forward)
    function.defvjp(lambda x: (forward(x), x), backward)
    return function


def heads(function):
    """A model that applies a function to `[batch, 4 heads, 6]`, and its parameters."""

    def apply_fn(p, x):
        inside = function(jnp.einsum("bi,ihk->bhk", x, p["in"]))
        return jnp.einsum("bhk,hko->bo", inside, p["out"])

    return loosely(apply_fn), {"in": array(5, 4, 6), "out": array(4, 6, 2, seed=1)}


DIFFERENT = np.array([[0, 1], [2, 3], [4, 5], [1, 4]])
ALIKE = np.array([[0, 1]] * 4)
RULES = {
    "of each entry": (lambda x, g: (g * jnp.cos(x),), True),
    "mixes heads": (lambda x, g: (g * jnp.mean(x * x, 1, keepdims=True),), False),
    "has a constant": (lambda x, g: (g * np.linspace(1.0, 2.0, 6)[None, None],), False),
    "has positions": (lambda x, g: (g * jnp.arange(6.0)[None, None],), False),
}


@pytest.mark.parametrize("drop", [DIFFERENT, ALIKE], ids=["different", "alike"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_may_mix_copies_that_lose_the_same(rule, drop):
    backward, apart = RULES[rule]
    with jax.enable_x64(True):
        apply_fn, params = heads(ruled(jnp.tanh, backward))
        x = array(3, 5, seed=2)
        trace = js.trace(apply_fn, params, x)
        (name,) = (n for n, g in js.structured.groups(trace).items() if g.size == 6)
        small = js.structured.narrow(trace, params, {name: drop})
        loss = lambda run: lambda p: jnp.sum(run(p, x) ** 2)
        slope = jax.grad(loss(small.apply_fn))
        if drop is DIFFERENT and not apart:
            with pytest.raises(NotImplementedError, match=r"test_derivatives\.py:\d+"):
                slope(small.params)
            return
        masks = js.structured.masks(trace, {name: drop})
        whole = jax.grad(loss(apply_fn))(js.patterns.apply(params, masks))
        want = js.structured.narrow(trace, whole, {name: drop}).params
        for key, got in slope(small.params).items():
            np.testing.assert_allclose(got, want[key], atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_random_numbers_of_a_rule_within_a_scan():
    """Each layer loses its own channels: a rule cannot tell in which one it runs."""

    @jax.custom_vjp
    def noisy(x, key):
        return x + 0.1 * jax.random.normal(key, x.shape, x.dtype)

    noisy.defvjp(lambda x, key: (noisy(x, key), None), lambda _, g: (g, None))
    params = of_shapes(**{"in": (5, 6), "up": (3, 6, 8), "down": (3, 8, 6)})

    def apply_fn(p, x, key):
        def layer(x, turn):
            up, down, key = turn
            return x + noisy(jnp.tanh(x @ up), key) @ down, None

        keys = jax.random.split(key, 3)
        return jax.lax.scan(layer, x @ p["in"], (p["up"], p["down"], keys))[0].sum(-1)

    apply_fn, x, key = loosely(apply_fn), array(3, 5), jax.random.key(0)
    trace = js.trace(apply_fn, params, x, key)
    drop = {"up[2]": [[0, 1], [2, 3], [4, 5]]}
    small = js.structured.narrow(trace, params, drop)
    masked = js.patterns.apply(params, js.structured.masks(trace, drop))
    want = apply_fn(masked, x, key)
    np.testing.assert_allclose(small.apply_fn(small.params, x, key), want, atol=1e-12)
    with pytest.raises(NotImplementedError, match="could not be followed"):
        jax.vjp(lambda p: small.apply_fn(p, x, key), small.params)


def test_a_rule_that_couples_what_goes_with_what_stays():
    total = lambda x: jnp.tanh(x).sum(-1, keepdims=True)
    function = jax.custom_vjp(lambda x, y: total(x) * total(y))
    function.defvjp(
        lambda x, y: (total(x) * total(y), (x, y)), lambda r, g: (g * r[1], g * r[0])
    )
    params = {"a": array(5, 6), "b": array(5, 6, seed=1)}
    x = array(3, 5, seed=2)
    apply_fn = loosely(lambda p, x: function(x @ p["a"], x @ p["b"]))
    trace = js.trace(apply_fn, params, x)
    small = js.structured.narrow(trace, params, {"a[1]": [1]})
    assert small.apply_fn(small.params, x).shape == (3, 1)
    with pytest.raises(NotImplementedError, match="could not be followed"):
        jax.grad(lambda p: small.apply_fn(p, x).sum())(small.params)
