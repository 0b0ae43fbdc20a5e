"""The transformation by itself: masks on schedule, checks, adoption, quiet steps."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import problems

import jaxsparse as js

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def pruning_of(state):
    (found,) = js.transforms.find_states(state)
    return found


def test_masks_follow_the_schedule_and_are_those_of_patterns_masks():
    schedule = js.schedules.polynomial(final=0.9, begin=2, end=12, power=3)
    prune = js.prune_schedule(schedule, every=js.schedules.every(5, begin=2, end=12))
    tx = prune.wrap(optax.sgd(0.05))
    seen = {}

    def look(step, params, state):
        seen[step] = (params, js.masks_of(state))

    problems.train(tx, problems.params(), steps=15, seen=look)
    prune_to = jax.jit(lambda params, step: js.prune(params, schedule(step)).masks)
    for step in (2, 7, 12):
        before, _ = seen[step - 1]
        expected = prune_to(before, step)
        for got, want in zip(
            jax.tree.leaves(seen[step][1]), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_array_equal(got, want)
    # Quiet steps keep them.
    for step in (3, 4, 5, 6):
        for got, want in zip(
            jax.tree.leaves(seen[step][1]), jax.tree.leaves(seen[2][1]), strict=True
        ):
            np.testing.assert_array_equal(got, want)


def test_a_tree_of_schedules_gives_each_parameter_its_own():
    params = problems.params()
    total = js.allocations.erk(params, 0.5)
    trees = jax.tree.map(
        lambda s: js.schedules.polynomial(final=s, begin=0, end=4), total
    )
    tx = js.prune_schedule(trees, every=1).wrap(optax.sgd(0.01))
    params, state = problems.train(tx, params, steps=6)
    reached = js.patterns.sparsity_of(js.masks_of(state), params)
    for path in ("dense_0", "dense_1"):
        n = params[path]["kernel"].size
        assert round(reached[path]["kernel"] * n) == np.floor(
            total[path]["kernel"] * n + 0.5
        )


def test_scores_from_raw_gradients_see_them_before_they_are_hidden():
    score = lambda params, grads: jax.tree.map(jnp.abs, grads)
    prune = js.prune_schedule(0.5, every=1, score=score)
    tx = prune.wrap(optax.sgd(0.0))
    params = {"w": jnp.ones((1, 4))}
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update({"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}, state, params)
    np.testing.assert_array_equal(js.masks_of(state)["w"], [[0, 0, 1, 1]])
    # The next choice brings back what was hidden, since it is scored by raw gradients.
    _, state = update({"w": jnp.array([[9.0, 9.0, 3.0, 4.0]])}, state, params)
    np.testing.assert_array_equal(js.masks_of(state)["w"], [[1, 1, 0, 0]])


def test_a_score_with_memory_is_updated_in_every_step():
    score = js.scores.moving_average(js.scores.taylor, decay=0.5)
    prune = js.prune_schedule(
        js.schedules.one_shot(0.5, step=3), every=js.schedules.at(3), score=score
    )
    tx = prune.wrap(optax.sgd(0.0))
    params = {"w": jnp.ones((1, 2))}
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for g in ([8.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]):
        _, state = update({"w": jnp.array([g])}, state, params)
    average = pruning_of(state).score_state[1]["w"]
    np.testing.assert_allclose(average, [[0.5, 0.875]])
    np.testing.assert_array_equal(js.masks_of(state)["w"], [[False, True]])


def test_random_scores_are_nested_along_a_rising_schedule():
    score = functools.partial(js.scores.random, key=jax.random.key(0))
    prune = js.prune_schedule(
        js.schedules.polynomial(final=0.9, begin=0, end=9), every=1, score=score
    )
    masks = []
    problems.train(
        prune.wrap(optax.sgd(0.01)),
        problems.params(),
        steps=10,
        seen=lambda t, p, s: masks.append(js.masks_of(s)["dense_0"]["kernel"]),
    )
    for earlier, later in itertools.pairwise(masks):
        assert not np.any(np.asarray(later) & ~np.asarray(earlier))


def test_the_second_step_does_not_trace_again():
    traces = []

    def score(params):
        traces.append(1)
        return js.scores.magnitude(params)

    tx = js.prune_schedule(
        js.schedules.polynomial(final=0.9, begin=0, end=9), every=3, score=score
    ).wrap(optax.sgd(1e-2))
    after = []
    look = lambda *_: after.append(len(traces))
    problems.train(tx, problems.params(), steps=10, seen=look)
    assert after[0] > 0
    assert after == 10 * after[:1]


def test_eager_and_jitted_training_agree():
    tx = js.prune_schedule(0.5, every=2).wrap(optax.sgd(0.5))
    params = {
        "w": jax.device_put(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))
    }
    results = []
    for update in (tx.update, jax.jit(tx.update)):
        p, state = params, tx.init(params)
        for _ in range(3):
            updates, state = update(jax.tree.map(np.sin, p), state, p)
            p = optax.apply_updates(p, updates)
        results.append((p["w"], js.masks_of(state)["w"]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_vmapped_training_prunes_each_member_by_itself():
    tx = js.prune_schedule(0.5, every=2).wrap(optax.sgd(1e-2, momentum=0.9))
    drawn = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    members = {"w": jax.device_put(drawn)}

    def run(params):
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    together = np.asarray(jax.jit(jax.vmap(run))(members))
    run = jax.jit(run)
    for i in range(3):
        alone = np.asarray(run({"w": drawn[i]}))
        np.testing.assert_array_equal(together[i] != 0, alone != 0)
        assert np.sum(alone == 0) == 12


def test_one_can_differentiate_through_a_training_step():
    tx = js.prune_schedule(0.5, every=1).wrap(optax.sgd(0.1))

    def after_one_step(params):
        updates, _ = tx.update(params, tx.init(params), params)
        return jnp.sum(optax.apply_updates(params, updates)["w"])

    grad = jax.jit(jax.grad(after_one_step))({"w": jnp.array([[1.0, 3.0]])})
    np.testing.assert_allclose(grad["w"], [[0.0, 0.9]], rtol=1e-6)


def test_init_takes_abstract_parameters():
    tx = js.prune_schedule(0.5, every=1, pattern=js.Channel()).wrap(optax.adam(1e-2))
    abstract = jax.eval_shape(problems.params)
    state = tx.init(abstract)
    assert js.masks_of(state)["dense_0"]["kernel"].shape == (1, 12)
    shapes = jax.eval_shape(tx.init, abstract)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)


def test_a_schedule_that_starts_sparse_masks_from_the_start():
    tx = js.prune_schedule(0.5, every=1).wrap(optax.sgd(0.1))
    start = problems.params()
    params, state = js.init_sparse(tx, start)
    expected = jax.jit(lambda params: js.prune(params, 0.5))(start)
    np.testing.assert_array_equal(
        js.masks_of(state)["dense_0"]["kernel"], expected.masks["dense_0"]["kernel"]
    )
    np.testing.assert_array_equal(
        params["dense_0"]["kernel"], expected.params["dense_0"]["kernel"]
    )
    _, state = problems.train(tx, start, steps=3)
    assert int(pruning_of(state).leaked) == 0


def test_a_dense_optimizer_state_is_adopted():
    adam = optax.adam(1e-2)
    params, dense = problems.train(adam, problems.params(), steps=20)
    schedule = js.prune_schedule(
        js.schedules.polynomial(final=0.5, begin=20, end=30),
        every=js.schedules.every(5, begin=20, end=30),
    )
    state = schedule.adopt(dense, params, step=20)
    tx = schedule.wrap(adam)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    params, state = problems.train(tx, params, start=20, steps=40, opt_state=state)
    masks = js.masks_of(state)
    assert np.sum(~np.asarray(masks["dense_0"]["kernel"])) == 96
    js.assert_sparse(state, params)
    assert int(optax.tree_utils.tree_get(state, "count")) == 40


def test_masks_of_a_sparse_model_are_adopted():
    params, masks = js.prune(problems.params(), 0.75)
    sgd = optax.sgd(1e-2, momentum=0.9)
    schedule = js.prune_schedule(
        js.schedules.one_shot(0.9, step=100), every=js.schedules.at(100)
    )
    dense = jax.jit(sgd.init)(params)
    state = schedule.adopt(dense, params, masks=masks)
    params, state = problems.train(schedule.wrap(sgd), params, steps=5, opt_state=state)
    np.testing.assert_array_equal(
        np.asarray(params["dense_0"]["kernel"]) != 0, masks["dense_0"]["kernel"]
    )
    with pytest.raises(ValueError, match=r"dense_0/kernel: 144 weights are not zero"):
        schedule.adopt(dense, problems.params(), masks=masks)


def test_the_target_is_not_in_the_state_so_a_new_one_takes_effect():
    first = js.prune_schedule(0.5, every=1).wrap(optax.sgd(1e-2))
    second = js.prune_schedule(0.75, every=1).wrap(optax.sgd(1e-2))
    params, state = problems.train(first, problems.params(), steps=3)
    _, state = problems.train(second, params, start=3, steps=5, opt_state=state)
    assert np.sum(~np.asarray(js.masks_of(state)["dense_0"]["kernel"])) == 144


def test_optax_schedules_are_schedules():
    prune = js.prune_schedule(optax.polynomial_schedule(0, 0.8, 3, 30), every=1)
    _, state = problems.train(prune.wrap(optax.sgd(0.01)), problems.params(), steps=35)
    assert np.sum(~np.asarray(js.masks_of(state)["dense_0"]["kernel"])) == 154


def test_masks_keep_their_parameter_s_sharding():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    drawn = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    params, alone = {"w": jax.device_put(drawn, spec)}, {"w": jax.device_put(drawn)}
    tx = js.prune_schedule(0.5, every=1).wrap(optax.adam(1e-2))
    start = tx.init(params)
    assert js.masks_of(start)["w"].sharding == spec
    compiled = jax.jit(tx.update).lower(params, start, params).compile()
    updates, state = compiled(params, start, params)
    expected, other = jax.jit(tx.update)(alone, jax.jit(tx.init)(alone), alone)
    masks = js.masks_of(state)["w"]
    assert masks.sharding.is_equivalent_to(spec, 2)
    np.testing.assert_array_equal(masks, js.masks_of(other)["w"])
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    new = drawn + np.asarray(updates["w"])
    np.testing.assert_array_equal(new != 0, masks)
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|\bsort\(", text)


# What is refused, and what the message says.


def refused(match, *args, **kwargs):
    with pytest.raises((ValueError, TypeError), match=match):
        js.prune_schedule(*args, **kwargs)


def test_a_schedule_that_never_reaches_its_target():
    schedule = js.schedules.polynomial(final=0.9, begin=0, end=20)
    refused(
        r"never reaches its target: masks change for the last time at step 14, at 0",
        schedule,
        every=js.schedules.every(7, end=20),
    )
    refused(
        "never reaches its target",
        schedule,
        every=js.schedules.every(5),
        total_steps=18,
    )
    js.prune_schedule(schedule, every=js.schedules.every(5), total_steps=21)
    js.prune_schedule(schedule, every=7)  # without end: the next update gets there


def test_no_update_before_training_ends():
    with pytest.raises(ValueError, match=r"never change: the first update"):
        js.schedules.every(100, begin=1_000, end=900)
    refused(
        r"Masks would never change.*no update before training ends after 50 steps",
        0.5,
        every=js.schedules.every(100, begin=100),
        total_steps=50,
    )
    refused(
        "Masks would never change", 0.5, every=lambda step: step < 0, total_steps=10
    )


@pytest.mark.parametrize("bad", [1.0, -0.1, float("nan"), 90])
def test_a_sparsity_outside_of_its_range(bad):
    refused(r"must lie in \[0, 1\)", bad, every=1)
    refused(r"must lie in \[0, 1\)", lambda step: jnp.float32(bad), every=1)


def test_other_types():
    refused(r"every: a number of steps", 0.5, every="often")
    refused(r"interval must be at least 1", 0.5, every=0)
    refused(
        r"score\(params\) or score\(params, grads\)",
        0.5,
        every=1,
        score=js.scores.random,
    )
    refused(r"A score is a function", 0.5, every=1, score="magnitude")


def test_init_names_the_parameter_that_does_not_fit():
    params = {"layer": {"kernel": jnp.ones((6, 4))}}
    tx = js.prune_schedule(None, every=1, pattern=js.NM(2, 4)).wrap(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"layer/kernel: .*has 6"):
        tx.init(params)
    tx = js.prune_schedule(0.5, every=1, where="kernl$").wrap(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"nearest paths: \['layer/kernel'\]"):
        tx.init(params)
    tx = js.prune_schedule(0.9, every=1, pattern=js.NM(2, 4)).wrap(optax.sgd(0.1))
    with pytest.raises(ValueError, match="removes at most 2 of 4"):
        tx.init({"kernel": jnp.ones((8, 4))})


def test_update_without_params_says_how_to_call_it():
    params = problems.params()
    schedule = js.prune_schedule(0.5, every=1)
    masks = js.prune(params, 0.5).masks
    for tx in (schedule, schedule.wrap(optax.sgd(0.1)), js.keep_sparse(masks)):
        with pytest.raises(ValueError, match=r"needs the parameters: call `tx\.update"):
            tx.update(params, tx.init(params))


def test_enforce_without_a_pruning_transformation():
    with pytest.raises(ValueError, match=r"nothing to enforce.*js\.prune_schedule"):
        js.enforce(optax.adam(1e-3)).init(problems.params())
    dense = jax.jit(optax.adam(1e-3).init)(problems.params())
    for call in (
        lambda: js.masks_of(dense),
        lambda: js.assert_sparse(dense),
        lambda: js.apply_updates(problems.params(), problems.params(), dense),
        lambda: js.init_sparse(optax.adam(1e-3), problems.params()),
    ):
        with pytest.raises(ValueError, match="No pruning transformation"):
            call()


def test_keep_sparse_refuses_masks_of_another_model_and_scores_of_gradients():
    masks = js.prune(problems.params(), 0.5).masks
    with pytest.raises(ValueError, match=r"masks must have exactly the structure"):
        js.keep_sparse(masks).init({"other": jnp.ones((2, 2))})
    small = {"w": jnp.ones((2, 2), bool)}
    with pytest.raises(ValueError, match=r"w: a mask of shape \(2, 2\) does not"):
        js.keep_sparse(small).init({"w": jnp.ones((3, 3))})
    by_gradient = js.prune_schedule(0.5, every=1, score=js.scores.taylor)
    with pytest.raises(ValueError, match="needs raw gradients"):
        js.keep_sparse(by_gradient).init(problems.params())


def test_keep_sparse_leaves_the_caller_s_masks_alone_when_a_step_donates():
    params, masks = js.prune(problems.params(), 0.5)
    tx = optax.chain(optax.adam(1e-2), js.keep_sparse(masks))
    step = jax.jit(tx.update, donate_argnums=1)
    _, state = step(params, tx.init(params), params)
    step(params, state, params)
    assert np.sum(masks["dense_0"]["kernel"]) == 96


@pytest.mark.parametrize(
    "pattern",
    [
        js.Unstructured("global"),
        js.NM(2, 4),
        pytest.param(js.Unstructured(), marks=pytest.mark.exhaustive),
        pytest.param(js.Block((4, 2)), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_complex_kernels_are_pruned_by_magnitude(pattern):
    """As `prune` does, with the same masks."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 4)) + 1j * rng.standard_normal((8, 4))
    params = {"w": jnp.asarray(w, jnp.complex64), "v": jnp.asarray(w.real, jnp.float32)}
    sparsity = None if isinstance(pattern, js.NM) else 0.5
    expected = js.prune(params, sparsity, pattern=pattern).masks
    for every in (1, js.schedules.at(1)):  # at init, or in a step
        tx = js.prune_schedule(sparsity, every=every, pattern=pattern)
        tx = tx.wrap(optax.sgd(1e-6))
        new, state = params, tx.init(params)
        step = jax.jit(tx.update)
        for _ in range(2):
            updates, state = step(params, state, new)
            new = optax.apply_updates(new, updates)
        jax.tree.map(np.testing.assert_array_equal, js.masks_of(state), expected)
        assert new["w"].dtype == jnp.complex64
        assert not np.asarray(new["w"])[~np.asarray(expected["w"])].any()
        js.assert_sparse(state, new)


def test_a_global_scope_takes_little_more_memory_than_the_optimizer():
    params = {f"kernel_{i}": jnp.zeros((256, 512)) for i in range(6)}
    size = sum(w.nbytes for w in params.values())

    def scratch(tx):
        def step(params, state, scale):
            grads = jax.tree.map(lambda w: scale * w, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, 2.0)
        return lowered.compile().memory_analysis().temp_size_in_bytes / size

    prune_schedule = js.prune_schedule(0.9, every=2, pattern=js.Unstructured("global"))
    more = scratch(prune_schedule.wrap(optax.adam(1e-3))) - scratch(optax.adam(1e-3))
    assert more < 0.6  # a byte for each weight of four, and what is small
