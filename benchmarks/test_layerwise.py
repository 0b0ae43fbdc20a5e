"""Layer-wise solvers against a sweep column by column in torch.

The reference runs on the CPU, in float32 (`_column_sweep.py`); on an accelerator ours
stand alone. Pin the threads of OpenBLAS (set below) and keep the machine idle: torch's
threads lose up to ten times their speed when a core is taken.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

column_sweep = None
try:
    import _column_sweep as column_sweep
    import torch
except ImportError:
    torch = None

SIZES = [(768, 768), (3072, 768), (2048, 2048), (768, 3072)]
LARGE = [(4096, 4096), (14336, 4096), (4096, 14336)]  # of an 8B model
TWO_OF_FOUR = js.NM(keep=2, of=4)
PATTERNS = {"50 %": (js.Unstructured(), None), "2:4": (TWO_OF_FOUR, (2, 4))}
every_pattern = pytest.mark.parametrize("name", PATTERNS)


def layer(d_out: int, d_in: int):
    """A kernel and the second moment of correlated inputs, numpy float32."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    mix = np.eye(d_in, dtype=np.float32) + draw(d_in, d_in) / np.float32(d_in**0.5)
    x = draw(2 * d_in, d_in) @ mix
    return draw(d_out, d_in), x.T @ x / np.float32(2 * d_in)


def size_of(index: int, large: bool):
    sizes = LARGE if large else SIZES
    if index >= len(sizes):
        pytest.skip("fewer sizes on an accelerator")
    return sizes[index]


def reference(large: bool) -> bool:
    if torch is None and not large:
        pytest.skip("torch is not installed: pip install torch (a benchmark's need)")
    if not large:
        torch.set_num_threads(os.cpu_count())
    return not large


def error(w, new, gram) -> float:
    change = np.asarray(new) - w
    return float(np.sum((change @ gram) * change))


@pytest.mark.parametrize("index", range(len(SIZES)))
@every_pattern
def test_sparsegpt(index, name, large, compare, record):
    """From the gram matrix to the pruned weights, as a user calls it."""
    d_out, d_in = size_of(index, large)
    pattern, nm = PATTERNS[name]
    w, gram = layer(d_out, d_in)
    given = jnp.asarray(w), jnp.asarray(gram)
    ours = lambda: js.solvers.sparsegpt(*given, 0.5, pattern=pattern)
    title = f"SparseGPT, {d_out} x {d_in}, {name}"
    calls = {}
    if reference(large):
        kernel, moment = torch.from_numpy(w), torch.from_numpy(gram)
        theirs = lambda: column_sweep.sparsegpt(kernel, moment, 0.5, nm).numpy()
        calls["torch, column by column"] = theirs
        found, solved = theirs(), ours()
        ratio = float(solved.info.error) / error(w, found, gram)
        assert abs(ratio - 1) < 0.01
        record(
            benchmark=title,
            what="agreement",
            error_ratio=round(ratio, 5),
            mask=round(float(np.mean((found != 0) == np.asarray(solved.mask))), 6),
        )
    calls["jaxsparse"] = ours
    factor = js.curvature.factor_gram(given[1], rel_damping=0.01)
    calls["jaxsparse, from a factor"] = lambda: js.solvers.sparsegpt(
        given[0], factor, 0.5, pattern=pattern
    )
    compare(title, calls, rounds=5)


@pytest.mark.parametrize("d", [768, 2048])
def test_one_factor_for_q_k_v(d, large, compare):
    """Three kernels that read the same input."""
    w, gram = layer(d, d)
    kernels, moment = [jnp.asarray(w * s) for s in (1, 2, 3)], jnp.asarray(gram)
    prune = js.solvers.sparsegpt

    def shared():
        factor = js.curvature.factor_gram(moment, rel_damping=0.01)
        return [prune(kernel, factor, 0.5) for kernel in kernels]

    calls = {}
    if reference(large):
        theirs, own = [torch.from_numpy(w * s) for s in (1, 2, 3)], torch.tensor(gram)
        calls["torch, each by itself"] = lambda: [
            column_sweep.sparsegpt(kernel, own, 0.5).numpy() for kernel in theirs
        ]
    calls["jaxsparse, each by itself"] = lambda: [
        prune(kernel, moment, 0.5) for kernel in kernels
    ]
    calls["jaxsparse, one factor"] = shared
    compare(f"q, k, v of {d} x {d}", calls, rounds=5)


@pytest.mark.parametrize("index", range(len(SIZES)))
@every_pattern
def test_wanda(index, name, large, compare):
    d_out, d_in = size_of(index, large)
    pattern, nm = PATTERNS[name]
    pattern = js.Unstructured("output") if nm is None else pattern
    w, gram = layer(d_out, d_in)
    norms = np.sqrt(np.diag(gram))

    @jax.jit
    def prune(kernel, norms):  # each in its own layout: flax's is (in, out)
        scores = jnp.abs(kernel) * norms[:, None]
        mask = js.patterns.masks(scores, 0.5, pattern=pattern)
        return jnp.where(mask, kernel, 0)

    given = jnp.asarray(w.T.copy()), jnp.asarray(norms)
    calls = {}
    if reference(large):
        kernel, scale = torch.from_numpy(w), torch.from_numpy(norms)
        theirs = lambda: column_sweep.wanda(kernel, scale, 0.5, nm).numpy()
        calls["torch"] = theirs
        assert np.mean((theirs() != 0) == (np.asarray(prune(*given)).T != 0)) > 0.9999
    calls["jaxsparse"] = lambda: prune(*given)
    compare(f"Wanda, {d_out} x {d_in}, {name}", calls, rounds=5)


@every_pattern
def test_better_solvers(name, large, compare, record):
    """What the others cost, and how much of the sweep's error they leave."""
    d_out, d_in = (4096, 4096) if large else (768, 768)
    pattern, _ = PATTERNS[name]
    rng = np.random.default_rng(0)
    spread = np.arange(1, d_in + 1, dtype=np.float32) ** -0.75
    turn = np.linalg.qr(rng.standard_normal((d_in, d_in)))[0].astype(np.float32)
    x = rng.standard_normal((4 * d_in, d_in), dtype=np.float32) * spread @ turn.T
    w = jnp.asarray(rng.standard_normal((d_out, d_in), dtype=np.float32))
    gram = jnp.asarray(x.T @ x / np.float32(4 * d_in))
    solve = js.solvers
    swept = solve.sparsegpt(w, gram, 0.5, pattern=pattern)
    calls = {
        "sparsegpt": lambda: solve.sparsegpt(w, gram, 0.5, pattern=pattern),
        "refit of it, 10 iterations": lambda: solve.refit(
            w, swept.mask, gram, iterations=10, start=swept.w
        ),
        "admm": lambda: solve.admm(w, gram, 0.5, pattern=pattern),
        "alps": lambda: solve.alps(w, gram, 0.5, pattern=pattern),
    }
    title = f"solvers, {d_out} x {d_in}, {name}, variances k^-1.5"
    compare(title, calls, rounds=3)
    for label, call in calls.items():
        left = float(call().info.error) / float(swept.info.error)
        record(benchmark=title, what=f"{label}: part of the error", left=round(left, 3))
