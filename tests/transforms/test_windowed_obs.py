"""Gradual OBS: window, choice, update; against the solver on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import second_order

import jaxsparse as js

DAMPING = 1e-3
SHAPE = (8, 6)
WEIGHTS = js.Unstructured()


def params_of(rng):
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return jax.device_put({"kernel": draw(*SHAPE), "bias": draw(6)})


def gradients(rng, params, count):
    mixing = rng.standard_normal((8, 8)) / 2
    draw = lambda w: (
        rng.standard_normal(w.shape)
        if w.ndim < 2
        else mixing[: w.shape[0], : w.shape[0]] @ rng.standard_normal(w.shape)
    ).astype(np.float32)
    return [jax.tree.map(draw, params) for _ in range(count)]


def stacked(grads):
    return {"kernel": jax.device_put(np.stack([g["kernel"] for g in grads]))}


def schedule(pattern=WEIGHTS, *, at, sparsity=0.5, window=5, **kwargs):
    score = js.transforms.windowed_obs(
        window=window, block_size=8, damping=DAMPING, pattern=pattern, **kwargs
    )
    return js.prune_schedule(
        sparsity, every=js.schedules.at(*at), score=score, pattern=pattern
    )


def stepper(tx, apply=lambda params, updates, _: optax.apply_updates(params, updates)):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return apply(params, updates, state), state

    return jax.jit(step)


def run(tx, params, grads):
    step = stepper(tx)
    state = jax.jit(tx.init)(params)
    for g in grads:
        params, state = step(g, state, params)
    return params, state


def solved(params, grads, pattern=WEIGHTS):
    """What the solver makes of these gradients, the bias left alone."""

    @jax.jit
    def solve(kernel, grads):
        fisher = js.curvature.block_fisher(
            grads, block_size=8, damping=DAMPING, pattern=pattern
        )
        return js.solvers.obs({"kernel": kernel}, fisher, 0.5, pattern=pattern)

    found = solve(params["kernel"], stacked(grads))
    return found._replace(
        params=found.params | {"bias": params["bias"]},
        masks=found.masks | {"bias": np.ones((), bool)},
    )


@pytest.mark.parametrize(
    "pattern",
    [
        js.Block((2, 1)),  # which both the matrix and the choice must be told
        pytest.param(js.Unstructured(scope="global"), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_pruning_step_is_the_solver_on_the_window(pattern):
    rng = np.random.default_rng(0)
    params = params_of(rng)
    grads = gradients(rng, params, 7)
    tx = schedule(pattern, at=[6]).wrap(optax.sgd(0.0))
    found, state = run(tx, params, grads)
    expected = solved(params, grads[2:], pattern)
    jax.tree.map(np.testing.assert_array_equal, js.masks_of(state), expected.masks)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected.params)
    js.assert_sparse(state, found)


def test_a_window_that_is_not_full_counts_what_it_has():
    rng = np.random.default_rng(1)
    params = params_of(rng)
    grads = gradients(rng, params, 3)
    found, _ = run(schedule(at=[2], window=50).wrap(optax.sgd(0.0)), params, grads)
    expected = solved(params, grads).params
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize(
    ("window", "counted"),
    [(3, 4), (7, 7), pytest.param(50, 7, marks=pytest.mark.exhaustive)],
)
def test_summed_blocks_are_those_of_the_last_gradients(window, counted):
    """Of all there were, and then of the last `window` to twice as many."""
    rng = np.random.default_rng(3)
    params = params_of(rng)
    grads = gradients(rng, params, 7)
    tx = schedule(at=[6], window=window, summed=True).wrap(optax.sgd(0.0))
    found, state = run(tx, params, grads)
    expected = solved(params, grads[-counted:])
    jax.tree.map(np.testing.assert_array_equal, js.masks_of(state), expected.masks)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected.params)


def test_summed_blocks_forget_what_was_pruned():
    """Two choices, against the window of gradients, which masks them itself."""
    rng = np.random.default_rng(4)
    params = params_of(rng)
    grads = gradients(rng, params, 6)
    sparsity = js.schedules.polynomial(init=0.25, final=0.5, begin=3, end=5, power=1)
    options = {"at": [3, 5], "sparsity": sparsity, "window": 9}
    one, _ = run(schedule(**options).wrap(optax.sgd(0.0)), params, grads)
    other, _ = run(schedule(**options, summed=True).wrap(optax.sgd(0.0)), params, grads)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, other, one)


def test_a_window_that_does_not_fit_says_its_bytes():
    """4,096 gradients of 16 million weights; nothing is made of that size."""
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    small = {"kernel": np.zeros((2, 2), np.float32)}
    score = js.transforms.windowed_obs(window=10**15, block_size=2, damping=1e-3)
    with pytest.raises(ValueError, match=r"weights: 1\.6e\+07 GB.*summed=True.* GB"):
        score.init(small)
    score = js.transforms.windowed_obs(window=10**9, block_size=2, damping=1e-3)
    with pytest.warns(UserWarning, match=r"6\.71e\+07 GB, and there are"):
        jax.eval_shape(score.init, {"kernel": shape})
    with pytest.raises(ValueError, match="dtype is that of kept gradients"):
        js.transforms.windowed_obs(
            window=2, damping=1.0, summed=True, dtype=jnp.bfloat16
        )


def test_gradual_steps_are_optimal_for_what_is_left():
    """Twice: the second update leaves out what the first one removed."""
    rng = np.random.default_rng(2)
    params = params_of(rng)
    grads = gradients(rng, params, 8)
    sparsity = js.schedules.polynomial(init=0.25, final=0.5, begin=3, end=7, power=1)
    tx = schedule(at=[3, 7], sparsity=sparsity, window=4).wrap(optax.sgd(0.0))
    step, state = stepper(tx), jax.jit(tx.init)(params)
    for g in grads[:7]:
        params, state = step(g, state, params)
    between, before = params, np.asarray(js.masks_of(state)["kernel"])
    final, state = step(grads[7], state, params)
    after = np.asarray(js.masks_of(state)["kernel"])
    assert before.sum() == 36
    assert after.sum() == 24
    assert not (after & ~before).any()
    columns = np.stack([np.asarray(g["kernel"]) for g in grads[4:]])
    for o in range(6):  # a block is the column of one output
        alive = before[:, o]
        g = np.asarray(columns[:, alive, o], np.float64)
        w = np.asarray(between["kernel"], np.float64)[alive, o]
        removed = ~after[alive, o]
        matrix = second_order.fisher(g, DAMPING)
        expected = second_order.obs_joint(w, matrix, removed)
        found = np.asarray(final["kernel"])[alive, o]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_it_adds_to_the_optimizer_s_own_step_and_in_that_step_alone():
    rng = np.random.default_rng(3)
    params = params_of(rng)
    grads = gradients(rng, params, 4)
    resting, _ = run(schedule(at=[2]).wrap(optax.sgd(0.0)), params, grads[:3])
    prune_schedule = schedule(at=[2])
    tx = prune_schedule.wrap(optax.sgd(0.1))
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    # The same weights in each step, so that the two runs see the same.
    for g in grads[:3]:
        updates, state = update(g, state, params)
    moved = jax.jit(optax.apply_updates)(params, updates)
    kept = np.asarray(js.masks_of(state)["kernel"])
    expected = resting["kernel"] - np.where(kept, 0.1 * grads[2]["kernel"], 0)
    np.testing.assert_allclose(moved["kernel"], expected, rtol=1e-5, atol=1e-6)
    updates, state = update(grads[3], state, moved)
    plain = np.where(kept, -0.1 * grads[3]["kernel"], 0)
    np.testing.assert_allclose(updates["kernel"], plain, rtol=1e-5, atol=1e-6)


def test_the_literal_chain_makes_it_in_apply_updates():
    rng = np.random.default_rng(4)
    params = params_of(rng)
    grads = gradients(rng, params, 3)
    enforced, _ = run(schedule(at=[2]).wrap(optax.sgd(0.1)), params, grads)
    tx = optax.chain(schedule(at=[2]), optax.sgd(0.1))
    step = stepper(tx, js.apply_updates)
    state, found = jax.jit(tx.init)(params), params
    for g in grads:
        found, state = step(g, state, found)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, enforced)


def test_bfloat16_windows_and_weights():
    rng = np.random.default_rng(5)
    short = lambda tree: jax.tree.map(lambda w: np.asarray(w).astype("bfloat16"), tree)
    params = short(params_of(rng))
    grads = short(gradients(rng, params, 3))
    tx = schedule(at=[2], dtype=jnp.bfloat16).wrap(optax.sgd(0.0))
    found, state = run(tx, params, grads)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    assert np.sum(np.asarray(found["kernel"]) != 0) == 24
    js.assert_sparse(state, found)


def test_errors():
    with pytest.raises(ValueError, match="window must be at least 1"):
        js.transforms.windowed_obs(window=0, damping=1.0)
    with pytest.raises(ValueError, match="either damping"):
        js.transforms.windowed_obs(window=3)
    with pytest.raises(ValueError, match="damping must be positive"):
        js.transforms.windowed_obs(window=3, damping=0.0)
    with pytest.raises(ValueError, match=r"kernel: block_size=99 exceeds the 48"):
        js.prune_schedule(
            0.5,
            every=1,
            score=js.transforms.windowed_obs(window=3, damping=1.0, block_size=99),
        ).init(params_of(np.random.default_rng(0)))
