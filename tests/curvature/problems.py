"""Gradient trees, and the float64 oracle of what a block Fisher matrix says of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from reference import second_order as ref

import jaxsparse as js

STACKED = js.Axes(input=(1,), output=(2,), batch=(0,))
DENSE = js.Axes(input=(0,), output=(1,))
CONV = js.Axes(input=(0, 1, 2), output=(3,))
AXES = {"stacked": STACKED}  # what the library cannot know
M = 12
SIZE = 8  # of a block
SHAPES = {
    "conv": ((2, 2, 3, 2), CONV),
    "kernel": ((6, 5), DENSE),  # 30 weights: the last block holds 6
    "stacked": ((2, 5, 3), STACKED),  # 15 weights in each layer
}


def values(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@functools.cache
def tree(names=tuple(SHAPES), seed=0):
    """Gradients; those of the stacked layers in 16 bits."""
    grads = {k: values(M, *SHAPES[k][0], seed=seed) for k in names}
    if "stacked" in grads:
        grads["stacked"] = grads["stacked"].astype(jnp.bfloat16)
    return jax.device_put(grads) | {"apart": None}


def weights(names=tuple(SHAPES), seed=1):
    return {k: jax.device_put(values(*SHAPES[k][0], seed=seed)) for k in names}


def index_blocks(shape, axes, size):
    """For each block the flat indices of its weights: outputs first, inputs within."""
    index = np.arange(np.prod(shape)).reshape(shape)
    index = index.transpose(*axes.batch, *axes.output, *axes.input)
    layers = int(np.prod([shape[a] for a in axes.batch]))
    layers = index.reshape(layers, -1)
    blocks = ref.blocks_of(layers.shape[1], size)
    return [layer[block] for layer in layers for block in blocks]


def flat(x, extra=0):
    x = np.asarray(x, np.float64)
    return x.reshape(*x.shape[:extra], -1)


def dense(grads, axes, size, damping):
    """Indices and `F` of each block of a parameter's gradients [m, *shape]."""
    indices = index_blocks(grads.shape[1:], axes, size)
    g, damping = flat(grads, 1), float(np.float32(damping))
    return [(at, ref.fisher(g[:, at], damping)) for at in indices]


def by_blocks(grads, axes, size, damping, f, *arrays):
    """`f(F, *arrays of the block)` put together, of the parameter's shape."""
    arrays = [np.asarray(x).reshape(-1) for x in arrays]
    out = np.zeros(arrays[0].size if arrays else np.prod(grads.shape[1:]))
    for at, fisher in dense(grads, axes, size, damping):
        out[at] = f(fisher, *(x[at] for x in arrays))
    return out.reshape(grads.shape[1:])


def inverse_diagonal(fisher):
    return np.diag(np.linalg.inv(fisher))


def assert_near(got, expected, tolerance=1e-5):
    """Relative to the largest expected number."""
    expected = np.asarray(expected, np.float64)
    error = np.max(np.abs(np.asarray(got, np.float64) - expected))
    assert error <= tolerance * np.max(np.abs(expected)), error


def assert_each_near(got, expected, tolerance=1e-5):
    """Each number relative to itself."""
    expected = np.asarray(expected, np.float64)
    error = np.max(np.abs(np.asarray(got, np.float64) / expected - 1))
    assert error <= tolerance, error
