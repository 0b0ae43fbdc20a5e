"""Two kernels with correlated gradients, and their dense Fisher matrices."""

import jax.numpy as jnp
import numpy as np
from reference import second_order as oracle

SHAPE, M, BLOCK, DAMPING = (12, 8), 24, 12, 1e-3
KERNELS = ("a", "b")


def params(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return {k: {"kernel": draw(*SHAPE), "bias": draw(8)} for k in KERNELS}


def grads(seed=0, dtype="float32", biases=False):
    """Inputs that are sums of each other: removing one, others can take over."""
    rng = np.random.default_rng(seed + 1000)
    mix = np.eye(12) + 0.5 * rng.standard_normal((12, 12))
    found = {}
    for k in KERNELS:
        inputs, signals = (
            rng.standard_normal((M, 12)) @ mix,
            rng.standard_normal((M, 8)),
        )
        g = inputs[:, :, None] * signals[:, None, :]
        bias = jnp.asarray(signals, dtype) if biases else None
        found[k] = {"kernel": jnp.asarray(g, dtype), "bias": bias}
    return found


def rows(kernel):
    """A kernel as blocks see it: row by row of `[d_out, d_in]`; gradients `[m, d]`."""
    kernel = np.asarray(kernel, np.float64)
    return np.swapaxes(kernel, -1, -2).reshape(*kernel.shape[:-2], -1)


def vector(tree):
    """Both kernels in one."""
    return np.concatenate([rows(tree[k]["kernel"]) for k in KERNELS], axis=-1)


def kernels(vec, like):
    """The inverse of `vector`, with the biases of `like`."""
    halves = np.split(np.asarray(vec), 2)
    kernel = lambda half: jnp.asarray(half.reshape(8, 12).T)
    return {
        k: {**like[k], "kernel": kernel(half)}
        for k, half in zip(KERNELS, halves, strict=True)
    }


def blocked(fisher, size=BLOCK):
    """The blocks on the diagonal alone."""
    number = np.arange(len(fisher)) // size
    return np.where(number[:, None] == number[None], fisher, 0.0)


def dense(grads, size=BLOCK):
    """What `block_fisher` approximates."""
    return blocked(oracle.fisher(vector(grads), DAMPING), size)


def loss(fisher, pruned, params):
    """`1/2 dw^T F dw`."""
    return oracle.loss_increase(vector(pruned) - vector(params), fisher)
