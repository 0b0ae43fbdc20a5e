"""What the optimizer remembers of coordinates that were pruned or came back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import problems

import jaxsparse as js

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

LR = 0.01


def run_adam(tx, steps, weights, grad=1.0):
    """Trains with a constant gradient; gives weights and states after each step."""
    params = {"w": np.asarray(weights, np.float32)}
    grads = {"w": np.full_like(params["w"], grad)}

    @jax.jit
    def step(state, params):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    state = jax.jit(tx.init)(params)
    seen = []
    for _ in range(steps):
        state, params = step(state, params)
        seen.append((np.asarray(params["w"]), state))
    return seen


def moments(state):
    adam = [
        s
        for s in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        )
        if isinstance(s, optax.ScaleByAdamState)
    ]
    return np.asarray(adam[0].mu["w"]), np.asarray(adam[0].nu["w"])


def test_moments_are_zero_in_the_very_step_that_prunes():
    prune = js.prune_schedule(js.schedules.one_shot(0.5, step=5), every=1)
    weights = [[1.0, 10.0, 2.0, 20.0]]
    seen = run_adam(prune.wrap(optax.adam(LR)), 7, weights)
    mu, nu = moments(seen[4][1])
    assert np.all(mu > 0)
    mu, nu = moments(seen[5][1])
    np.testing.assert_array_equal(mu[0, [0, 2]], 0)
    np.testing.assert_array_equal(nu[0, [0, 2]], 0)
    assert np.all(mu[0, [1, 3]] > 0)


@pytest.mark.parametrize(
    "wait", [pytest.param(10, marks=pytest.mark.exhaustive), 3_000]
)
def test_a_weight_that_returns_moves_no_faster_than_the_learning_rate(wait):
    """With zeroed second moments it reaches 6.5 learning rates after long training."""
    dense_again = wait + 100
    phases = lambda step: jnp.where((step >= 100) & (step < dense_again), 0.5, 0.0)
    prune = js.prune_schedule(phases, every=js.schedules.at(100, dense_again))
    weights = [[1.0, 100.0]]
    seen = run_adam(prune.wrap(optax.adam(LR)), dense_again + 60, weights)
    path = np.array([w[0, 0] for w, _ in seen])
    assert np.all(path[100:dense_again] == 0)
    moved = np.abs(np.diff(path[dense_again - 1 :])) / LR
    # From mu = 0 and nu = g^2 the first moment climbs 0.1, 0.19, 0.271, ...; what the
    # bias correction of the second still divides by, in a young run, slows it further.
    since = np.arange(1, 11)
    correction = np.sqrt(1 - 0.999 ** (dense_again + since))
    expected = (1 - 0.9**since) * correction
    np.testing.assert_allclose(moved[:10], expected, rtol=2e-3)
    assert moved.max() <= 1.001


def test_first_and_second_moments_of_a_weight_that_returns():
    phases = lambda step: jnp.where(step == 2, 0.5, 0.0)
    prune = js.prune_schedule(phases, every=1)
    tx = prune.wrap(optax.adam(LR, b1=0.9, b2=0.999))
    seen = run_adam(tx, 4, [[1.0, 10.0]], grad=3.0)
    (pruning,) = js.transforms.find_states(seen[3][1])
    assert bool(pruning.regrew)
    mu, nu = moments(seen[3][1])
    np.testing.assert_allclose(mu[0, 0], 0.1 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(nu[0, 0], 9.0, rtol=1e-6)
    # The weight that stayed is as in a dense run.
    dense = run_adam(optax.adam(LR), 4, [[1.0, 10.0]], grad=3.0)
    np.testing.assert_allclose(seen[3][0][0, 1], dense[3][0][0, 1], rtol=1e-6)


def test_kept_weights_follow_the_dense_optimizer():
    """With coordinate-wise optimizers and gradients the others cannot be felt."""
    weights = [[1.0, 10.0, 2.0, 20.0]]
    for opt in (optax.adam(LR), optax.sgd(LR, momentum=0.9), optax.lion(LR)):
        prune = js.prune_schedule(js.schedules.one_shot(0.5, step=5), every=1)
        sparse = run_adam(prune.wrap(opt), 30, weights)[-1][0]
        dense = run_adam(opt, 30, weights)[-1][0]
        np.testing.assert_allclose(sparse[0, [1, 3]], dense[0, [1, 3]], rtol=1e-6)


def test_dead_gradients_leave_the_clipping_norm():
    """Two weights, one pruned: the norm is that of the other alone."""
    prune = js.prune_schedule(0.5, every=1)
    tx = js.enforce(optax.chain(prune, optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    params = {"w": jnp.array([[1.0, 10.0]])}
    grads = {"w": jnp.array([[100.0, 0.5]])}
    updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    np.testing.assert_array_equal(updates["w"], [[-1.0, -0.5]])


def test_accumulated_gradients_of_pruned_weights_are_dropped():
    inner = optax.chain(js.prune_schedule(0.5, every=1), optax.sgd(1.0))
    tx = js.enforce(optax.MultiSteps(inner, 3).gradient_transformation())
    params, state = js.init_sparse(tx, {"w": jnp.array([[1.0, 10.0]])})
    grads = {"w": np.ones((1, 2), np.float32)}
    for _ in range(2):
        _, state = tx.update(grads, state, params)
    assert np.asarray(state.acc_grads["w"])[0, 1] > 0
    np.testing.assert_array_equal(js.masks_of(state)["w"], [[False, True]])


def test_zero_initialised_weights_train_like_in_a_dense_run():
    """A kept weight of exactly 0 is not taken for one that came back."""
    weights = np.zeros((2, 4))
    prune = js.prune_schedule(js.schedules.constant(0.0), every=1)
    sparse = run_adam(prune.wrap(optax.adam(LR)), 5, weights)[-1][0]
    dense = run_adam(optax.adam(LR), 5, weights)[-1][0]
    np.testing.assert_allclose(sparse, dense, rtol=1e-6)


def test_adafactor_with_factored_moments_is_left_alone():
    tx = js.prune_schedule(0.5, every=1).wrap(
        optax.adafactor(1e-2, min_dim_size_to_factor=4)
    )
    params = problems.params()
    state = jax.jit(tx.init)(params)
    _, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
