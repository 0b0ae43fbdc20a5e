"""M-FAC as an optimizer: trajectories of a dense oracle, masks, wrappers, memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import second_order
from transforms import problems

import jaxsparse as js
from jaxsparse.transforms import _mfac as mfac

x64 = pytest.mark.usefixtures("x64")
SHAPES = {"b": (4,), "w": (3, 4)}  # in the order of `flat`
D = 16


def tree(vector):
    return jax.device_put({"b": vector[:4], "w": vector[4:].reshape(3, 4)})


def flat(tree):
    return np.concatenate([np.ravel(tree["b"]), np.ravel(tree["w"])]).astype(np.float64)


def quadratic(seed):
    """Noisy gradients of a quadratic, as a function of weights and step."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((D, D))
    noise = rng.standard_normal((100, D))
    return lambda w, step: root.T @ (root @ w) / D + noise[step]


def stepper(tx):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def run(tx, w, gradient, steps, start=None):
    """The weights before the first and after each step, and the last state."""
    params, path = tree(w), [np.array(w)]
    state = jax.jit(tx.init)(params) if start is None else start
    step_of = stepper(tx)
    for step in range(steps):
        params, state = step_of(tree(gradient(path[-1], step)), state, params)
        path.append(flat(params))
    return np.array(path), state


@x64
@pytest.mark.parametrize(
    ("momentum", "weight_decay", "window"), [(0.9, 0.03, 5), (None, 0.0, 1)]
)
def test_the_trajectory_of_the_dense_oracle(momentum, weight_decay, window):
    gradient, w = quadratic(0), np.random.default_rng(1).standard_normal(D)
    tx = js.transforms.mfac(
        0.2, window=window, damping=1e-3, momentum=momentum, weight_decay=weight_decay
    )
    path, _ = run(tx, w, gradient, 20)
    expected = second_order.mfac_optimizer(
        gradient,
        w,
        steps=20,
        learning_rate=0.2,
        window=window,
        damping=1e-3,
        momentum=momentum or 0.0,
        weight_decay=weight_decay,
    )
    assert np.max(np.abs(expected[-1] - w)) > 0.05
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-11)


@x64
def test_the_sparse_mode_with_a_mask_from_the_start():
    """Under enforce it is that of vectors compacted by the mask."""
    gradient, w = quadratic(2), np.random.default_rng(3).standard_normal(D)
    options = {"window": 5, "damping": 1e-3, "momentum": 0.9, "weight_decay": 0.03}
    prune = js.prune_schedule(0.5, every=js.schedules.at(0), where="w")
    tx = prune.wrap(js.transforms.mfac(0.01, **options))
    params, state = js.init_sparse(tx, tree(w))
    w = flat(params)
    assert np.sum(w == 0) == 6
    path, _ = run(tx, w, gradient, 20, start=state)
    expected = second_order.mfac_optimizer(
        gradient, w, steps=20, learning_rate=0.01, sparse=True, **options
    )
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(path[-1] == 0, w == 0)


def dense_run(gradient, w, masks, *, lr, window, damping, momentum, weight_decay):
    """Pruned coordinates leave weights, momentum and all rows before each step."""
    rows, v, path = np.zeros((window, D)), np.zeros(D), [np.array(w)]
    for step, mask in enumerate(masks):
        rows, v = rows * mask, v * mask
        g = (gradient(path[-1], step) + weight_decay * path[-1]) * mask
        rows[step % window] = g
        fisher = damping * np.eye(D) + rows.T @ rows / window
        v = momentum * v + (1 - momentum) * np.linalg.solve(fisher, g)
        path.append((path[-1] - lr * v) * mask)
    return np.array(path)


@x64
@pytest.mark.parametrize(
    "decay", [pytest.param(0.0, marks=pytest.mark.exhaustive), 0.5]
)
def test_what_is_pruned_leaves_the_window_and_what_returns_starts_with_zeros(decay):
    gradient, w = quadratic(4), np.random.default_rng(5).standard_normal(D)
    options = {
        "window": 6,
        "damping": 1e-3,
        "momentum": 0.9,
        "weight_decay": decay,
    }
    phases = js.schedules.alternating(0.5, begin=4, end=14, sparse=5, dense=3)
    prune = js.prune_schedule(phases, every=1, where="w")
    tx = prune.wrap(js.transforms.mfac(0.01, **options))
    masks = []

    params, state, path = tree(w), jax.jit(tx.init)(tree(w)), [w]
    step_of = stepper(tx)
    for step in range(20):
        params, state = step_of(tree(gradient(path[-1], step)), state, params)
        path.append(flat(params))
        kept = js.masks_of(state)
        masks.append(flat({"b": np.ones(4), "w": kept["w"]}))
        (window,) = windows(state)
        dead = ~np.asarray(kept["w"])
        assert not np.any(np.asarray(window.grads["w"])[:, dead])
    changes = [int(np.sum(a != b)) for a, b in itertools.pairwise(masks)]
    assert changes.count(6) >= 3
    expected = dense_run(gradient, w, masks, lr=0.01, **options)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-11)


def windows(state):
    is_window = lambda x: isinstance(x, js.curvature.MFacWindow)
    leaves = jax.tree.leaves(state, is_leaf=is_window)
    return [x for x in leaves if is_window(x)]


