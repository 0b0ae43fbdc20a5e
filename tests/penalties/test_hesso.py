"""Shrinking in periods: a slow float64 replay of choices and factors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from penalties import group_models as gm

import jaxsparse as js
from jaxsparse import penalties
from jaxsparse.channels.slices import slices_of
from jaxsparse.penalties import saliency


def replay_saliency(groups, params, grads):
    """By (group, copy, index), the card's five criteria."""
    held, sloped = gm.slices(groups, params), gm.slices(groups, grads)
    rows = {}
    for key, x in held.items():
        g = sloped[key]
        length = np.linalg.norm(x) * np.linalg.norm(g)
        cosine = x @ g / length if length else 0.0
        rows[key] = [
            np.linalg.norm(x),
            np.linalg.norm(x) / x.size,
            1 - cosine if np.any(x) else 0.0,
            abs(x @ g),
            0.5 * (x @ g) ** 2,
        ]
    norms = np.sqrt(np.sum(np.square(list(rows.values())), axis=0))
    norms = np.where(norms > 0, norms, 1)
    return {
        key: float(np.sum(0.2 * np.array(row) / norms)) for key, row in rows.items()
    }


def replay_choice(groups, scored, count, gone):
    """Units: the r-th weakest of each copy together, the weakest `count` of them."""
    units = []
    for name, group in groups.items():
        order = {}
        for copy in np.ndindex(*group.copies):
            keys = [
                (-np.inf if (name, copy, i) in gone else scored[name, copy, i], -i)
                for i in range(group.size)
            ]
            order[copy] = [-i for _, i in sorted(keys)]
        for r in range(group.size - 1):
            members = [(name, copy, order[copy][r]) for copy in order]
            values = [-np.inf if m in gone else scored[m] for m in members]
            units.append((float(np.mean(values)), members))
    units.sort(key=lambda unit: unit[0])
    return {m for _, members in units[:count] for m in members}


def train(tx, model, params, x, steps, *, seen=None):
    half = np.asarray(0.5, x.dtype)
    y = jax.jit(lambda params: gm.MODELS[model](params, x) * half)(params)
    loss = lambda p: jnp.mean((gm.MODELS[model](p, x) - y) ** 2)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    state = jax.jit(tx.init)(params)
    for t in range(steps):
        before = params
        params, state, grads = step(params, state)
        if seen is not None:
            seen(t, before, grads, params, state)
    assert len(traces) == 1
    return params, state


RATE, BEGIN, PERIODS, DURATION = 2e-3, 2, 2, 3


@functools.cache
def trained(model):
    """The last parameters and state, and what each step saw and did."""
    params, x, groups = gm.make(model, scale=0.5)
    tx = penalties.hesso(
        optax.sgd(RATE),
        groups,
        sparsity=0.5,
        begin=BEGIN,
        periods=PERIODS,
        duration=DURATION,
    )
    steps = []
    look = lambda *seen: steps.append(seen)
    params, state = train(
        tx, model, params, x, BEGIN + PERIODS * DURATION + 3, seen=look
    )
    return params, state, steps


