import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import second_order as oracle

import jaxsparse as js


def problem(seed=0, m=24):
    """A kernel `(6, 4)` that lies as `[d_out, d_in]` in the rows of its gradients."""
    rng = np.random.default_rng(seed)
    mix = np.eye(6) + 0.5 * rng.standard_normal((6, 6))
    grads = np.einsum("mij,ik->mkj", rng.standard_normal((m, 6, 4)), mix)
    w = rng.standard_normal((6, 4))
    params = {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.ones(4)}
    return params, {"kernel": jnp.asarray(grads, jnp.float32), "bias": None}


def rows(x):
    x = np.asarray(x, np.float64)
    return np.swapaxes(x, -1, -2).reshape(*x.shape[:-2], -1)


def test_obs_is_the_loss_of_removing_a_weight_and_changing_the_others_for_the_best():
    params, grads = problem()
    curvature = js.curvature.block_fisher(grads, block_size=24, damping=1e-3)
    scores = js.scores.obs(params, js.curvature.inverse_diagonal(curvature))
    w, fisher = rows(params["kernel"]), oracle.fisher(rows(grads["kernel"]), 1e-3)
    for q, score in enumerate(rows(scores["kernel"])):
        best = oracle.obs_joint(w, fisher, np.arange(24) == q)
        np.testing.assert_allclose(
            score, oracle.loss_increase(best - w, fisher), rtol=1e-5
        )


def test_obd_is_that_loss_with_a_diagonal_matrix_or_if_no_other_changes():
    params, grads = problem()
    diagonal = js.curvature.diagonal_fisher(grads, damping=1e-3)
    inverse = js.curvature.inverse_diagonal(diagonal)
    scores = js.scores.obd(params, jax.tree.map(jnp.reciprocal, inverse))
    w, fisher = rows(params["kernel"]), oracle.fisher(rows(grads["kernel"]), 1e-3)
    change = -w * np.eye(24)
    expected = [oracle.loss_increase(row, fisher) for row in change]
    np.testing.assert_allclose(rows(scores["kernel"]), expected, rtol=1e-5)
    other = js.scores.obs(params, inverse)
    np.testing.assert_allclose(other["kernel"], scores["kernel"], rtol=1e-6)


def test_where_the_loss_is_quadratic_obs_is_the_loss():
    """Linear regression at its optimum, whose Hessian is `X^T X / n`."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5))
    y = rng.standard_normal(40)
    solve = lambda x: np.linalg.lstsq(x, y, rcond=None)[0]
    error = lambda x: np.mean((x @ solve(x) - y) ** 2) / 2
    inverse = np.diag(np.linalg.inv(x.T @ x / 40))
    params = {"kernel": jnp.asarray(solve(x)[:, None], jnp.float32)}
    scores = js.scores.obs(
        params, {"kernel": jnp.asarray(inverse[:, None], jnp.float32)}
    )
    expected = [error(np.delete(x, q, axis=1)) - error(x) for q in range(5)]
    np.testing.assert_allclose(scores["kernel"][:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("score", [js.scores.obd, js.scores.obs])
def test_what_takes_no_part_scores_zero(score):
    params, _ = problem()
    params["steps"] = jnp.int32(3)
    params["key"] = jax.random.key(0)
    scores = score(params, {"kernel": jnp.ones((6, 4))})
    assert scores["bias"].tolist() == [0, 0, 0, 0]
    assert scores["steps"] == 0
    assert scores["steps"].dtype == jnp.int32
    np.testing.assert_array_equal(scores["kernel"], jnp.square(params["kernel"]) / 2)


@pytest.mark.parametrize("score", [js.scores.obd, js.scores.obs])
def test_scores_of_bf16_weights_are_those_of_the_same_float32_weights(score):
    params, _ = problem()
    low = {"kernel": params["kernel"].astype(jnp.bfloat16)}
    wide = {"kernel": low["kernel"].astype(jnp.float32)}
    curvature = {"kernel": jnp.square(params["kernel"]) + 0.1}
    got, expected = score(low, curvature), score(wide, curvature)
    assert got["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(got["kernel"], expected["kernel"])


def test_float64_weights_keep_their_digits(x64):
    w = np.float64(1) + 1e-12
    params = {"kernel": jnp.full((1, 1), w)}
    score = js.scores.obd(params, {"kernel": jnp.full((1, 1), 2, jnp.float32)})
    np.testing.assert_allclose(score["kernel"], w**2, rtol=1e-15)


@pytest.mark.parametrize("score", [js.scores.obd, js.scores.obs])
def test_a_selected_parameter_without_curvature_is_named(score):
    params, _ = problem()
    with pytest.raises(ValueError, match=r"bias: selected .* only for \['kernel'\]"):
        score(params, {"kernel": jnp.ones((6, 4)), "bias": None}, where=".")
    with pytest.raises(ValueError, match="kernel: selected"):
        score(params, {"kernel": None})


@pytest.mark.parametrize("score", [js.scores.obd, js.scores.obs])
def test_curvature_of_another_shape_is_refused(score):
    params, _ = problem()
    with pytest.raises(ValueError, match=r"kernel: curvature of shape \(4, 6\)"):
        score(params, {"kernel": jnp.ones((4, 6))})
