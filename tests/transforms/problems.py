"""A small problem that every optimizer can make progress on, and the optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 80


def params() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.device_put(rng.standard_normal(shape).astype(np.float32))
    return {
        "dense_0": {"kernel": draw(16, 12), "bias": draw(12)},
        "dense_1": {"kernel": draw(12, 8)},
    }


@jax.jit
def loss(params: dict, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"][None])
    return jnp.mean((h @ params["dense_1"]["kernel"] - 1.0) ** 2)


@functools.cache
def batch(step: int) -> jax.Array:
    numbers = np.random.default_rng([1, step]).standard_normal((32, 16))
    return jax.device_put(numbers.astype(np.float32))


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-2),
    "lion": lambda: optax.lion(3e-3),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(1e-2),
    "noisy_sgd": lambda: optax.noisy_sgd(0.02, key=jax.random.key(3)),
}


def train(tx, params, *, steps=STEPS, apply=None, start=0, opt_state=None, seen=None):
    """Trains with one jitted step; `seen(step, params, opt_state)` looks on."""
    apply = apply or (lambda params, updates, _: optax.apply_updates(params, updates))

    @jax.jit
    def step(params, opt_state, x):
        grads = jax.grad(loss)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return apply(params, updates, opt_state), opt_state

    opt_state = jax.jit(tx.init)(params) if opt_state is None else opt_state
    for t in range(start, steps):
        params, opt_state = step(params, opt_state, batch(t))
        if seen is not None:
            seen(t, params, opt_state)
    return params, opt_state
