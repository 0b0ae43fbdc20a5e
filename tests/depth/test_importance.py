"""Importance of blocks against numpy, token by token and block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo.models import ZOO, array

import jaxsparse as js


def params_of(layers=2, d=4):
    return [
        {
            name: np.asarray(array(d, d, seed=2 * i + j))
            for j, name in enumerate(("attn", "mlp"))
        }
        for i in range(layers)
    ]


def apply_fn(params, x):
    for p in params:
        x = x + jnp.tanh(x @ p["attn"])
        x = x + x @ p["mlp"]
    return x


def streams(params, x):
    """The input of each branch and the last sum, in numpy."""
    x = np.asarray(x, np.float64)
    yield x
    for p in params:
        x = x + np.tanh(x @ np.asarray(p["attn"], np.float64))
        yield x
        x = x + x @ np.asarray(p["mlp"], np.float64)
        yield x


def cosines(a, b):
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return ((a * b).sum(-1) / norms).ravel()


BATCHES = [np.random.default_rng(n).normal(size=(n, 3, 4)) for n in (2, 5, 2)]


@pytest.mark.usefixtures("x64")
def test_similarity_is_the_mean_over_all_tokens():
    params = params_of()
    trace = js.trace(apply_fn, params, BATCHES[0])
    got = js.depth.block_similarity(trace, params, BATCHES)
    assert list(got) == ["0/attn", "0/mlp", "1/attn", "1/mlp"]
    every = [list(streams(params, x)) for x in BATCHES]
    for i, value in enumerate(got.values()):
        tokens = np.concatenate([cosines(xs[i], xs[i + 1]) for xs in every])
        assert isinstance(value, float)
        np.testing.assert_allclose(value, tokens.mean(), rtol=1e-12)
    whole = js.depth.block_similarity(trace, params, BATCHES, join=lambda b: b.name[0])
    assert list(whole) == ["0", "1"]
    tokens = np.concatenate([cosines(xs[2], xs[4]) for xs in every])
    np.testing.assert_allclose(whole["1"], tokens.mean(), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_similarity_in_a_scan_equals_that_of_the_model_unrolled():
    params = params_of(3)
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *params)

    def scanned(params, x):
        return jax.lax.scan(lambda x, p: (apply_fn([p], x), None), x, params)[0]

    batches = BATCHES[:1]
    plain = js.trace(apply_fn, params, *batches)
    trace = js.trace(scanned, stacked, *batches)
    got = js.depth.block_similarity(trace, stacked, batches)
    assert list(got)[:3] == ["attn[0]", "mlp[0]", "attn[1]"]
    expected = js.depth.block_similarity(plain, params, batches)
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-12)
    losses = js.depth.output_losses(trace, stacked, batches)
    expected = js.depth.output_losses(plain, params, batches)
    np.testing.assert_allclose(
        list(losses.values()), list(expected.values()), rtol=1e-12
    )


def test_sums_of_bfloat16_activations_are_taken_in_float32():
    # Whole numbers, exact in bfloat16; a sum of 4,000 cosines in it has three digits.
    x = np.random.default_rng(3).integers(1, 9, size=(4000, 4)).astype(float)
    params = [{"mlp": np.eye(4)[::-1].astype(jnp.bfloat16)}]
    flipped = lambda params, x: x + x @ params[0]["mlp"]
    inputs = x.astype(jnp.bfloat16)
    trace = js.trace(flipped, params, inputs)
    got = js.depth.block_similarity(trace, params, [inputs])
    expected = cosines(x, x + x[:, ::-1]).mean()
    np.testing.assert_allclose(list(got.values()), [expected], rtol=1e-5)
    loss = js.depth.output_losses(trace, params, [inputs])
    np.testing.assert_allclose(list(loss.values()), [np.mean(x**2)], rtol=1e-6)


def test_tokens_of_zeros_count_as_turned():
    x = np.zeros((4, 4), np.float32)
    x[0, 0] = 1
    trace = js.trace(apply_fn, params_of(1), x)
    params = jax.tree.map(np.zeros_like, params_of(1))
    got = js.depth.block_similarity(trace, params, [x])
    assert got == {"0/attn": 0.25, "0/mlp": 0.25}


@pytest.mark.usefixtures("x64")
def test_output_losses_are_those_of_removing_each_block_alone():
    params = params_of()
    trace = js.trace(apply_fn, params, BATCHES[0])
    got = js.depth.output_losses(trace, params, BATCHES)
    for name, loss in got.items():
        layer, branch = name.split("/")
        without = [dict(p) for p in params]
        without[int(layer)][branch] = np.zeros((4, 4))
        changes = [
            (list(streams(without, x))[-1] - list(streams(params, x))[-1]).ravel()
            for x in BATCHES
        ]
        np.testing.assert_allclose(
            loss, np.mean(np.concatenate(changes) ** 2), rtol=1e-10
        )


@pytest.mark.usefixtures("x64")
def test_losses_choose_with_the_knapsack_what_is_then_removed():
    model, params, inputs = ZOO["rope_halves"]()
    params = jax.tree.map(np.asarray, params)
    trace = js.trace(model, params, *inputs)
    losses = js.depth.output_losses(trace, params, [inputs])
    sizes = {name: b.parameters for name, b in js.depth.residual_blocks(trace).items()}
    whole = jax.jit(model)(params, *inputs)
    for at_least in (1, 373):
        gone = js.depth.knapsack(losses, sizes, at_least=at_least)
        small = js.depth.remove_blocks(trace, params, gone)
        less = jax.jit(small.apply_fn)(small.params, *inputs)
        got = np.mean((np.asarray(less) - np.asarray(whole)) ** 2)
        removed = sum(w.size for w in jax.tree.leaves(params)) - sum(
            w.size for w in jax.tree.leaves(small.params)
        )
        assert removed >= at_least
        assert len(gone) == 1  # so that the losses are those of the very removal
        np.testing.assert_allclose(got, losses[gone[0]], rtol=1e-10)


def test_losses_of_several_results_and_of_none():
    def several(params, x):
        y = apply_fn(params, x)
        return {"y": y, "chosen": jnp.argmax(y, -1), "half": y[:1] / 2}

    params, x = params_of(1), BATCHES[0].astype(np.float32)
    got = js.depth.output_losses(js.trace(several, params, x), params, [x])
    plain = js.depth.output_losses(js.trace(apply_fn, params, x), params, [x])
    first = js.depth.output_losses(js.trace(apply_fn, params, x), params, [x[:1]])
    for name, value in got.items():
        expected = (2 * plain[name] + first[name] / 4) / 3
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    chosen = lambda params, x: jnp.argmax(apply_fn(params, x), -1)
    with pytest.raises(ValueError, match="not floating point"):
        js.depth.output_losses(js.trace(chosen, params, x), params, [x])


def test_errors():
    params, x = params_of(1), np.ones((2, 4), np.float32)
    trace = js.trace(apply_fn, params, x)
    for measure in (js.depth.block_similarity, js.depth.output_losses):
        with pytest.raises(ValueError, match="there are none"):
            measure(trace, params, [])
        with pytest.raises(ValueError, match="0/attn: what was measured is NaN"):
            measure(trace, jax.tree.map(lambda w: w * np.float32("nan"), params), [x])
        with pytest.raises(ValueError, match="0/mlp: traced with shape"):
            measure(trace, [{**params[0], "mlp": np.ones((4, 3), np.float32)}], [x])
