"""Second-order kernels against the papers' sequential recursions in torch.

The reference runs on the CPU, in float32, one gradient after another (`_sequential.py`,
verified against the originals). On an accelerator ours stand alone.
Pin the threads of OpenBLAS (`OPENBLAS_NUM_THREADS=1`, set below), and keep the machine
idle: torch's threads lose up to ten times their speed when a core is taken.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.curvature.block_sums import sum_up
from jaxsparse.curvature.layout import block_layout

sequential = None
try:
    import _sequential as sequential
    import torch
except ImportError:
    torch = None

DAMPING = 1e-5


def gradients(shape, m: int) -> dict:
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.standard_normal((m, *shape), np.float32))}


def to_torch(x):
    """The matrix view `[m, d_out * d_in]`, which is what the papers call flat."""
    flat = np.ascontiguousarray(np.moveaxis(np.asarray(x), 1, -1))
    return torch.from_numpy(flat.reshape(flat.shape[0], -1))


def needs_torch(large: bool) -> bool:
    if torch is None and not large:
        pytest.skip("torch is not installed: pip install torch (a benchmark's need)")
    return not large


def sizes(large: bool):
    """A kernel of 1e6 weights; on an accelerator BERT-base's feed-forward kernels."""
    return (12 * 768, 3072) if large else (1000, 1000)


