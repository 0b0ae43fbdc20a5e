"""Products with packed kernels against jitted dense ones, in turn.

The weights of a run exceed the caches: the pairs of layers are different ones. Floors:
the bytes of the weights over the bandwidth of memory for one row, and operations over
those of a large dense product for many, both measured in the same run.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

AXES = js.Axes((0,), (1,))
PATTERNS = {
    "128x1 balanced": js.Balanced((1, 128)),
    "16x16 balanced": js.Balanced((16, 16)),
    "16x1 balanced": js.Balanced((1, 16)),
    "4x1 balanced": js.Balanced((1, 4)),
    "128x1": js.Block((1, 128)),
    "4x1": js.Block((1, 4)),
    "single weights": js.Unstructured(),
}


def draw(shape, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)


@functools.cache
def bandwidth() -> float:
    """Bytes a second, of reading 256 MB."""
    x = jnp.ones(2**26)
    read = jax.jit(jnp.max)
    return x.nbytes / best_of(lambda: read(x))


@functools.cache
def peak() -> float:
    """Operations a second, of a dense product of 2048 by 2048."""
    x = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    return 2 * 2048**3 / best_of(lambda: product(x, x))


def best_of(call, rounds=7) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return min(times)


def floor_ms(params, kept: float, batch: int) -> float:
    """What memory and arithmetic allow at least, in milliseconds."""
    taken = sum(x.nbytes for x in jax.tree.leaves(params))
    return 1e3 * max(taken / bandwidth(), 2 * kept * batch / peak())


@functools.cache
def pruned_pairs(pattern: str, sparsity: float, large: bool):
    """Layers 768 to 3072 and back: 6 pairs are 113 MB."""
    scale, pairs = (4, 8) if large else (1, 6)
    params = {}
    for i in range(pairs):
        params[f"{i}/up"] = draw((768 * scale, 3072 * scale), 2 * i)
        params[f"{i}/down"] = draw((3072 * scale, 768 * scale), 2 * i + 1)
    return js.prune(params, sparsity, pattern=PATTERNS[pattern], axes=AXES)


def feed_forward(params, x):
    for i in range(len(params) // 2):
        x = jax.nn.relu(x @ params[f"{i}/up"]) @ params[f"{i}/down"]
    return x


@pytest.mark.parametrize("batch", [1, 16, 128])
@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_of_layers(pattern, sparsity, batch, compare, large):
    params, masks = pruned_pairs(pattern, sparsity, large)
    x = draw((batch, params["0/up"].shape[0]), 99)
    trace = js.trace(feed_forward, params, x)
    sparse = js.kernels.sparsify(trace, params, masks)
    dense, packed = jax.jit(feed_forward), jax.jit(sparse.apply_fn)
    want = dense(params, x)
    np.testing.assert_allclose(
        packed(sparse.params, x), want, atol=1e-4 * float(jnp.abs(want).max())
    )
    kept = sum(int(m.sum()) for m in masks.values())
    engines = "/".join(sorted({layer.engine for layer in sparse.layers.values()}))
    calls = {
        "dense": lambda: dense(params, x),
        f"packed ({engines})": lambda: packed(sparse.params, x),
    }
    name = f"{pattern}, {sparsity:.0%}, batch {batch}"
    compare(name, calls, floor_ms=floor_ms(sparse.params, kept, batch))


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize("pattern", ["128x1 balanced", "16x16 balanced"])
def test_forward_and_backward(pattern, sparsity, compare, large):
    """Of the kept values against all weights, at a batch of 128."""
    params, masks = pruned_pairs(pattern, sparsity, large)
    x = draw((128, params["0/up"].shape[0]), 99)
    sparse = js.kernels.sparsify(js.trace(feed_forward, params, x), params, masks)

    def loss(values, packed):
        return jnp.sum(sparse.apply_fn(js.formats.with_values(packed, values), x) ** 2)

    dense = jax.jit(jax.grad(lambda p: jnp.sum(feed_forward(p, x) ** 2)))
    packed, values = jax.jit(jax.grad(loss)), js.formats.values(sparse.params)
    calls = {
        "dense": lambda: dense(params),
        "packed": lambda: packed(values, sparse.params),
    }
    compare(f"forward and backward, {pattern}, {sparsity:.0%}", calls)


def bert(params, x):
    """The layers of BERT-base: attention of 12 heads, 768 to 3072 and back."""

    def normal(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    for p in params:
        h = normal(x)
        q, k, v = ((h @ p[n]).reshape(*x.shape[:2], 12, -1) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8, -1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + y.reshape(x.shape) @ p["o"]
        x = x + jax.nn.gelu(normal(x) @ p["up"]) @ p["down"]
    return x


@functools.cache
def bert_params():
    d, layers = 768, 12
    shapes = dict.fromkeys("qkvo", (d, d)) | {"up": (d, 4 * d), "down": (4 * d, d)}
    return [
        {k: draw(s, 10 * i + j) for j, (k, s) in enumerate(shapes.items())}
        for i in range(layers)
    ]


def tokens():
    """One sequence of 128."""
    return draw((1, 128, 768), 99) * np.sqrt(128)


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_bert_base(sparsity, compare, record, large):
    """From end to end."""
    params, x = bert_params(), tokens()
    trace = js.trace(bert, params, x)
    pruned = js.prune(params, sparsity, pattern=js.Balanced((1, 128)), trace=trace)
    sparse = js.kernels.sparsify(trace, *pruned)
    dense, packed = jax.jit(bert), jax.jit(sparse.apply_fn)
    calls = {
        "dense": lambda: dense(pruned.params, x),
        "packed": lambda: packed(sparse.params, x),
    }
    compare(f"BERT-base, 128 tokens, 128x1 balanced, {sparsity:.0%}", calls)
    size = lambda tree: sum(w.nbytes for w in jax.tree.leaves(tree))
    share = size(sparse.params) / size(params)
    record(benchmark=f"BERT-base, {sparsity:.0%}", what="bytes", ratio=round(share, 4))
    del large


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_bert_base_by_compiled_kernels(sparsity, compare, record):
    """From end to end: tiles of four outputs in float32, and of four inputs in int8.

    Each has a mask of its own tiles, and is compared with its own masked model.
    """
    trace = js.trace(bert, bert_params(), tokens())
    dense, x, calls = jax.jit(bert), tokens(), {}
    title = f"BERT-base, 128 tokens, compiled, {sparsity:.0%}"
    kinds = {
        "4x1 float32": (js.Block((1, 4)), js.Block((1, 4))),
        "int8 tiles": (js.Block((4, 1)), js.formats.Int8Tiles),
    }
    for name, (pattern, format) in kinds.items():
        pruned = js.prune(bert_params(), sparsity, pattern=pattern, trace=trace)
        sparse = js.kernels.sparsify(trace, *pruned, format=format)
        engines = "/".join(sorted({layer.engine for layer in sparse.layers.values()}))
        packed = jax.jit(sparse.apply_fn)
        want, got = dense(pruned.params, x), packed(sparse.params, x)
        # Of what the layers add, not of what passes by them.
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want - x))
        calls.setdefault("dense", lambda params=pruned.params: dense(params, x))
        calls[f"{name} ({engines})"] = lambda f=packed, p=sparse.params: f(p, x)
        assert error < (0.05 if "int8" in name else 1e-4)
        record(benchmark=title, what=f"error of {name}", ratio=round(error, 6))
        kept = sum(int(m.sum()) for m in jax.tree.leaves(pruned.masks))
        speed = 4 if "int8" in name else 1  # of products, in those of float32
        floor = floor_ms(sparse.params, kept / speed, x.shape[1])
        record(benchmark=title, what=f"floor of {name}", floor_ms=round(floor, 3))
    compare(title, calls)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes(dtype, record):
    """Of an unstructured mask of a matrix of 2048 by 2048."""
    w = {"w": draw((2048, 2048), 0).astype(dtype)}
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        masks = js.prune(w, sparsity, axes=AXES).masks
        sizes = js.formats.sizes(w, masks, axes=AXES)["w"]
        for name in ("Bitmap", "Csr16"):
            ratio = round(sizes[name] / sizes["dense"], 4)
            record(benchmark=f"bytes, {dtype}, {sparsity:.0%}", what=name, ratio=ratio)
