"""Adapters on a pruned base: values, gradients and importance by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js
from jaxsparse import masking

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base():
    return {"kernel": jnp.asarray(numbers(0, 6, 4)), "bias": jnp.ones(4)}


def test_a_pruned_base_stays_pruned_while_adapters_learn():
    pruned, masks = js.prune(base(), 0.5)
    x, y = numbers(1, 32, 6), numbers(2, 32, 4)
    start = masking.init_adapters(pruned, key=KEY, rank=2)

    def loss(adapters):
        whole = masking.with_adapters(pruned, adapters, masks=masks, scaling=2.0)
        return jnp.mean((x @ whole["kernel"] + whole["bias"] - y) ** 2)

    tx = optax.adam(0.05)

    def step(carry, _):
        adapters, state = carry
        updates, state = tx.update(jax.grad(loss)(adapters), state)
        return (optax.apply_updates(adapters, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=100)[0])
    adapters, _ = run((start, tx.init(start)))
    assert loss(adapters) < 0.9 * loss(start)
    merged = masking.with_adapters(pruned, adapters, masks=masks, scaling=2.0)
    np.testing.assert_array_equal(merged["kernel"] != 0, masks["kernel"])
    a, b = adapters["kernel"]
    expected = np.where(masks["kernel"], pruned["kernel"] + 2 * (a @ b), 0)
    np.testing.assert_allclose(merged["kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["bias"], pruned["bias"])


def test_the_base_gets_no_gradient():
    adapters = masking.init_adapters(base(), key=KEY, rank=2)
    f = lambda p: jnp.sum(masking.with_adapters(p, adapters)["kernel"] ** 2)
    assert not np.any(jax.grad(f)(base())["kernel"])


def test_flax_adapters_merge_into_their_kernel():
    linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    lora = nnx.LoRA(6, 2, 4, base_module=linear, rngs=nnx.Rngs(1))
    lora.lora_b[...] = jnp.asarray(numbers(3, 2, 4))
    adapters = {"kernel": masking.Adapter(lora.lora_a[...], lora.lora_b[...])}
    params = {"kernel": linear.kernel[...], "bias": linear.bias[...]}
    merged = masking.with_adapters(params, adapters)
    x = numbers(4, 3, 6)
    np.testing.assert_allclose(
        x @ merged["kernel"] + merged["bias"], lora(x), rtol=1e-4, atol=1e-5
    )


def test_importance_needs_the_gradients_of_factors_alone():
    params = base()
    a, b, g_a, g_b = (
        jnp.asarray(numbers(i, *shape))
        for i, shape in enumerate([(6, 2), (2, 4), (6, 2), (2, 4)])
    )
    found = masking.adapter_importance(
        params,
        {"kernel": masking.Adapter(a, b)},
        {"kernel": masking.Adapter(g_a, g_b)},
        scaling=0.5,
    )
    assert found["bias"] is None
    a, b, g_a, g_b = map(np.float64, (a, b, g_a, g_b))
    change = a @ g_b + g_a @ b - g_a @ g_b
    expected = np.abs(change * (np.float64(params["kernel"]) + 0.5 * a @ b))
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_errors_name_what_does_not_fit():
    params = base()
    wrong = {"kernel": masking.Adapter(jnp.ones((5, 2)), jnp.ones((2, 4)))}
    with pytest.raises(ValueError, match=r"kernel has factors of shapes \(5, 2\)"):
        masking.with_adapters(params, wrong)
    with pytest.raises(ValueError, match="other is no parameter"):
        masking.with_adapters(params, {"other": wrong["kernel"]})
    with pytest.raises(TypeError, match=r"a tree of js\.masking\.Adapter"):
        masking.with_adapters(params, {"kernel": jnp.ones((6, 4))})
    with pytest.raises(ValueError, match="bias: adapters are of matrices"):
        masking.init_adapters(params, key=KEY, where=lambda path, leaf: True)
