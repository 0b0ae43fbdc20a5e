"""Cycles of trial removals find what a saliency at one point does not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from penalties import group_models as gm

import jaxsparse as js
from jaxsparse import contrib, penalties
from jaxsparse.contrib import _cric


def problem():
    """A small index that is used most, in a model at its minimum."""
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((3, 6)), rng.standard_normal((6, 2))
    up[:, 0] *= 0.1
    down[0] = 50.0
    params = {"up": up.astype(np.float32), "down": down.astype(np.float32)}
    params = jax.device_put(params)
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    x = rng.standard_normal((2, 16, 3)).astype(np.float32)
    y = np.asarray(jax.jit(apply_fn)(params, x))
    data = jax.device_put(list(zip(x, y, strict=True)))
    loss = lambda p, batch: 0.1 + jnp.mean((apply_fn(p, batch[0]) - batch[1]) ** 2)
    groups = js.coupling.groups(js.trace(apply_fn, params, x[0])).prunable
    return params, groups, data, loss


def test_it_corrects_a_wrong_first_choice():
    params, groups, data, loss = problem()
    options = {"sparsity": 0.3, "optimizer": optax.sgd(1e-5), "steps": 6}
    plain = penalties.hesso(
        optax.sgd(1e-5), groups, sparsity=0.3, begin=0, periods=1, duration=1
    )
    grads = jax.jit(jax.grad(loss))(params, data[0])
    choose = lambda grads, params: plain.update(grads, plain.init(params), params)
    _, state = jax.jit(choose)(grads, params)
    assert 0 in penalties.dropped(state).indices["up[1]"]
    found = contrib.cric(loss, params, groups, data, **options)
    assert 0 not in found.drop.indices["up[1]"]
    assert int(np.argmax(found.scores["up[1]"])) == 0
    pairs = list(itertools.combinations(range(6), 2))

    @jax.jit
    def without(pair):
        up = params["up"].at[:, pair].set(0)
        return sum(loss(params | {"up": up}, batch) for batch in data)

    losses = [float(without(np.array(pair))) for pair in pairs]
    reached = losses[pairs.index(tuple(found.drop.indices["up[1]"].tolist()))]
    assert reached in sorted(losses)[:3]
    assert reached < losses[pairs.index((0, 5))] / 10  # what it would have been
    assert found.violators[0] == 2
    assert len(found.violators) >= 2
    assert found.increases[0] > 1
    # The scores drive the training that follows.
    tx = penalties.hesso(
        optax.sgd(1e-5),
        groups,
        sparsity=0.3,
        begin=0,
        periods=1,
        duration=2,
        scores=found.scores,
    )
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        params = {p: w + np.asarray(updates[p]) for p, w in params.items()}
    np.testing.assert_array_equal(
        penalties.dropped(state).indices["up[1]"], found.drop.indices["up[1]"]
    )


def test_no_index_is_tried_twice_and_cycles_end():
    tried = []

    def trial(violators, turn):
        tried.append({n: x.copy() for n, x in violators.items()})
        # What is tried turns out to matter.
        return {n: 10.0 * x for n, x in violators.items()}, 0.0, first

    first = {"a": np.arange(6.0), "b": 0.5 + np.arange(4.0)}
    found = _cric._cycles(
        first, trial, count=3, max_cycles=20, tolerance=0, loss_weight=1.0
    )
    assert sum(found.violators) == sum(int(x.sum()) for t in tried for x in t.values())
    for name in first:
        assert sum(t[name].astype(int) for t in tried).max() == 1
    assert 1 < len(found.violators) < 20
    capped = _cric._cycles(
        first, trial, count=3, max_cycles=1, tolerance=0, loss_weight=1.0
    )
    assert len(capped.violators) == 1


def test_scores_are_means_of_samples_and_the_charge():
    first = {"a": np.array([1.0, 2.0, 3.0, 4.0])}
    sample = {"a": np.array([3.0, 3.0, 0.0, 2.0])}
    blame = {"a": np.array([1.0, 3.0, 9.0, -1.0])}  # only of those that were tried
    found = _cric._cycles(
        first,
        lambda *_: (sample, 0.6, blame),
        count=2,
        max_cycles=1,
        tolerance=0,
        loss_weight=2.0,
    )
    np.testing.assert_allclose(found.scores["a"], [2.3, 3.4, 1.5, 3.0], rtol=1e-6)
    assert found.violators == (2,)
    assert found.increases == (0.6,)
    assert found.drop.indices["a"].tolist() == [0, 2]


def test_batched_groups_lose_as_many_in_every_copy():
    params, x, groups = gm.make("attention")
    y = jax.jit(gm.attention)(params, x)
    loss = lambda p, batch: jnp.mean((gm.attention(p, batch) - y - 0.1) ** 2)
    found = contrib.cric(
        loss,
        params,
        groups,
        [x],
        sparsity=0.4,
        optimizer=optax.sgd(1e-2),
        steps=2,
        max_cycles=2,
    )
    total = int(np.floor(0.4 * sum(g.size for g in groups.values()) + 0.5))
    assert sum(d.shape[-1] for d in found.drop.indices.values()) == total
    for name, at in found.drop.indices.items():
        assert at.shape[:-1] == groups[name].copies
    for name, s in found.scores.items():
        assert s.shape == (*groups[name].copies, groups[name].size)
        assert s.dtype == np.float32
        assert np.all(np.isfinite(s))


def test_bad_input_is_named():
    params, groups, data, loss = problem()
    make = lambda batches=data, **options: contrib.cric(
        loss,
        params,
        groups,
        batches,
        **({"sparsity": 0.3, "optimizer": optax.sgd(0.1), "steps": 2} | options),
    )
    with pytest.raises(ValueError, match="batches: there are none"):
        make(batches=[])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        make(steps=0)
    with pytest.raises(ValueError, match="keeps at least one"):
        make(sparsity=0.95)
    with pytest.raises(ValueError, match="loss_weight must be at least 0"):
        make(loss_weight=-1.0)
