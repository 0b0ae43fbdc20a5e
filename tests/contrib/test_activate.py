"""Dead neurons counted slowly, gains by finite differences, and what they decide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse import contrib


def make(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    params = {
        "conv": draw(3, 3, 2, 4), "bias": draw(4), "layers": draw(3, 4, 4) / 2,
        "head": draw(4, 2),
    }  # fmt: skip
    batches = [draw(n, 5, 5, 2) for n in (6, 6, 3)]
    return params, batches


def apply_fn(params, x):
    """A convolution, a scan over layers, with ReLUs of both kinds."""
    run = jax.lax.conv_general_dilated
    numbers = ("NHWC", "HWIO", "NHWC")
    z = run(x, params["conv"], (2, 2), "SAME", dimension_numbers=numbers)
    h = jax.nn.relu(z + params["bias"][None, None, None] - 3)
    h = jnp.mean(h, (1, 2))

    def layer(h, w):
        return jnp.maximum(h @ w, 0), None

    h, _ = jax.lax.scan(layer, h, params["layers"])
    return h @ params["head"]


def pre_activations(params, x):
    """`[examples, neurons]`, in NumPy."""
    p = jax.tree.map(np.float64, params)
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    z = np.stack(
        [
            [np.einsum("nhwc,hwcd->nd", x[:, i : i + 3, j : j + 3], p["conv"])
             for j in (0, 2, 4)]
            for i in (0, 2, 4)
        ]
    )  # fmt: skip
    z = np.moveaxis(z, 2, 0) + p["bias"] - 3
    found, h = [z.reshape(len(x), -1)], np.maximum(z, 0).mean((1, 2))
    for w in p["layers"]:
        found.append(h @ w)
        h = np.maximum(h @ w, 0)
    return np.concatenate(found, 1)


def slowly(params, batches):
    z = np.concatenate([pre_activations(params, x) for x in batches])
    dead = z <= 0
    always = dead.all(0)
    return z, dead, always


def test_rates_are_those_counted_slowly():
    params, batches = make()
    trace = js.trace(apply_fn, params, batches[0])
    got = contrib.dead_neurons(trace, params, batches)
    _, dead, always = slowly(params, batches)
    assert always.any()
    np.testing.assert_allclose(got.static, np.mean(dead * always), rtol=1e-12)
    np.testing.assert_allclose(got.dynamic, np.mean(dead * ~always), rtol=1e-12)
    assert 0.1 < got.dynamic < 0.9


@pytest.mark.usefixtures("x64")
def test_gains_are_derivatives_of_what_is_asleep():
    params, batches = make(np.float64)
    trace = js.trace(apply_fn, params, batches[0])
    gains = contrib.activation_gains(trace, params, batches)
    _, _, always = slowly(params, batches)

    def below(params):
        z, dead, _ = slowly(params, batches)
        return np.sum(np.where(dead & ~always, z, 0)) / z.size

    rng, tiny = np.random.default_rng(1), 1e-6
    for path in ("conv", "layers"):
        w = np.asarray(params[path])
        for _ in range(6):
            at = tuple(rng.integers(0, n) for n in w.shape)
            move = np.zeros(w.shape)
            move[at] = tiny
            up, down = (below(params | {path: w + s * move}) for s in (1, -1))
            expected = -w[at] * (up - down) / (2 * tiny)
            np.testing.assert_allclose(gains[path][at], expected, rtol=1e-5, atol=1e-9)
    assert not np.any(gains["head"])


def test_gains_decide_within_the_pool_alone():
    rng = np.random.default_rng(2)
    scores = {"a": rng.random((20, 10)), "b": rng.random((5, 8))}
    gains = {"a": rng.standard_normal((20, 10)), "b": rng.standard_normal((5, 8))}
    scores, gains = jax.tree.map(jnp.float32, (scores, gains))
    run = jax.jit(
        lambda s, g, at: js.patterns.masks(contrib.activate(s, g, at, pool=0.2), at)
    )
    masks = run(scores, gains, 0.5)
    for path, s in scores.items():
        n, order = s.size, np.argsort(np.asarray(s).ravel())
        low, high = (int(np.floor(x * n + 0.5)) for x in (0.4, 0.6))
        among = order[low:high]
        asked = n // 2 - low
        last = np.argsort(-np.asarray(gains[path]).ravel()[among])[:asked]
        kept = np.ones(n, bool)
        kept[order[:low]] = False
        kept[among[last]] = False
        np.testing.assert_array_equal(np.asarray(masks[path]).ravel(), kept)
    eager = contrib.activate(scores, gains, 0.98, pool=0.2)
    assert int(jnp.sum(js.patterns.masks(eager, 0.98)["a"])) == 4
    channels = js.Channel(axis=-1)
    narrow = contrib.activate(scores, gains, 0.5, pool=0.4, pattern=channels)
    mask = js.patterns.masks(narrow, 0.5, pattern=channels)["a"]
    assert int(np.sum(mask)) in (5, 100)


@pytest.mark.parametrize("seed", range(3))
def test_fewer_neurons_are_dead_than_with_magnitudes_alone(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), np.float32)
    params = {"a": draw(16, 64), "b": draw(64, 64) / 8, "c": draw(64, 4)}

    def mlp(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]

    x = abs(draw(128, 16))
    trace = js.trace(mlp, params, x)
    scores = js.scores.magnitude(params)
    gains = contrib.activation_gains(trace, params, [x])
    better = contrib.activate(scores, gains, 0.6, pool=0.4)
    rates, counts = [], []
    for s in (scores, better):
        masks = js.patterns.masks(s, 0.6)
        counts.append(js.patterns.sparsity_of(masks, params))
        pruned = js.patterns.apply(params, masks)
        found = contrib.dead_neurons(trace, pruned, [x])
        rates.append(found.dynamic + found.static)
    assert counts[0] == counts[1]
    assert rates[1] < 0.9 * rates[0]


def test_errors():
    params, batches = make()
    linear = js.trace(lambda p, x: x @ p["head"], params, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="this model has no ReLU"):
        contrib.dead_neurons(linear, params, [jnp.ones((2, 4))])
    trace = js.trace(apply_fn, params, batches[0])
    with pytest.raises(ValueError, match="batches: there are none"):
        contrib.dead_neurons(trace, params, [])
    wide = jnp.ones((6, 9, 9, 2), jnp.float32)
    with pytest.raises(ValueError, match="differ in more than the number"):
        contrib.dead_neurons(trace, params, [batches[0], wide])
    with pytest.raises(ValueError, match="pool must lie in"):
        contrib.activate(params, params, 0.5, pool=1.5)
    with pytest.raises(ValueError, match="gains"):
        contrib.activate(params, {"conv": params["conv"]}, 0.5)
    nans = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="NaN"):
        contrib.activate(params, nans, 0.5)
