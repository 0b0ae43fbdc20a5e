"""Dense layers that learn digits: plain functions, parameters in a dictionary."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from _data import digits

_digits = digits()
flat = lambda images: jnp.asarray(images.reshape(len(images), -1))
x, y = flat(_digits.x), jnp.asarray(_digits.y)
x_test, y_test = flat(_digits.x_test), jnp.asarray(_digits.y_test)

BATCH = 64


def init(key: jax.Array, sizes: Sequence[int]) -> dict:
    """The parameters of layers of these widths: `dense_0`, `dense_1`, ..."""
    draw = jax.nn.initializers.he_normal()
    return {
        f"dense_{i}": {
            "kernel": draw(jax.random.fold_in(key, i), (sizes[i], sizes[i + 1])),
            "bias": jnp.zeros(sizes[i + 1]),
        }
        for i in range(len(sizes) - 1)
    }


def apply(params: dict, x: jax.Array) -> jax.Array:
    """The logits [n, 10]."""
    last = len(params) - 1
    for i in range(last + 1):
        x = x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"]
        x = jax.nn.relu(x) if i < last else x
    return x


def loss_fn(params: dict, x: jax.Array = x, y: jax.Array = y) -> jax.Array:
    """The mean cross entropy, of all training images if none are given."""
    logits = apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(params: dict) -> jax.Array:
    """The fraction of the test images whose class is found."""
    return jnp.mean(jnp.argmax(apply(params, x_test), axis=-1) == y_test)


class Trained(NamedTuple):
    """What a training leaves."""

    params: dict
    opt_state: optax.OptState
    losses: jax.Array  # of all training images, after each `every` steps


def train(
    tx: optax.GradientTransformation,
    params: dict,
    key: jax.Array,
    *,
    steps: int,
    every: int | None = None,
) -> Trained:
    """The usual loop as a `lax.scan`: the key draws the batches."""

    def step(carry, rows):
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params, x[rows], y[rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def record(carry, rows):
        carry, _ = jax.lax.scan(step, carry, rows)
        return carry, loss_fn(carry[0])

    every = every or steps
    rows = jax.random.randint(key, (steps // every, every, BATCH), 0, len(x))
    (params, state), losses = jax.lax.scan(record, (params, tx.init(params)), rows)
    return Trained(params, state, losses)
