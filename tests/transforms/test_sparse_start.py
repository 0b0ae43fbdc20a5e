"""Training that begins from a model that is sparse already."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

HELD = r"sparse already .*kernel: \d+.* held at zero .* zeros='train'"


def model():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 16)).astype(np.float32)
    w[np.abs(w) < 1] = 0  # two thirds
    dense = np.full((16,), 0.5, np.float32)
    return jax.device_put({"a": {"kernel": w, "bias": dense}})


def later(sparsity=0.7, **options):
    """The first masks come in step 3, and their score needs gradients."""
    score = js.scores.taylor
    every = js.schedules.every(3, begin=3, end=6)
    return js.prune_schedule(sparsity, every=every, score=score, **options)


def trained(tx, params, state, steps):
    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def nonzeros(params):
    return int(jnp.sum(params["a"]["kernel"] != 0))


def test_zeros_are_held_until_masks_are_chosen():
    params = model()
    tx = later().wrap(optax.sgd(0.1, momentum=0.9))
    with pytest.warns(UserWarning, match=HELD):
        state = tx.init(params)
    after, state = trained(tx, params, state, 3)
    assert nonzeros(after) == nonzeros(params)
    assert not jnp.array_equal(after["a"]["kernel"], params["a"]["kernel"])
    after, state = trained(tx, after, state, 1)
    assert nonzeros(after) == 77  # of 256, as the schedule asks
    js.assert_sparse(state, after)


def test_zeros_are_held_under_jit_and_by_adopt():
    params = model()
    tx = later().wrap(optax.sgd(0.1, momentum=0.9))
    after, _ = trained(tx, params, jax.jit(tx.init)(params), 2)
    assert nonzeros(after) == nonzeros(params)
    with pytest.warns(UserWarning, match=HELD):
        state = later().adopt(optax.sgd(0.1, momentum=0.9).init(params), params)
    after, _ = trained(tx, params, state, 2)
    assert nonzeros(after) == nonzeros(params)


def test_zeros_are_trained_on_request():
    params = model()
    tx = later(zeros="train").wrap(optax.sgd(0.1, momentum=0.9))
    after, _ = trained(tx, params, tx.init(params), 2)
    assert nonzeros(after) == 256


@pytest.mark.parametrize("kernel", [np.zeros((8, 8)), np.eye(8) + 1, np.ones((8, 8))])
def test_kernels_of_zeros_alone_and_dense_ones_are_trained_without_a_word(kernel):
    params = jax.device_put({"kernel": kernel.astype(np.float32)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = later().init(params)
    assert jnp.all(state.masks["kernel"])


def test_the_masks_have_the_shape_of_the_pattern():
    w = np.ones((6, 4), np.float32)
    w[:, 1], w[0, 2] = 0, 0
    tx = later(0.5, pattern=js.Channel())
    with pytest.warns(UserWarning, match="held at zero"):
        masks = tx.init(jax.device_put({"kernel": w})).masks
    assert masks["kernel"].tolist() == [[True, False, True, True]]


def polynomial(init):
    schedule = js.schedules.polynomial(init=init, final=0.9, begin=2, end=6)
    return js.prune_schedule(schedule, every=js.schedules.every(2, begin=2, end=6))


def test_a_schedule_that_begins_below_is_warned_of_with_both_numbers():
    params, masks = js.prune(model(), 0.7)
    dense = optax.sgd(0.1, momentum=0.9).init(params)
    said = r"69.9% sparse, and the schedule asks for 10.0% .* at step 2: .* come back"
    with pytest.warns(UserWarning, match=said):
        polynomial(0.1).adopt(dense, params, masks=masks)
    with (
        pytest.warns(UserWarning, match=said),
        pytest.warns(UserWarning, match="held at zero"),
    ):
        polynomial(0.1).init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        polynomial(0.7).adopt(dense, params, masks=masks)
        polynomial(0.1).adopt(dense, params, step=6, masks=masks)


def test_check_says_that_nothing_was_pruned():
    params = jax.device_put({"kernel": np.ones((4, 4), np.float32)})
    every = js.schedules.every(10, begin=100, end=200)
    tx = js.prune_schedule(0.5, every=every).wrap(optax.sgd(0.1))
    state = tx.init(params)
    js.assert_sparse(state, params)
    _, state = tx.update(params, state, params)
    with pytest.warns(UserWarning, match="Nothing is pruned after 1 steps"):
        js.assert_sparse(state, params)
