"""Learned thresholds by their formula, and a training to a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from penalties import group_models as gm

import jaxsparse as js
from jaxsparse import contrib


@pytest.mark.usefixtures("x64")
def test_gates_are_those_of_the_formula():
    _, _, groups = gm.make("conv", dtype="float64")
    rng = np.random.default_rng(0)
    scores = {n: rng.random((*g.copies, g.size)) * 5 for n, g in groups.items()}
    thresholds = {n: jnp.asarray(rng.uniform(0.2, 0.9)) for n in groups}
    thresholds[next(iter(groups))] = jnp.asarray(1.5)  # above all: the best stays
    run = jax.jit(lambda s, t: contrib.threshold_gates(s, t, temperature=0.1))
    soft, hard = run(scores, thresholds)
    for name, s in scores.items():
        above = s / s.max() - float(thresholds[name])
        np.testing.assert_allclose(soft[name], 1 / (1 + np.exp(-above / 0.1)))
        kept = (above >= 0) | (s == s.max(-1, keepdims=True))
        np.testing.assert_array_equal(hard[name], kept)
    first = hard[next(iter(groups))]
    np.testing.assert_array_equal(first.sum(-1), np.ones(first.shape[:-1]))


def test_derivatives_reach_the_thresholds_and_not_the_scores():
    scores, t = {"a": jnp.asarray([4.0, 1.0, 2.0])}, {"a": jnp.asarray(0.4)}

    def total(scores, t):
        return jnp.sum(contrib.threshold_gates(scores, t, temperature=0.5).hard["a"])

    by_scores, by_threshold = jax.grad(total, (0, 1))(scores, t)
    assert not np.any(by_scores["a"])
    g = 1 / (1 + np.exp(-(np.array([1, 0.25, 0.5]) - 0.4) / 0.5))
    expected = -np.sum(g * (1 - g)) / 0.5
    np.testing.assert_allclose(by_threshold["a"], expected, rtol=1e-5)


@pytest.mark.usefixtures("relaxed_promotion")
def test_the_constraint_raises_thresholds_to_the_budget():
    params, x, groups = gm.make("mlp")
    trace = js.trace(gm.mlp, params, x)
    scores = js.channels.channel_scores(groups, js.scores.magnitude(params))
    share = lambda t: js.narrowing.flops_share(
        trace, contrib.threshold_gates(scores, t, temperature=0.2).hard
    )
    tx = optax.adam(0.01)

    def step(carry, _):
        t, state = carry
        grads = jax.grad(lambda t: (share(t) - 0.5) ** 2)(t)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(t, updates), state), share(t)

    start = contrib.init_thresholds(groups)
    run = jax.jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), length=200))
    (thresholds, _), shares = run(start)
    assert shares[0] == 1
    assert abs(shares[-1] - 0.5) < 0.13  # a channel is so much
    gates = contrib.threshold_gates(scores, thresholds)
    drop = js.channels.drop_closed(gates.hard)
    left = js.narrowing.cost(trace, drop).flops / trace.flops
    np.testing.assert_allclose(left, share(thresholds), rtol=1e-5)


def test_errors():
    scores = {"a": jnp.ones(3)}
    gates = contrib.threshold_gates
    with pytest.raises(ValueError, match="thresholds: b has no scores"):
        gates(scores, {"b": jnp.zeros(())})
    with pytest.raises(ValueError, match=r"a has one of shape \(3,\)"):
        gates(scores, {"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match="scores: a: 3 of 3 scores are NaN"):
        gates({"a": jnp.full(3, jnp.nan)}, {"a": jnp.zeros(())})
    with pytest.raises(ValueError, match="temperature must be positive"):
        gates(scores, {"a": jnp.zeros(())}, temperature=0)
    with pytest.raises(ValueError, match="none of the 0 is prunable"):
        contrib.init_thresholds({})
