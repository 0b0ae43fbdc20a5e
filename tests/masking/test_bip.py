"""Both levels of BiP, and low-rank masks, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import masking

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loss_fn(params, x):
    return jnp.mean((x @ params["kernel"] + params["bias"][None] - 1) ** 2)


def test_gradients_of_both_levels():
    params = {"kernel": numbers(0, 6, 4), "bias": numbers(1, 4)}
    scores = {"kernel": numbers(2, 6, 4), "bias": None}
    x = numbers(3, 16, 6)
    f = masking.bip(loss_fn, sparsity=0.5, gamma=0.5)
    loss, (lower, upper) = jax.jit(f)((params, scores), x)
    mask = scores["kernel"] >= np.sort(scores["kernel"].ravel())[-12]
    z = np.where(mask, params["kernel"], 0).astype(np.float64)
    e = 2 * (x @ z + params["bias"] - 1) / (16 * 4)
    g, g_bias = x.T.astype(np.float64) @ e, e.sum(0)
    np.testing.assert_allclose(loss, np.mean((e * 32) ** 2), rtol=1e-5)
    expected = mask * g + 0.5 * params["kernel"]
    np.testing.assert_allclose(lower["kernel"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        lower["bias"], g_bias + 0.5 * params["bias"], rtol=1e-4, atol=1e-6
    )
    expected = (params["kernel"] - g / 0.5) * g
    np.testing.assert_allclose(upper["kernel"], expected, rtol=1e-4, atol=1e-6)
    assert upper["bias"] is None


def test_first_low_rank_masks_are_those_of_magnitudes():
    params = {"kernel": jnp.asarray(numbers(0, 12, 8)), "bias": jnp.ones(8)}
    factors = masking.init_low_rank(params, key=KEY, rank=2)
    assert factors["bias"] is None
    masked = masking.masked_by_low_rank(params, factors, 0.75)
    expected = js.prune(params, 0.75).params
    np.testing.assert_array_equal(masked["kernel"], expected["kernel"])
    np.testing.assert_array_equal(masked["bias"], params["bias"])


def test_gradients_flow_to_all_factors_and_not_to_the_weights():
    params = {"kernel": jnp.asarray(numbers(0, 6, 4))}
    own = masking.init_low_rank(params, key=KEY, rank=2)["kernel"]
    factors = {
        "kernel": own._replace(
            update=(own.update[0], jnp.asarray(numbers(1, 2, 4))),
            score=(own.score[0], jnp.asarray(numbers(2, 2, 4))),
            row=jnp.asarray(numbers(3, 6)),
            column=jnp.asarray(numbers(4, 4)),
        )
    }
    ct = numbers(5, 6, 4)

    def f(params, factors):
        masked = masking.masked_by_low_rank(params, factors, 0.5)
        return jnp.sum(masked["kernel"] * ct)

    along_w, along = jax.grad(f, (0, 1))(params, factors)
    assert not np.any(along_w["kernel"])
    own = factors["kernel"]
    (u, v), (a, b) = jax.tree.map(np.float64, (own.update, own.score))
    w = np.float64(params["kernel"]) + u @ v
    s = np.abs(w) + a @ b + np.asarray(own.row)[:, None] + np.asarray(own.column)
    mask = s >= np.sort(s.ravel())[-12]
    of_w = ct * mask + np.sign(w) * ct * w  # through the weight, and through |W|
    got = along["kernel"]
    for found, expected in (
        (got.update[0], of_w @ v.T),
        (got.update[1], u.T @ of_w),
        (got.score[0], (ct * w) @ b.T),
        (got.score[1], a.T @ (ct * w)),
        (got.row, (ct * w).sum(1)),
        (got.column, (ct * w).sum(0)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_low_rank_training_lowers_the_loss_of_a_pruned_layer():
    x, target = numbers(0, 64, 12), numbers(1, 64, 8)
    params = {"kernel": jnp.asarray(numbers(2, 12, 8))}
    start = masking.init_low_rank(params, key=KEY, rank=4)

    def loss(factors):
        masked = masking.masked_by_low_rank(params, factors, 0.75)
        return jnp.mean((x @ masked["kernel"] - target) ** 2)

    tx = optax.adam(0.03)

    def step(carry, _):
        factors, state = carry
        updates, state = tx.update(jax.grad(loss)(factors), state)
        return (optax.apply_updates(factors, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200)[0])
    factors, _ = run((start, tx.init(start)))
    assert loss(factors) < 0.7 * loss(start)


def test_errors():
    params = {"kernel": jnp.ones((6, 4)), "window": jnp.ones((3, 3, 2, 2))}
    with pytest.raises(ValueError, match="window: low rank is of matrices"):
        masking.init_low_rank(params, key=KEY)
    factors = masking.init_low_rank({"kernel": jnp.ones((5, 4))}, key=KEY)
    with pytest.raises(ValueError, match="factors: kernel has factors of shapes"):
        masking.masked_by_low_rank(params, factors, 0.5)
    with pytest.raises(ValueError, match="gamma"):
        masking.bip(loss_fn, sparsity=0.5, gamma=0.0)
