"""Gradients of narrowed models whose functions have rules of their own for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint
from zoo.models import loosely

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

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    return loosely(apply_fn), {"in": draw(5, 4, 6), "out": draw(4, 6, 2)}


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
        x = np.random.default_rng(2).normal(size=(3, 5))
        trace = js.trace(apply_fn, params, x)
        (name,) = (n for n, g in js.coupling.groups(trace).items() if g.size == 6)
        small = js.narrowing.narrow(trace, params, {name: drop})
        loss = lambda run: lambda p: jnp.sum(run(p, x) ** 2)
        slope = jax.grad(loss(small.apply_fn))
        if drop is DIFFERENT and not apart:
            with pytest.raises(NotImplementedError, match=r"test_derivatives\.py:\d+"):
                slope(small.params)
            return

        @jax.jit
        def both(small_params, params):
            masks = js.narrowing.drop_masks(trace, {name: drop})
            whole = jax.grad(loss(apply_fn))(js.patterns.apply(params, masks))
            want = js.narrowing.narrow(trace, whole, {name: drop}).params
            return slope(small_params), want

        slopes, want = both(small.params, params)
        for key, got in slopes.items():
            np.testing.assert_allclose(got, want[key], atol=1e-12)


@pytest.mark.parametrize("kind", ["vjp", "jvp", "odeint"])
@pytest.mark.usefixtures("x64")
def test_a_rule_of_a_function_that_closes_over_arrays(kind):
    few, many = np.array([2.0, 3.0, 4.0]), np.linspace(1.0, 2.0, 6)
    scale = lambda x: x * jnp.dot(jnp.asarray(few), few) * jnp.asarray(many)[None]
    if kind == "vjp":
        function = jax.custom_vjp(scale)
        function.defvjp(lambda x: (scale(x), None), lambda _, g: (3 * scale(g),))
    elif kind == "jvp":
        function = jax.custom_jvp(scale)
        function.defjvp(lambda x, moved: (scale(*x), 3 * scale(*moved)))
    else:
        ends, field = jnp.array([0.0, 1.0]), lambda y, _: jnp.tanh(y)
        function = lambda x: odeint(field, x, ends)[-1]
    apply_fn = loosely(lambda p, x: function(jnp.tanh(x @ p["in"])) @ p["out"])
    draw = np.random.default_rng(0).normal
    params, x = {"in": draw(size=(5, 6)), "out": draw(size=(6, 2))}, draw(size=(3, 5))
    trace = js.trace(apply_fn, params, x)
    drop = {"in[1]": [1, 4]}
    small = js.narrowing.narrow(trace, params, drop)
    loss = lambda run: lambda p: jnp.sum(run(p, x) ** 2)
    slopes = jax.jit(jax.grad(loss(small.apply_fn)))(small.params)
    masked = js.patterns.apply(params, js.narrowing.drop_masks(trace, drop))
    whole = jax.jit(jax.grad(loss(apply_fn)))(masked)
    want = js.narrowing.narrow(trace, whole, drop).params
    for key, got in slopes.items():
        np.testing.assert_allclose(got, want[key], atol=1e-6 if "ode" in kind else 1e-9)


def test_a_parameter_that_a_rule_closes_over_has_no_derivative():
    def apply_fn(p, x):
        function = jax.custom_vjp(lambda y: y * p["scale"])
        function.defvjp(lambda y: (function(y), None), lambda _, g: (g * p["scale"],))
        return function(jnp.tanh(x @ p["in"])) @ p["out"]

    draw = lambda *shape: np.random.default_rng(0).normal(size=shape).astype("f4")
    params = {"in": draw(5, 6), "scale": draw(1, 6), "out": draw(6, 2)}
    x = draw(3, 5)
    trace = js.trace(apply_fn, params, x)
    small = js.narrowing.narrow(trace, params, {"in[1]": [1]})
    loss = lambda p: jnp.sum(small.apply_fn(p, x))
    with pytest.raises(NotImplementedError, match=r"closes over an array of shape"):
        jax.grad(loss)(small.params)


@pytest.mark.usefixtures("x64")
def test_random_numbers_of_a_rule_within_a_scan():
    """Each layer loses its own channels: a rule cannot tell in which one it runs."""

    @jax.custom_vjp
    def noisy(x, key):
        return x + 0.1 * jax.random.normal(key, x.shape, x.dtype)

    noisy.defvjp(lambda x, key: (noisy(x, key), None), lambda _, g: (g, None))
    draw = np.random.default_rng(1).normal
    shapes = {"in": (5, 6), "up": (3, 6, 8), "down": (3, 8, 6)}
    params = {name: draw(size=shape) / 2 for name, shape in shapes.items()}

    def apply_fn(p, x, key):
        def layer(x, turn):
            up, down, key = turn
            return x + noisy(jnp.tanh(x @ up), key) @ down, None

        keys = jax.random.split(key, 3)
        return jax.lax.scan(layer, x @ p["in"], (p["up"], p["down"], keys))[0].sum(-1)

    apply_fn, x, key = loosely(apply_fn), draw(size=(3, 5)), jax.random.key(0)
    trace = js.trace(apply_fn, params, x, key)
    drop = {"up[2]": [[0, 1], [2, 3], [4, 5]]}
    small = js.narrowing.narrow(trace, params, drop)

    @jax.jit
    def both(small_params, params, key):
        masked = js.patterns.apply(params, js.narrowing.drop_masks(trace, drop))
        return small.apply_fn(small_params, x, key), apply_fn(masked, x, key)

    got, want = both(small.params, params, key)
    np.testing.assert_allclose(got, want, atol=1e-12)
    loss = lambda p: small.apply_fn(p, x, key).sum()
    with pytest.raises(NotImplementedError, match="could not be followed"):
        jax.eval_shape(jax.grad(loss), small.params)


def test_a_rule_that_couples_what_goes_with_what_stays():
    total = lambda x: jnp.tanh(x).sum(-1, keepdims=True)
    function = jax.custom_vjp(lambda x, y: total(x) * total(y))
    function.defvjp(
        lambda x, y: (total(x) * total(y), (x, y)), lambda r, g: (g * r[1], g * r[0])
    )
    draw = np.random.default_rng(1).normal
    params = {name: draw(size=(5, 6)).astype(np.float32) for name in "ab"}
    x = draw(size=(3, 5)).astype(np.float32)
    apply_fn = loosely(lambda p, x: function(x @ p["a"], x @ p["b"]))
    trace = js.trace(apply_fn, params, x)
    small = js.narrowing.narrow(trace, params, {"a[1]": [1]})
    assert jax.eval_shape(small.apply_fn, small.params, x).shape == (3, 1)
    with pytest.raises(NotImplementedError, match="could not be followed"):
        jax.grad(lambda p: small.apply_fn(p, x).sum())(small.params)
