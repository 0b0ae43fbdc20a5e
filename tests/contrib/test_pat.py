"""PAT's modules, gate and losses by their formulas; folded and narrowed models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse import contrib

D, R, VOCAB = 12, 3, 7


def model(params, ids, after=lambda i, x: x):
    """A residual stream of RMSNorm; `after` stands behind what writes to it."""
    norm = lambda x, scale: (
        (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6))
        * scale.reshape(1, 1, -1)
    )
    x = after(0, params["embed"][ids])
    for i, block in enumerate(params["blocks"]):
        hidden = jax.nn.silu(norm(x, block["norm"]) @ block["up"])
        out = hidden @ block["down"] + block["bias"].reshape(1, 1, -1)
        x = x + after(i + 1, out)
    return norm(x, params["norm"]) @ params["head"]


def make(dtype=np.float64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2, dtype)
    block = lambda: {
        "norm": draw(D), "up": draw(D, 5), "down": draw(5, D), "bias": draw(D)
    }  # fmt: skip
    params = {
        "embed": draw(VOCAB, D), "blocks": [block(), block()], "norm": draw(D),
        "head": draw(D, VOCAB),
    }  # fmt: skip
    modules = [contrib.Hybrid(draw(D, R), draw(R, D), draw(D)) for _ in range(3)]
    mask = draw(D)
    ids = jnp.asarray(rng.integers(0, VOCAB, (2, 4)))
    return params, modules, mask, ids


def folded(params, modules, gate):
    embed, _ = contrib.fold_hybrid(modules[0], params["embed"], gate)
    blocks = []
    for block, module in zip(params["blocks"], modules[1:], strict=True):
        down, bias = contrib.fold_hybrid(
            module, block["down"], gate, bias=block["bias"]
        )
        blocks.append(block | {"down": down, "bias": bias})
    return params | {"embed": embed, "blocks": blocks}


@pytest.mark.usefixtures("x64")
def test_the_narrowed_model_is_the_one_with_modules():
    params, modules, mask, ids = make()
    gate = contrib.hybrid_gate(mask, total_steps=100)
    closed = np.flatnonzero(gate == 0)
    assert 2 < len(closed) < D - 2
    behind = lambda i, x: contrib.hybrid(modules[i], x, gate)
    expected = model(params, ids, behind)
    plain = folded(params, modules, gate)
    np.testing.assert_allclose(model(plain, ids), expected, rtol=1e-10, atol=1e-12)
    assert not np.any(plain["embed"][:, closed])
    trace = js.trace(model, plain, ids)
    (name,) = [n for n, g in js.coupling.groups(trace).prunable.items() if g.size == D]
    small = js.narrowing.narrow(trace, plain, {name: closed})
    kept = D - len(closed)
    assert small.params["blocks"][1]["down"].shape == (5, kept)
    assert small.params["head"].shape == (kept, VOCAB)
    got = jax.jit(small.apply_fn)(small.params, ids)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_module_by_its_formula():
    _, (module, *_), mask, _ = make()
    x = np.random.default_rng(1).standard_normal((2, 3, D))
    got = contrib.hybrid(module, jnp.asarray(x), mask)
    low = np.einsum("btd,dr,re->bte", x, *module[:2])
    np.testing.assert_allclose(
        got, (x + low) * np.asarray(mask * module.scale), rtol=1e-12
    )
    first = contrib.init_hybrid(D, key=jax.random.key(0), rank=R)
    same = contrib.hybrid(first, jnp.asarray(x, jnp.float32), jnp.ones(D, jnp.float32))
    np.testing.assert_array_equal(same, x.astype(np.float32))


def slow_gate(m, t, total):
    """In float64, of one number."""
    t = min(t, int(0.8 * total))
    sharpness = 1 / (1 - np.log(max(t, 1)) / np.log(total) + 1e-6)
    return 1 / (1 + np.exp(-sharpness * np.float64(m))) + max(0.5 - t / total, 0)


@pytest.mark.usefixtures("x64")
def test_the_gate_over_the_steps():
    mask = jnp.asarray([0.7, 0.1, 0.0, -0.1, -0.7])
    run = jax.jit(lambda m, step: contrib.hybrid_gate(m, step=step, total_steps=1000))
    steps = np.array([0, 1, 10, 499, 500, 799, 800, 900, 5000])
    got = jax.vmap(run, (None, 0))(mask, steps)
    expected = [[slow_gate(m, t, 1000) for m in mask] for t in steps]
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    np.testing.assert_array_equal(got[0, 2], 1.0)
    moves = lambda t: np.any(jax.grad(lambda m: jnp.sum(run(m, t)))(mask))
    assert moves(799)
    assert not moves(800)
    end = contrib.hybrid_gate(mask, total_steps=1000)
    assert end.tolist() == [1, 1, 1, 0, 0]


def test_losses_by_hand():
    _, modules, _, _ = make(np.float32)
    m = jnp.asarray([0.5, 0.25, 0.0, -1.0])
    loss = lambda m: contrib.hybrid_loss(m, modules, width=2)
    got, grads = loss(m), jax.jacrev(loss)(m)
    np.testing.assert_allclose(got.width, 10 * 1 / 2)
    np.testing.assert_allclose(got.polarization, (0.0625 + 0.25) / 3 + 0.25, rtol=1e-6)
    grams = [np.float64(x.down).T @ np.float64(x.down) for x in modules]
    expected = sum(np.mean((g - np.eye(R)) ** 2) for g in grams)
    np.testing.assert_allclose(got.identity, expected, rtol=1e-5)
    np.testing.assert_allclose(grads.width, np.full(4, 5.0))
    expected = [0, -0.5 / 3, -1 / 3, -1.0]
    np.testing.assert_allclose(grads.polarization, expected, atol=1e-6)
    alone = contrib.hybrid_loss(jnp.ones(4), modules, width=4)
    assert np.all(np.isfinite(alone))
    assert alone.width == 0


def test_the_losses_lead_to_the_width():
    _, modules, _, _ = make(np.float32)
    start = jnp.linspace(-0.2, 0.4, 24)

    def step(m, _):
        loss = lambda m: sum(contrib.hybrid_loss(m, modules, width=6)[:2])
        return m - 0.01 * jax.grad(loss)(m), None

    end, _ = jax.jit(lambda m: jax.lax.scan(step, m, length=400))(start)
    assert int(jnp.sum(end >= 0)) == 6
    assert np.all(np.diff(end) > 0)  # the largest stay


def test_types_are_kept_and_zero_is_selected():
    _, (module, *_), mask, _ = make(np.float32)
    gate = contrib.hybrid_gate(mask, total_steps=10)
    kernel = jnp.full((2, D), jnp.inf, jnp.bfloat16)
    got, bias = contrib.fold_hybrid(module, kernel, gate)
    assert bias is None
    assert got.dtype == jnp.bfloat16
    assert not np.any(np.asarray(got[:, gate == 0], np.float32))
    x = contrib.hybrid(module, kernel, gate)
    assert x.dtype == jnp.bfloat16
    assert not np.any(np.asarray(x[:, gate == 0], np.float32))


def test_errors():
    _, modules, mask, _ = make(np.float32)
    module, gate = modules[0], jnp.ones(D, jnp.float32)
    x = jnp.ones((2, D), jnp.float32)
    with pytest.raises(TypeError, match="module must be what"):
        contrib.hybrid({"down": x}, x, gate)
    with pytest.raises(ValueError, match="gate: expected the shape"):
        contrib.hybrid(module, x, gate[:3])
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 12\]"):
        contrib.hybrid(module, x[:, :3], gate)
    with pytest.raises(ValueError, match="kernel: expected"):
        contrib.fold_hybrid(module, x.T, gate)
    with pytest.raises(ValueError, match="module: expected the shapes"):
        contrib.hybrid(module._replace(up=x), x, gate)
    with pytest.raises(ValueError, match="width=99: the mask has 12 channels"):
        contrib.hybrid_loss(mask, modules, width=99)
    with pytest.raises(TypeError, match="modules must be what"):
        contrib.hybrid_loss(mask, [], width=3)
    with pytest.raises(ValueError, match="total_steps must be at least 2"):
        contrib.hybrid_gate(mask, step=0, total_steps=1)
    with pytest.raises(ValueError, match="mask: expected a vector"):
        contrib.hybrid_gate(x, step=0, total_steps=10)
