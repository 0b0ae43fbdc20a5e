"""Exits by loops, the program of one input, and thresholds by trying them all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import adaptive

COSTS = [1.0, 2.5, 6.0]


def make(n=40, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.standard_normal((n, 4)) * scale, jnp.float32)
        for scale in (1.0, 2.0, 4.0)
    ]


def probabilities(logits):
    e = np.exp(np.float64(logits) - np.max(np.float64(logits), -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_choices_are_those_of_a_loop():
    logits = make()
    run = jax.jit(lambda logits, t: adaptive.choose_exit(logits, threshold=t))
    for t in (0.0, 0.6, 0.9, 1.1, np.inf):
        got = run(logits, t)
        for i in range(40):
            sure = [probabilities(x[i]).max() for x in logits]
            expected = next((k for k in (0, 1) if sure[k] >= t), 2)
            assert got.index[i] == expected
            np.testing.assert_array_equal(got.logits[i], logits[expected][i])
            np.testing.assert_allclose(got.confidence[i], sure[expected], rtol=1e-5)
    assert np.all(adaptive.choose_exit(logits, threshold=np.inf).index == 2)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_batch_that_is_spread_over_devices_stays_so(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(AxisType, kind),))
    lie = NamedSharding(mesh, P("x"))
    run = jax.jit(lambda logits: adaptive.choose_exit(logits, threshold=0.6))
    got = run([jax.device_put(np.asarray(x), lie) for x in make()])
    for a, b in zip(got, run(make()), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-6)
        assert a.sharding.is_equivalent_to(lie, a.ndim)


def test_another_confidence_and_nan():
    logits = make(8)
    logits[0] = logits[0].at[0, 0].set(jnp.nan)
    entropy = lambda x: jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x), -1)
    got = adaptive.choose_exit(logits, threshold=-0.5, confidence=entropy)
    p = [probabilities(x) for x in logits]
    sure = np.stack([np.sum(q * np.log(q), -1) for q in p])
    with np.errstate(invalid="ignore"):
        enough = sure[:2] >= -0.5
    expected = np.where(enough.any(0), enough.argmax(0), 2)
    np.testing.assert_array_equal(got.index, expected)
    assert got.index[0] != 0


def stages_of(params, seen=lambda i: None):
    def stage(i, h):
        seen(i)
        h = jnp.tanh(h @ params["body"][i])
        return h, 3.0 * h @ params["heads"][i]

    return [lambda h, i=i: stage(i, h) for i in range(3)]


def test_one_input_stops_where_the_batch_says_and_computes_no_more():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    widths = [(5, 6), (6, 7), (7, 8)]  # the hidden values differ in shape
    params = {
        "body": [draw(*s) for s in widths],
        "heads": [draw(s[1], 3) for s in widths],
    }
    x = draw(24, 5)
    every, h = [], x
    for stage in stages_of(params):
        h, logits = stage(h)
        every.append(logits)
    expected = adaptive.choose_exit(every, threshold=0.97)
    assert set(expected.index.tolist()) == {0, 1, 2}
    ran, traced = [], []

    @jax.jit
    def one(params, x):
        traced.append(1)
        seen = lambda i: jax.debug.callback(lambda: ran.append(i))
        return adaptive.run_until_confident(stages_of(params, seen), x, threshold=0.97)

    for i in range(24):
        ran.clear()
        got = one(params, x[i : i + 1])
        jax.effects_barrier()
        assert got.index.shape == (1,)
        assert got.index[0] == expected.index[i]
        assert sorted(ran) == list(range(int(got.index[0]) + 1))
        np.testing.assert_allclose(got.logits[0], expected.logits[i], rtol=1e-4)
    assert len(traced) == 1
    mapped = jax.lax.map(lambda row: one(params, row[None]), x)
    np.testing.assert_array_equal(mapped.index[:, 0], expected.index)


def mean_cost(logits, t):
    index = np.asarray(adaptive.choose_exit(logits, threshold=t).index)
    return np.mean(np.array(COSTS)[index])


@pytest.mark.parametrize("budget", [1.0, 1.7, 3.0, 5.0, 6.0])
def test_the_threshold_is_the_highest_within_the_budget(budget):
    logits = make()
    logits[1] = logits[1].at[3:9].set(logits[0][3:9])  # equal confidences
    logits[0] = logits[0].at[10:14].set(logits[0][10])
    found = adaptive.exit_threshold(logits, costs=COSTS, budget=budget)
    assert found.reached <= budget
    np.testing.assert_allclose(mean_cost(logits, found.threshold), found.reached)
    np.testing.assert_allclose(sum(found.shares), 1)
    if np.isinf(found.threshold):
        assert budget == 6
    else:
        sure = np.concatenate([probabilities(x).max(-1) for x in logits[:2]])
        above = sure[sure >= found.threshold].min() + 1e-6
        assert mean_cost(logits, above) > budget
        for moved in (-1e-6, 1e-6):  # as rounding would
            again = mean_cost(logits, found.threshold + moved)
            assert budget == 1 or again == mean_cost(logits, found.threshold)


def test_errors():
    logits = make(4)
    with pytest.raises(ValueError, match="logits: expected a list"):
        adaptive.choose_exit([], threshold=0.5)
    with pytest.raises(ValueError, match=r"logits\[1\]: expected \[batch, classes\]"):
        adaptive.choose_exit([logits[0], logits[1][:2]], threshold=0.5)
    with pytest.raises(ValueError, match="threshold is NaN"):
        adaptive.choose_exit(logits, threshold=np.nan)
    with pytest.raises(ValueError, match="confidence must return one number"):
        adaptive.choose_exit(logits, threshold=0.5, confidence=lambda x: x)
    with pytest.raises(ValueError, match="x: expected one input"):
        adaptive.run_until_confident([lambda h: (h, h)], logits[0], threshold=0.5)
    with pytest.raises(ValueError, match="stages: expected a list"):
        adaptive.run_until_confident([], logits[0][:1], threshold=0.5)
    uneven = [lambda h: (h, h), lambda h: (h, h[:, :2])]
    with pytest.raises(TypeError, match="stages fails on x"):
        adaptive.run_until_confident(uneven, logits[0][:1], threshold=0.5)
    find = adaptive.exit_threshold
    with pytest.raises(ValueError, match="costs: expected 3 numbers"):
        find(logits, costs=[1.0], budget=2)
    with pytest.raises(ValueError, match="costs must rise"):
        find(logits, costs=[3.0, 2.0, 1.0], budget=9)
    with pytest.raises(ValueError, match=r"each input costs 1\.0 at least"):
        find(logits, costs=COSTS, budget=0.5)
    with pytest.raises(ValueError, match="confidences are NaN"):
        find([x * jnp.nan for x in logits], costs=COSTS, budget=3)
    with pytest.raises(TypeError, match="is traced"):
        jax.jit(lambda x: find(x, costs=COSTS, budget=3))(logits)
