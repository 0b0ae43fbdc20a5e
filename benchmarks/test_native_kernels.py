"""Products with sparse weights by native kernels, against jitted dense XLA.

Six feed-forward pairs, 768 to 3072 and back, run one after the other: their dense
weights exceed every cache, as those of a model do. The floor of a row is the larger of
two times: of reading the packed weights at the bandwidth of memory and of the
multiplications at the speed of a large dense product, both measured in the same run
(int8: four times that speed). Weights that a cache keeps can be read in less.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.kernels import _native as native

PAIRS, WIDE, NARROW = 6, 3072, 768
BATCHES, SPARSITIES = (1, 16, 128), (0.9, 0.95)
KINDS = {
    "CSR": native.csr_matmul,
    "4x1 tiles": native.tiles4_matmul,
    "int8 tiles": native.int8_tiles_matmul,
}


@pytest.fixture(autouse=True)
def library():
    if not native.available():
        pytest.skip(native.why_not())


@functools.cache
def masks(kind: str, sparsity: float, shape: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng([shape[0], round(100 * sparsity)])
    d_in, d_out = shape
    tile = {"CSR": (1, 1), "4x1 tiles": (1, 4), "int8 tiles": (4, 1)}[kind]
    kept = lambda: rng.random((d_in // tile[0], d_out // tile[1])) >= sparsity
    return [np.kron(kept(), np.ones(tile, bool)) for _ in range(PAIRS)]


@functools.cache
def dense_weights() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    draw = lambda d_in, d_out: np.float32(
        rng.standard_normal((d_in, d_out)) * (10 / d_in) ** 0.5
    )
    return [(draw(NARROW, WIDE), draw(WIDE, NARROW)) for _ in range(PAIRS)]


def structure(there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum(there.sum(1))]).astype(np.int32)
    return np.nonzero(there)[1].astype(np.uint16), offsets


def pack(kind: str, w: np.ndarray, mask: np.ndarray) -> tuple:
    """What the kernel of a kind takes."""
    if kind == "CSR":
        return (w.T[mask.T], *structure(mask.T))
    if kind == "4x1 tiles":
        there = mask[:, ::4].T
        return (w.reshape(len(w), -1, 4).swapaxes(0, 1)[there], *structure(there))
    there = mask[::4].T
    scale = np.abs(w).max(0) / 127
    q = np.round(w / scale).astype(np.int8).T.reshape(w.shape[1], -1, 4)
    return (q[there], np.float32(scale), *structure(there))


@functools.cache
def packed(kind: str, sparsity: float) -> list:
    up, down = (masks(kind, sparsity, s) for s in ((NARROW, WIDE), (WIDE, NARROW)))
    both = zip(dense_weights(), up, down, strict=True)
    return jax.device_put([
        (pack(kind, a, m), pack(kind, b, n)) for (a, b), m, n in both
    ])


def model(matmul):
    """The pairs in a row, each with a rectifier inside and a sum around it."""

    def apply(weights, x):
        for up, down in weights:
            x = x + matmul(jax.nn.relu(matmul(x, up)), down)
        return x

    return apply


dense_model = model(jnp.matmul)


def sparse_model(kind):
    return model(lambda x, packed: KINDS[kind](x, *packed))


def activations(batch: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, NARROW))


@functools.cache
def machine() -> tuple[float, float]:
    """Bytes a second from memory, and float32 operations a second."""
    large = jnp.ones((64, 1 << 21), jnp.float32)
    square = jnp.ones((2048, 2048), jnp.float32)
    read = best_of(jax.jit(lambda x: x.sum(1)), large)
    return large.nbytes / read, 2 * 2048**3 / best_of(jax.jit(jnp.dot), square, square)


def best_of(call, *args, turns: int = 7) -> float:
    jax.block_until_ready(call(*args))
    times = []
    for _ in range(turns):
        begin = time.perf_counter()
        jax.block_until_ready(call(*args))
        times.append(time.perf_counter() - begin)
    return min(times)


def floor_ms(weights: list, batch: int, passes: int = 1) -> float:
    bandwidth, speed = machine()
    leaves = jax.tree.leaves(weights)
    values = [x for x in leaves if x.dtype in (jnp.float32, jnp.int8) and x.size > WIDE]
    read = passes * sum(x.nbytes for x in leaves) / bandwidth
    operations = passes * 2 * batch * sum(x.size * x.itemsize / 4 for x in values)
    return round(1e3 * max(read, operations / speed), 3)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, sparsity, batch, compare):
    x, dense = activations(batch), jax.device_put(dense_weights())
    weights = packed(kind, sparsity)
    ours, theirs = jax.jit(sparse_model(kind)), jax.jit(dense_model)
    pruned = [
        (jnp.where(m, a, 0), jnp.where(n, b, 0))
        for (a, b), m, n in zip(
            dense_weights(),
            masks(kind, sparsity, (NARROW, WIDE)),
            masks(kind, sparsity, (WIDE, NARROW)),
            strict=True,
        )
    ]
    found, expected = np.asarray(ours(weights, x)), np.asarray(theirs(pruned, x))
    bound = 0.05 if kind == "int8 tiles" else 1e-4
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)
    compare(
        f"{PAIRS} pairs 768x3072, {kind} at {100 * sparsity:.0f} %, batch {batch}",
        {"dense XLA": lambda: theirs(dense, x), "native": lambda: ours(weights, x)},
        floor_ms=floor_ms(weights, batch),
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kind", ["CSR", "4x1 tiles"])
def test_forward_and_backward(kind, sparsity, compare):
    """Gradients of all weights and of the inputs, at batch 128."""
    x, dense = activations(128), jax.device_put(dense_weights())
    weights = packed(kind, sparsity)
    values = [(up[0], down[0]) for up, down in weights]

    def ours(values, x):
        given = zip(values, weights, strict=True)
        whole = [((v, *a[1:]), (u, *b[1:])) for (v, u), (a, b) in given]
        return jnp.sum(sparse_model(kind)(whole, x) ** 2)

    theirs = lambda dense, x: jnp.sum(dense_model(dense, x) ** 2)
    our_grad, their_grad = (jax.jit(jax.grad(f, (0, 1))) for f in (ours, theirs))
    compare(
        f"{PAIRS} pairs 768x3072, forward and backward, {kind} at "
        f"{100 * sparsity:.0f} %, batch 128",
        {
            "dense XLA": lambda: their_grad(dense, x),
            "native": lambda: our_grad(values, x),
        },
        floor_ms=floor_ms(weights, 128, passes=3),
    )