@pytest.mark.parametrize(("b", "m"), [(50, 256), (128, 128)], ids=["obert", "mfac"])
def test_block_inverse(b, m, large, compare, record):
    """The inverse in blocks: `obert` by rank-one updates of it, `mfac` by M-FAC's own
    recursion with its diagonal, a batch of blocks at a time, as each is published."""
    shape = (9200, 3000) if large and b == 50 else sizes(large)
    shape = (768, 3072) if large and b == 128 else shape
    grads = gradients(shape, m if not large else 64)
    fisher = functools.partial(js.curvature.block_fisher, grads, block_size=b)
    ours = lambda accurate: (
        lambda: js.curvature.inverse_diagonal(
            fisher(damping=DAMPING, accurate=accurate)
        )
    )
    calls = {}
    if needs_torch(large):
        torch.set_num_threads(os.cpu_count())
        g = to_torch(grads["w"])

        def theirs():
            if b == 50:
                inverse = sequential.block_inverse(g, b, DAMPING)
                return sequential.block_diagonal(inverse).numpy()
            blocks = g.reshape(m, -1, b)[:, : g.shape[1] // b].transpose(0, 1)
            static = sequential.static_init(blocks.contiguous(), DAMPING, perbatch=62)
            return sequential.static_diagonal(static).numpy()

        if g.shape[1] % b == 0:
            calls["torch, sequential"] = theirs
        else:
            g = g[:, : g.shape[1] // b * b].contiguous()
            calls["torch, sequential"] = theirs
        ordered = np.moveaxis(np.asarray(ours(True)()["w"]), 0, -1).reshape(-1)
        found = theirs().reshape(-1)
        size = min(len(found), len(ordered))
        np.testing.assert_allclose(ordered[:size], found[:size], rtol=2e-2)
    calls["jaxsparse"] = ours(True)
    calls["jaxsparse, accurate=False"] = ours(False)
    d = int(np.prod(shape))
    flops = 2 * m * b * d + 2 * b * b * d
    compare(f"block inverse and diagonal, d={d:.0e}, b={b}, m={m}", calls, rounds=3)
    record(
        benchmark=f"block inverse and diagonal, d={d:.0e}, b={b}, m={m}",
        what="floor: GFLOP, bytes",
        gflop=round(flops / 1e9, 1),
        gbytes=round(4 * d * (m + b + 1) / 1e9, 2),
    )


def test_block_memory(large, record):
    shape, m, b = sizes(large), 64, 50
    layout = block_layout("w", shape, block_size=b)
    g = jax.ShapeDtypeStruct((m, *shape), jnp.float32)
    compiled = sum_up.lower(None, g, layout=layout, accurate=True).compile()
    analysis = compiled.memory_analysis()
    d = int(np.prod(shape))
    record(
        benchmark=f"block sums, d={d:.0e}, b={b}: float32 a weight",
        what="kept / scratch",
        kept=round(analysis.output_size_in_bytes / 4 / d, 2),
        scratch=round(analysis.temp_size_in_bytes / 4 / d, 2),
    )


@pytest.mark.parametrize("b", [50, 128], ids=["obert", "mfac"])
def test_block_products(b, large, compare):
    """What a finished inverse is for: `obert` keeps it whole, `mfac` as m vectors."""
    shape, m = sizes(large), 64 if b == 50 else 128
    grads = gradients(shape, m)
    fisher = js.curvature.block_fisher(grads, block_size=b, damping=DAMPING)
    x = {"w": jnp.ones(shape)}
    ihvp = jax.jit(js.curvature.ihvp)
    diagonal = jax.jit(js.curvature.inverse_diagonal)
    products, diagonals = {}, {}
    if needs_torch(large):
        g = to_torch(grads["w"])
        g = g[:, : g.shape[1] // b * b].contiguous()
        if b == 50:
            inverse = sequential.block_inverse(g, b, DAMPING)
            multiply, take = sequential.block_mul, sequential.block_diagonal
        else:
            blocks = g.reshape(m, -1, b).transpose(0, 1).contiguous()
            inverse = sequential.static_init(blocks, DAMPING, perbatch=62)
            multiply, take = sequential.static_mul, sequential.static_diagonal
        flat = torch.ones(g.shape[1])
        products["torch"] = lambda: multiply(inverse, flat).numpy()
        diagonals["torch"] = lambda: take(inverse).contiguous().numpy()
    products["jaxsparse"] = lambda: ihvp(fisher, x)
    diagonals["jaxsparse"] = lambda: diagonal(fisher)
    d = int(np.prod(shape))
    gigabytes = 4 * d * (b + 3) / 1e9
    compare(f"block product, d={d:.0e}, b={b} ({gigabytes:.2f} GB)", products)
    compare(f"block diagonal, d={d:.0e}, b={b} ({gigabytes:.2f} GB)", diagonals)


@pytest.mark.parametrize("accurate", [True, False])
def test_full_mfac(accurate, large, compare):
    """All weights in one matrix: no peer does this without an O(m^2 d) recursion."""
    shape, m = ((5000, 5000), 1024) if large else ((1000, 1000), 128)
    grads = gradients(shape, m)
    x = {"w": jnp.ones(shape)}
    make = lambda: (
        js.curvature.mfac(grads, damping=DAMPING, accurate=accurate).root.square
    )
    fisher = js.curvature.mfac(grads, damping=DAMPING, accurate=accurate)
    ihvp = jax.jit(js.curvature.ihvp)
    diagonal = jax.jit(js.curvature.inverse_diagonal)
    d = int(np.prod(shape))
    name = f"full M-FAC, d={d:.0e}, m={m}, {accurate=}"
    calls, products = {}, {}
    if needs_torch(large) and accurate:
        g = to_torch(grads["w"]).unsqueeze(0)
        static = sequential.static_init(g, DAMPING)
        flat = torch.ones(1, d)
        calls["torch, sequential"] = lambda: sequential.static_init(g, DAMPING)
        products["torch"] = lambda: sequential.static_mul(static, flat).numpy()
    flops = {"factor": 2 * m * m * d, "diagonal": 2 * m * m * d}
    calls |= {"jaxsparse": make, "jaxsparse, diagonal": lambda: diagonal(fisher)}
    compare(f"{name} ({flops['factor'] / 1e9:.0f} GFLOP each)", calls, rounds=3)
    products["jaxsparse"] = lambda: ihvp(fisher, x)
    compare(f"{name}, product ({8 * m * d / 1e9:.1f} GB)", products)
    compiled = ihvp.lower(fisher, x).compile().memory_analysis()
    assert compiled.temp_size_in_bytes < 4 * m * d / 4, "a second copy of G"


@pytest.mark.parametrize("m", [128, 512])
def test_dynamic_mfac(m, large, compare):
    """One gradient replaced, and the product with the newest: M-FAC's optimizer."""
    shape, m = ((5000, 5000), 1024) if large else ((1000, 1000), m)
    d = int(np.prod(shape))
    g = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))}
    # The same gradient in every turn: only beside a damping of its size is the
    # reference's matrix one that float32 can factor.
    state = js.curvature.window_init(g, window=m, damping=1.0)

    step = jax.jit(js.curvature.window_update_ihvp, donate_argnums=0)
    carried = [state]

    def ours():
        carried[0], product = step(carried[0], g)
        return product

    calls = {}
    if needs_torch(large):
        window = sequential.Window(m, d, 1.0)
        flat = torch.from_numpy(np.asarray(g["w"]).reshape(-1).copy())
        calls["torch"] = lambda: window.update_mul(flat).numpy()
    calls["jaxsparse"] = ours
    once = jax.jit(lambda rows, c: c @ rows)
    rows = jnp.ones((m, d), jnp.float32)
    c = jnp.ones(m)
    calls["floor: half of it, one pass over the window"] = lambda: once(rows, c)
    compare(f"dynamic M-FAC, d={d:.0e}, m={m} ({8 * m * d / 1e9:.1f} GB)", calls)
