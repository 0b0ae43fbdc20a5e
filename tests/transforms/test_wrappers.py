"""Around and inside of optax's wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import problems
from transforms.test_zeros import assert_exact_zeros

import jaxsparse as js

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def schedule(**options):
    return js.prune_schedule(
        js.schedules.polynomial(final=0.75, begin=2, end=12),
        every=js.schedules.every(2, begin=2, end=12),
        **options,
    )


def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" if path[-1].key == "kernel" else "rest", params
    )


def kernels(params):
    return jax.tree.map(lambda label: label == "kernel", labels(params))


HOLDING = {
    "clip": lambda: js.enforce(
        optax.chain(schedule(), optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    ),
    "a schedule of learning rates": lambda: schedule().wrap(
        optax.adamw(optax.cosine_decay_schedule(1e-2, 40))
    ),
    "inject_hyperparams": lambda: schedule().wrap(
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    ),
    "masked inside": lambda: js.enforce(
        optax.chain(schedule(), optax.masked(optax.adam(1e-2), kernels))
    ),
    "masked pruning": lambda: js.enforce(
        optax.chain(optax.masked(schedule(), kernels), optax.adam(1e-2))
    ),
    "partition": lambda: optax.partition(
        {"kernel": schedule().wrap(optax.adam(1e-2)), "rest": optax.sgd(1e-2)}, labels
    ),
    "partition inside": lambda: js.enforce(
        optax.chain(
            schedule(),
            optax.partition(
                {"kernel": optax.adam(1e-2), "rest": optax.sgd(1e-2)}, labels
            ),
        )
    ),
    "pruning within a partition": lambda: js.enforce(
        optax.partition(
            {
                "kernel": optax.chain(schedule(), optax.adam(1e-2)),
                "rest": optax.sgd(1e-2),
            },
            labels,
        )
    ),
    "MultiSteps outside": lambda: optax.MultiSteps(
        schedule().wrap(optax.adam(1e-2)), 2
    ),
    "MultiSteps inside": lambda: js.enforce(
        optax.MultiSteps(
            optax.chain(schedule(), optax.adam(1e-2)), 2
        ).gradient_transformation()
    ),
    "apply_if_finite outside": lambda: optax.apply_if_finite(
        schedule().wrap(optax.adam(1e-2)), 3
    ),
    "apply_if_finite inside": lambda: js.enforce(
        optax.chain(schedule(), optax.apply_if_finite(optax.adam(1e-2), 3))
    ),
    "nesterov momentum": lambda: schedule().wrap(
        optax.sgd(1e-2, momentum=0.9, nesterov=True)
    ),
}


# That zeros hold in a few steps with these, `contracts/test_transforms.py` tests.
IN_CONTRACTS = (
    *("clip", "a schedule of learning rates", "inject_hyperparams"),
    *("masked inside", "partition inside", "MultiSteps outside", "MultiSteps inside"),
    *("apply_if_finite outside", "apply_if_finite inside"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.exhaustive if x in IN_CONTRACTS else [])
        for x in HOLDING
    ],
)
def test_zeros_hold(name):
    params, state = problems.train(HOLDING[name](), problems.params(), steps=40)
    masks = js.masks_of(state)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert np.sum(masks["dense_0"]["kernel"]) == 48
    assert_exact_zeros(params, masks)
    js.assert_sparse(state, params)


def test_a_nan_gradient_under_apply_if_finite_does_not_advance_the_schedule():
    tx = optax.apply_if_finite(js.prune_schedule(0.5, every=1).wrap(optax.sgd(0.1)), 3)
    params = problems.params()
    state = jax.jit(tx.init)(params)
    bad = jax.tree.map(lambda w: np.full(w.shape, np.nan, w.dtype), params)
    updates, state = jax.jit(tx.update)(bad, state, params)
    (pruning,) = js.transforms.find_states(state)
    assert int(pruning.step) == 0
    assert all(not np.any(u) for u in jax.tree.leaves(updates))


BREAKING = {
    "an average of updates": lambda inner: optax.chain(inner, optax.ema(0.9)),
    "schedule_free": lambda inner: optax.contrib.schedule_free(
        inner, learning_rate=1e-2, b1=0.9
    ),
}


@pytest.mark.parametrize("name", BREAKING)
def test_averages_outside_of_enforce_break_the_zeros_and_check_says_so(name):
    tx = BREAKING[name](schedule().wrap(optax.sgd(1e-1)))
    params, state = problems.train(tx, problems.params(), steps=40)
    with pytest.raises(ValueError, match="something outside of it changes"):
        js.assert_sparse(state, params)


def test_lookahead_outside_breaks_the_zeros_and_masking_the_slow_weights_mends_it():
    tx = optax.lookahead(schedule().wrap(optax.sgd(1e-1)), 5, 0.5)
    params = optax.LookaheadParams.init_synced(problems.params())
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(problems.loss)(params.fast, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(15):
        params, state = step(params, state, problems.batch(t))
    masks = js.masks_of(state)
    slow = np.asarray(params.slow["dense_0"]["kernel"])
    assert np.any(slow[~np.asarray(masks["dense_0"]["kernel"])] != 0)
    assert_exact_zeros(jax.jit(js.patterns.apply)(params.slow, masks), masks)


def test_tree_map_params_reaches_the_moments_and_not_the_masks_alone():
    tx = schedule().wrap(optax.adam(1e-2))
    state = jax.jit(tx.init)(problems.params())
    doubled = optax.tree_utils.tree_map_params(
        tx, lambda x: np.full_like(x, 2) if x.dtype == jnp.float32 else x, state
    )
    assert (
        float(optax.tree_utils.tree_get(doubled, "mu")["dense_1"]["kernel"][0, 0]) == 2
    )


def test_unexpected_extra_arguments_reach_the_inner_optimizer():
    plateau = optax.chain(
        optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    )
    tx = schedule().wrap(plateau)
    params = problems.params()
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(4):
        _, state = update(params, state, params, value=np.float32(1.0), other=3)
    assert float(optax.tree_utils.tree_get(state, "scale")) < 1


@pytest.mark.parametrize("jit", [False, True])
def test_wrap_runs_the_optimizer_once_in_a_step(jit):
    adam, calls = optax.adam(1e-2), []

    def update(updates, state, params=None):
        calls.append(jax.tree.structure(updates))
        return adam.update(updates, state, params)

    counted = optax.GradientTransformation(adam.init, update)
    rising = js.schedules.polynomial(final=0.5, begin=0, end=4)
    prune_schedule = js.prune_schedule(rising, every=2)
    tx = prune_schedule.wrap(counted)
    same = js.enforce(optax.chain(prune_schedule, adam))
    params = {"w": jnp.arange(1.0, 13).reshape(3, 4), "b": jnp.ones(4)}
    run = jax.jit if jit else lambda f: f
    step, step_of_same = run(tx.update), run(same.update)
    state = tx.init(params)
    for turn in range(5):
        before = len(calls)
        updates, new = step(params, state, params)
        assert len(calls) - before == (1 if turn == 0 or not jit else 0)
        found = step_of_same(params, state, params)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
        jax.tree.map(close, found, (updates, new))
        params, state = optax.apply_updates(params, updates), new
    assert int(jnp.sum(params["w"] == 0)) == 6


def test_a_schedule_within_what_is_wrapped_is_found():
    later = js.prune_schedule(0.75, every=js.schedules.at(2), where="v")
    tx = js.prune_schedule(0.5, every=js.schedules.at(1), where="w").wrap(
        optax.chain(later, optax.adam(1e-2))
    )
    params = {k: jnp.arange(1.0, 9).reshape(2, 4) for k in "vw"}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    zeros = {k: int(jnp.sum(x == 0)) for k, x in params.items()}
    assert zeros == {"v": 6, "w": 4}


def test_leaks_are_counted_over_parameters_of_any_shapes():
    shapes = [(4, 6)] * 10 + [(6, 4)] + [(3, 5)] * 2
    params = {f"l{i}": {"kernel": jnp.ones(s)} for i, s in enumerate(shapes)}
    tx = optax.chain(js.prune_schedule(0.5, every=1), optax.sgd(0.0))
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state, params)
    _, state = jax.jit(tx.update)(params, state, params)  # nothing was projected
    (pruning,) = js.transforms.find_states(state)
    removed = sum(int(jnp.sum(~m)) for m in jax.tree.leaves(pruning.masks))
    assert int(pruning.leaked) == removed == 11 * 12 + 2 * 8