@pytest.mark.parametrize("model", gm.MODELS)
def test_every_step_is_that_of_a_slow_replay(model):
    groups = gm.make(model, scale=0.5)[2]
    rate, begin, periods, duration = RATE, BEGIN, PERIODS, DURATION
    total = int(np.floor(0.5 * sum(g.size for g in groups.values()) + 0.5))
    gone, shrinking = set(), set()

    def seen(t, before, grads, after, state):
        nonlocal gone, shrinking
        i = t - begin
        active = 0 <= i < periods * duration
        if active and i % duration == 0:
            count = int(np.floor(total * (i // duration + 1) / periods + 0.5))
            scored = replay_saliency(groups, before, grads)
            shrinking = replay_choice(groups, scored, count, gone) - gone
            assert shrinking
        left = duration - (i % duration)
        keys = gm.slices(groups, before)
        factor = dict.fromkeys(keys, 1.0)
        factor |= dict.fromkeys(shrinking if active else (), (left - 1) / left)
        factor |= dict.fromkeys(gone, 0.0)
        moved = {
            p: np.asarray(w, np.float64) - rate * np.asarray(grads[p], np.float64)
            for p, w in before.items()
        }
        for p, w in gm.scaled(groups, moved, factor).items():
            np.testing.assert_allclose(np.asarray(after[p]), w, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(np.asarray(after[p])[w == 0], 0.0)
        if active and i % duration == duration - 1:
            gone, shrinking = gone | shrinking, set()
        zero = {name: np.asarray(x) for name, x in state.zero.items()}
        marked = {k for k in keys if zero[k[0]][(*k[1], k[2])]}
        assert marked == gone

    _, state, steps = trained(model)
    for step in steps:
        seen(*step)
    drop = penalties.dropped(state)
    assert sum(d.shape[-1] for d in drop.indices.values()) == total
    for name, indices in drop.indices.items():
        assert indices.shape[:-1] == groups[name].copies
        assert indices.shape[-1] < groups[name].size
        assert drop.sizes[name] == groups[name].size
        for copy in np.ndindex(*groups[name].copies):
            for index in indices[copy]:
                assert (name, copy, int(index)) in gone


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.exhaustive), "bfloat16"]
)
def test_any_optimizer_inside_any_wrapper_outside_keeps_exact_zeros(dtype):
    params, x, groups = gm.make("mlp", dtype=dtype)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    tx = penalties.hesso(inner, groups, sparsity=0.6, begin=1, periods=3, duration=4)
    tx = optax.apply_if_finite(tx, 3)
    zeros = []

    def seen(t, before, grads, after, state):
        del before, grads
        drop = penalties.dropped(state)
        for name, gone in drop.indices.items():
            held = gm.slices({name: groups[name]}, after)
            for index in gone:
                assert not np.any(held[name, (), int(index)])
        zeros.append(sum(len(x) for x in drop.indices.values()))

    params, _ = train(tx, "mlp", params, x, 20, seen=seen)
    n = int(np.floor(0.6 * 14 + 0.5))
    ends = [int(np.floor(n * p / 3 + 0.5)) for p in range(4)]
    assert zeros == [0] * 4 + [ends[1]] * 4 + [ends[2]] * 4 + [n] * 8
    assert all(w.dtype == jnp.dtype(dtype) for w in params.values())


@pytest.mark.parametrize("model", gm.MODELS)
def test_the_narrowed_model_computes_what_the_trained_one_does(model):
    x = gm.make(model, scale=0.5)[1]
    params, state, _ = trained(model)
    trace = js.trace(gm.MODELS[model], params, x)
    small = js.narrowing.narrow(trace, params, penalties.dropped(state))
    sizes = lambda tree: sum(w.size for w in jax.tree.leaves(tree))
    assert sizes(small.params) < 0.6 * sizes(params)
    np.testing.assert_allclose(
        np.asarray(jax.jit(small.apply_fn)(small.params, x)),
        np.asarray(jax.jit(gm.MODELS[model])(params, x)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_gradients_of_zeroed_indices_are_hidden_from_the_optimizer():
    params, _, groups = gm.make("mlp")
    tx = penalties.hesso(
        optax.sgd(0.0, momentum=0.9),
        groups,
        sparsity=0.5,
        begin=0,
        periods=1,
        duration=1,
    )
    grads = gm.with_values(params, lambda p, w: np.ones_like(w))

    @jax.jit
    def step(state, params):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    state = jax.jit(tx.init)(params)
    for _ in range(2):
        state, params = step(state, params)
    gone = {
        (name, (), int(i))
        for name, at in penalties.dropped(state).indices.items()
        for i in at
    }
    trace = state.inner[0].trace
    for key, moment in gm.slices(groups, trace).items():
        np.testing.assert_allclose(moment, 0.9 if key in gone else 1.9, rtol=1e-6)


def test_a_step_towards_zero_makes_an_index_less_important():
    params, _, groups = gm.make("mlp")
    params = gm.with_values(params, lambda p, w: np.ones_like(w))
    push = np.array([1.0, -1.0, 0, 0, 0, 0, 0, 0])
    grads = gm.with_values(params, lambda p, w: push + 0 * w if p == "a" else 0 * w)
    slices = slices_of(groups)
    criteria = penalties.Criteria(0.0, 0.0, 1.0, 0.0, 0.0)
    (name,) = [n for n, g in groups.items() if g.size == 8]
    score = functools.partial(saliency.saliency, slices, criteria=criteria)
    scored = np.asarray(jax.jit(score)(params, grads)[name])
    assert scored[0] < scored[2] < scored[1]
    np.testing.assert_array_equal(scored[3:], scored[2])


def test_stated_scores_choose():
    params, x, groups = gm.make("attention")
    rng = np.random.default_rng(3)
    scores = {
        n: rng.uniform(size=(*g.copies, g.size)).astype(np.float32)
        for n, g in groups.items()
    }
    tx = penalties.hesso(
        optax.sgd(0.01),
        groups,
        sparsity=0.4,
        begin=0,
        periods=1,
        duration=2,
        scores=scores,
    )
    _, state = train(tx, "attention", params, x, 3)
    total = int(np.floor(0.4 * sum(g.size for g in groups.values()) + 0.5))
    flat = {
        (n, copy, i): float(scores[n][(*copy, i)])
        for n, g in groups.items()
        for copy, i in gm.indices(g)
    }
    expected = replay_choice(groups, flat, total, set())
    zero = {name: np.asarray(x) for name, x in state.zero.items()}
    got = {k for k in flat if zero[k[0]][(*k[1], k[2])]}
    assert got == expected


@pytest.mark.usefixtures("x64")
def test_parameters_of_float64_shrink_by_factors_of_float64():
    params, _, groups = gm.make("mlp", dtype="float64")
    scores = {
        n: np.arange(g.size) * 1e-12 + np.ones((*g.copies, 1))
        for n, g in groups.items()
    }
    duration = 7
    tx = penalties.hesso(
        optax.sgd(0.0),
        groups,
        sparsity=0.4,
        begin=0,
        periods=1,
        duration=duration,
        scores={n: s[..., ::-1] for n, s in scores.items()},
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda state, p: tx.update(zeros, state, p))
    state, now = tx.init(params), params
    for t in range(duration - 1):
        updates, state = update(state, now)
        now = optax.apply_updates(now, updates)
        left = (duration - t - 1) / duration
        for path, x in now.items():
            ratio = np.asarray(x) / np.asarray(params[path])
            off = np.minimum(abs(ratio - 1), abs(ratio - left))
            assert off.max() < 1e-14
    # Scores that float32 cannot tell apart choose the last indices, not ties.
    shrinking = np.concatenate([np.asarray(x) for x in state.shrinking.values()], -1)
    assert shrinking.any()
    for x in state.shrinking.values():
        assert np.all(np.diff(np.asarray(x).astype(int), axis=-1) >= 0)


def test_ties_keep_the_lower_index_of_the_earlier_group_and_nan_goes_first():
    scores = {"a": np.ones(3, np.float32), "b": np.ones((2, 3), np.float32)}
    scores["b"][1, 0] = np.nan
    none = {n: np.zeros(s.shape, bool) for n, s in scores.items()}
    lowest = jax.jit(functools.partial(saliency.lowest, first=none))
    got = lowest(scores, np.int32(1))
    assert not np.any(np.asarray(got["a"]))
    assert np.asarray(got["b"]).tolist() == [[False, False, True], [True, False, False]]
    got = lowest(scores, np.int32(4))
    assert np.asarray(got["a"]).tolist() == [False, True, True]
    assert np.asarray(got["b"]).sum(-1).tolist() == [2, 2]


def test_sharded_parameters():
    make = lambda groups: penalties.hesso(
        optax.sgd(0.1), groups, sparsity=0.5, begin=0, periods=1, duration=1
    )
    gm.assert_sharded_alike(make, "conv")


def test_bad_input_is_named():
    params, _, groups = gm.make("mlp")
    make = lambda **options: penalties.hesso(
        optax.sgd(0.1),
        groups,
        **({"sparsity": 0.5, "begin": 0, "periods": 1, "duration": 1} | options),
    )
    with pytest.raises(ValueError, match="keeps at least one: at most 12"):
        make(sparsity=0.95)
    with pytest.raises(ValueError, match="sparsity must lie in"):
        make(sparsity=1.0)
    for name in ("periods", "duration"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            make(**{name: 0})
    with pytest.raises(ValueError, match="begin must be at least 0"):
        make(begin=-1)
    with pytest.raises(ValueError, match=r"scores: .* needs shape"):
        make(scores={})
    with pytest.raises(ValueError, match="found 0"):
        penalties.dropped(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="which the parameters have not"):
        make().init({"other": jnp.ones(3)})
    with pytest.raises(ValueError, match="needs the parameters"):
        make().update(params, make().init(params))