@x64
def test_a_gradient_with_nan_is_rejected_and_forgotten():
    rng = np.random.default_rng(6)
    tx = optax.apply_if_finite(js.transforms.mfac(0.1, window=3), 5)
    params = tree(rng.standard_normal(D))
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    _, state = update(tree(rng.standard_normal(D)), state, params)
    bad = rng.standard_normal(D)
    bad[7] = np.nan
    updates, after = update(tree(bad), state, params)
    np.testing.assert_array_equal(flat(updates), 0)
    g = tree(rng.standard_normal(D))
    a, _ = update(g, after, params)
    b, _ = update(g, state, params)
    np.testing.assert_array_equal(flat(a), flat(b))
    # Without the wrapper the update says so, and the window is as it was.
    alone = mfac.scale_by_mfac(window=3)
    updates, _ = alone.update(tree(bad), alone.init(params))
    np.testing.assert_array_equal(np.isnan(flat(updates)), np.isnan(bad))


@x64
def test_inside_of_wrappers_it_sees_what_they_show():
    rng = np.random.default_rng(7)
    params, grads = tree(rng.standard_normal(D)), tree(rng.standard_normal(D))
    options = {"window": 3, "damping": 1e-2}
    scale = mfac.scale_by_mfac(**options)
    w = {"w": params["w"]}
    expected, _ = scale.update({"w": grads["w"]}, scale.init(w))
    masked = optax.masked(scale, {"w": True, "b": False})
    updates, _ = masked.update(grads, masked.init(params), params)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-12)
    np.testing.assert_array_equal(updates["b"], grads["b"])
    split = optax.partition({"m": scale, "s": optax.sgd(1.0)}, {"w": "m", "b": "s"})
    updates, _ = split.update(grads, split.init(params), params)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-12)


@x64
def test_what_is_pruned_is_found_through_wrappers():
    params = tree(np.random.default_rng(8).standard_normal(D))
    scale = optax.masked(mfac.scale_by_mfac(window=3), {"w": True, "b": False})
    prune = js.prune_schedule(0.5, every=js.schedules.at(2), where="w")
    tx = prune.wrap(optax.chain(scale, optax.sgd(0.1)))
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(3):
        (before,) = windows(state)
        _, state = update(params, state, params)
    (after,) = windows(state)
    pruned = ~np.asarray(js.masks_of(state)["w"])
    assert np.all(np.asarray(before.grads["w"])[:2, pruned] != 0)
    np.testing.assert_array_equal(np.asarray(after.grads["w"])[:, pruned], 0)


@x64
def test_damping_may_follow_a_schedule_and_change_after_a_restore():
    rng = np.random.default_rng(9)
    params = tree(rng.standard_normal(D))
    first, second = (tree(rng.standard_normal(D)) for _ in range(2))
    damping = lambda step: jnp.where(step < 1, 1e-2, 0.3)
    tx = optax.inject_hyperparams(mfac.scale_by_mfac, static_args=("window", "dtype"))(
        window=3, damping=damping
    )
    update = jax.jit(tx.update)
    _, state = update(first, jax.jit(tx.init)(params), params)
    scheduled, _ = update(second, state, params)
    tx = mfac.scale_by_mfac(window=3, damping=1e-2)
    _, state = tx.update(first, tx.init(params))
    restored, _ = mfac.scale_by_mfac(window=3, damping=0.3).update(second, state)
    rows = np.stack([flat(first), flat(second), np.zeros(D)])
    dense = 0.3 * np.eye(D) + rows.T @ rows / 3
    expected = np.linalg.solve(dense, flat(second))
    np.testing.assert_allclose(flat(scheduled), expected, rtol=1e-9)
    np.testing.assert_allclose(flat(restored), expected, rtol=1e-9)


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(
    "dtype", [None, pytest.param(jnp.bfloat16, marks=pytest.mark.exhaustive)]
)
def test_it_trains_further_in_as_many_steps_than_others(dtype):
    """SGD and Adam of `problems.OPTIMIZERS` come to 2.0 and 2.5."""
    rate = optax.cosine_decay_schedule(1.0, problems.STEPS)
    tx = js.transforms.mfac(rate, window=32, damping=0.1, momentum=0.9, dtype=dtype)
    params, _ = problems.train(tx, problems.params())
    assert problems.loss(params, problems.batch(1000)) < 0.02


def test_a_step_that_is_given_its_state_holds_one_window():
    shapes = {"w": (300, 160), "b": (160,)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    prune = js.prune_schedule(
        js.schedules.polynomial(final=0.8, begin=0, end=10),
        every=js.schedules.every(5, begin=0, end=10),
    )
    opt = js.transforms.mfac(1e-2, window=96, momentum=0.9, weight_decay=1e-3)

    def step(tx, params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # The second figure: what it takes to prune, a sixth of the window.
    for tx, most in ((opt, 0.1), (prune.wrap(opt), 0.4)):
        state = jax.eval_shape(tx.init, params)
        (window,) = windows(state)
        jitted = jax.jit(step, static_argnums=0, donate_argnums=(1, 2))
        compiled = jitted.lower(tx, params, state, params).compile()
        memory = compiled.memory_analysis()
        size = 4 * window.grads["w"].size
        assert memory.alias_size_in_bytes > size
        assert memory.temp_size_in_bytes < most * size
        assert "conditional" not in compiled.as_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"momentum": -0.1}, "momentum must lie in"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        js.transforms.mfac(1e-3, **options)
