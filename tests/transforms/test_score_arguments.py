"""Scores that ask for masks, step and sparsity: methods that users write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse._calls import ask

SHAPE = (8, 16)


def draw(seed):
    rng = np.random.default_rng(seed)
    return {"w": jax.device_put(rng.standard_normal(SHAPE).astype(np.float32))}


def rigl(params, grads, *, masks, step, sparsity):
    """Evci et al. (2020): the largest stay, those with the largest gradients grow."""
    moved = 0.5 * (1 + jnp.cos(jnp.pi / 100 * jnp.float32(step))) / 2
    fewer = sparsity + moved * (1 - sparsity)
    stay = js.patterns.masks(js.scores.magnitude(params), fewer, masks=masks)
    grow = lambda s, g: jnp.where(s, jnp.inf, jnp.abs(g))
    return jax.tree.map(grow, stay, grads)


def rigl_in_numpy(w, g, mask, step, sparsity):
    moved = 0.5 * (1 + np.cos(np.pi * step / 100)) / 2
    keep = w.size - int(np.floor(sparsity * w.size + 0.5))
    fewer = sparsity + moved * (1 - sparsity)
    stays = w.size - int(np.floor(fewer * w.size + 0.5))
    size = np.where(mask, np.abs(w), -1).ravel()
    new = np.zeros(w.size, bool)
    new[np.argsort(-size)[:stays]] = True
    grown = np.where(new, -1, np.abs(g).ravel())
    new[np.argsort(-grown)[: keep - stays]] = True
    return new.reshape(w.shape)


def test_rigl_as_a_function():
    prune_schedule = js.prune_schedule(0.75, every=1, score=rigl)
    tx = prune_schedule.wrap(optax.sgd(0.1))
    params, moved = draw(0), 0
    state = tx.init(params)
    step = jax.jit(tx.update)
    mask = np.ones(SHAPE, bool)
    for turn in range(4):
        grads = draw(10 + turn)
        w, g = (np.asarray(t["w"], np.float64) for t in (params, grads))
        expected = rigl_in_numpy(w, g, mask, turn, 0.75)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        found = np.asarray(js.masks_of(state)["w"])
        np.testing.assert_array_equal(found, expected)
        assert found.sum() == 32
        moved += (found & ~mask).sum()
        mask = found
    assert moved > 0
    js.assert_sparse(state, params)


def movement():
    """Sanh et al. (2020): `-sum w g`, while the forward pass is sparse."""
    add = lambda s, w, g: s - w * g
    return js.scores.Score(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params: jax.tree.map(add, state, params, grads),
        score=lambda params, grads, state: state,
        needs_grads=False,
    )


def test_movement_as_a_score():
    tx = js.prune_schedule(0.5, every=js.schedules.at(2), score=movement()).wrap(
        optax.sgd(0.1)
    )
    params = draw(0)
    state, step = tx.init(params), jax.jit(tx.update)
    total = np.zeros(SHAPE)
    for turn in range(3):
        grads = draw(10 + turn)
        total -= np.asarray(params["w"], np.float64) * np.asarray(grads["w"])
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    kept = np.asarray(js.masks_of(state)["w"])
    assert kept.sum() == 64
    assert total[kept].min() > total[~kept].max()


def test_each_function_of_a_score_sees_what_it_asks_for():
    seen = {}

    def note(name, result):
        def call(*args, masks, step, sparsity):
            seen[name] = (masks["w"].shape, jnp.shape(step), sparsity["w"])
            return result(*args)

        return call

    score = js.scores.Score(
        init=lambda params: (),
        update=note("update", lambda grads, state, params: state),
        score=lambda params, grads, state: params,
        needs_grads=False,
        prune=note("prune", lambda p, g, state, select: (select(p), p)),
    )
    schedule = js.schedules.polynomial(final=0.5, begin=0, end=4)
    tx = js.prune_schedule({"w": schedule}, every=2, score=score)
    params = draw(0)
    tx.update(params, tx.init(params), params)
    assert set(seen) == {"update", "prune"}
    for shape, step, sparsity in seen.values():
        assert shape == SHAPE
        assert step == ()
        assert jnp.shape(sparsity) == ()


def test_an_average_passes_on_what_its_score_asks_for():
    def score(params, grads, *, step):
        return jax.tree.map(lambda g: g * jnp.float32(1 + step), grads)

    average = js.scores.moving_average(score, decay=0.5)
    tx = js.prune_schedule(0.5, every=js.schedules.at(1), score=average)
    params = draw(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for turn in (1, 2):
        _, state = update(draw(turn), state, params)
    first, second = (np.asarray(draw(turn)["w"]) for turn in (1, 2))
    expected = 0.5 * (0.5 * first) + 0.5 * 2 * second
    np.testing.assert_allclose(state.score_state[1]["w"], expected, rtol=1e-6)


def test_n_of_m_has_its_own_sparsity_to_give():
    seen = []

    def score(params, *, sparsity):
        seen.append(sparsity)
        return js.scores.magnitude(params)

    tx = js.prune_schedule(None, every=1, score=score, pattern=js.NM(1, 4))
    params = draw(0)
    tx.update(params, tx.init(params), params)
    js.prune(params, pattern=js.NM(1, 4), score=score)
    assert set(seen) == {0.75}


def test_one_shot_scores_see_them_too():
    seen = []

    def score(params, masks, step=None, *, sparsity):
        seen.append((masks["w"].ndim, step, sparsity))
        return js.scores.magnitude(params)

    js.prune(draw(0), 0.75, score=score, steps=2)
    assert seen == [(0, 0, 0.5), (2, 1, 0.75)]
    seen.clear()
    js.straight_through(
        draw(0),
        0.5,
        score=lambda p, *, sparsity: seen.append(sparsity) or js.scores.magnitude(p),
    )
    assert seen == [0.5]


def test_what_the_caller_has_bound_stays_bound():
    bound = functools.partial(lambda params, *, step, masks: (step, masks), step=7)
    assert ask(bound, 1, masks=2, step=3) == (7, 2)
    positional = lambda params, grads, step: (params, grads, step)
    assert ask(positional, 1, 2, 3, masks=0, step=9) == (1, 2, 3)
    assert ask(max, 1, 2, step=3) == 2


def test_a_score_with_other_arguments_is_refused():
    with pytest.raises(TypeError, match=r"masks=, .*\(params, \*, key\)"):
        js.prune_schedule(0.5, every=1, score=lambda params, *, key: params)
