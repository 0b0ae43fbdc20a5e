"""Learned masks: forward and backward by hand, and two small trainings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import problems

import jaxsparse as js
from jaxsparse import masking

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pulled(f, *args):
    """The value of `f`, and its gradients for a given cotangent."""
    out, back = jax.vjp(f, *args)
    return out, *back(jnp.asarray(numbers(9, *out.shape)))


def test_scores_get_the_gradient_of_the_product_and_kept_weights_theirs():
    w, s, ct = numbers(0, 6, 8), numbers(1, 6, 8), numbers(9, 6, 8)
    mask = s >= np.sort(s.ravel())[-12]
    f = lambda w, s: masking.masked_by_scores(w, s, 0.75)
    out, dw, ds = pulled(f, w, s)
    np.testing.assert_array_equal(out, np.where(mask, w, 0))
    np.testing.assert_array_equal(dw, np.where(mask, ct, 0))
    np.testing.assert_allclose(ds, w * ct, rtol=1e-6)
    # Edge-popup: frozen weights, and the size of a score.
    popup = lambda w, s: f(jax.lax.stop_gradient(w), jnp.abs(s))
    out, dw, ds = pulled(popup, w, s)
    assert not np.any(dw)
    np.testing.assert_allclose(ds, w * ct * np.sign(s), rtol=1e-6)


def test_forward_mode_too():
    w, s, dw, ds = (numbers(i, 3, 4) for i in range(4))
    f = lambda w, s: masking.masked_by_scores(w, s, 0.5)
    _, moved = jax.jvp(f, (w, s), (dw, ds))
    mask = s >= np.sort(s.ravel())[-6]
    np.testing.assert_allclose(moved, np.where(mask, dw, 0) + w * ds, rtol=1e-5)


def test_a_threshold_keeps_what_is_above_it_and_the_best_few():
    w, s = numbers(0, 6, 8), numbers(1, 6, 8)
    f = jax.jit(lambda t: masking.masked_by_scores(w, s, threshold=t, min_keep=3))
    np.testing.assert_array_equal(f(0.5), np.where(s > 0.5, w, 0))
    best = s >= np.sort(s.ravel())[-3]
    np.testing.assert_array_equal(f(99.0), np.where(best, w, 0))


def test_patterns_and_parameters_without_scores():
    params = problems.params()
    scores = masking.init_scores(params, init=jnp.abs, where=r"dense_0/kernel")
    assert scores["dense_1"]["kernel"] is None
    masked = masking.masked_by_scores(params, scores, pattern=js.NM(2, 4))
    expected = js.prune(params, pattern=js.NM(2, 4), where=r"dense_0/kernel").params
    for path, w in js.tree.leaves_with_paths(masked):
        np.testing.assert_array_equal(
            w, dict(js.tree.leaves_with_paths(expected))[path]
        )


def test_movement_trains_both_and_its_masks_are_any_masks():
    params = problems.params()
    sparsity = js.schedules.polynomial(final=0.75, begin=0, end=20)
    labels = ("weights", "scores")
    rates = {"weights": optax.adam(1e-2), "scores": optax.sgd(1.0)}
    tx = optax.partition(rates, labels)

    @jax.jit
    def step(trained, state, x, t):
        def loss(trained):
            masked = masking.masked_by_scores(*trained, sparsity(t))
            return problems.loss(masked, x)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained = params, masking.init_scores(params)
    state = tx.init(trained)
    values = []
    for t in range(40):
        trained, state, value = step(trained, state, problems.batch(t), t)
        values.append(float(value))
    assert values[-1] < values[0]
    weights, scores = trained
    masks = js.patterns.masks(scores, 0.75, where=lambda path, leaf: True)
    for name, n in (("dense_0", 48), ("dense_1", 24)):
        assert int(masks[name]["kernel"].sum()) == n
    final = masking.masked_by_scores(weights, scores, 0.75)
    for name in masks:
        np.testing.assert_array_equal(final[name]["kernel"] != 0, masks[name]["kernel"])


def test_decay_pulls_pruned_weights_alone():
    w, ct = numbers(0, 8, 4), numbers(9, 8, 4)
    f = lambda w: js.straight_through(w, pattern=js.NM(2, 4), decay=0.1)
    out, dw = pulled(f, w)
    plain, _ = pulled(lambda w: js.straight_through(w, pattern=js.NM(2, 4)), w)
    np.testing.assert_array_equal(out, plain)
    np.testing.assert_allclose(dw, ct + 0.1 * np.where(out == 0, w, 0), rtol=1e-6)


def test_soft_threshold_and_its_derivatives():
    w, ct = numbers(0, 5, 6), numbers(9, 5, 6).astype(np.float64)
    s = jnp.float32(-0.3)
    out, dw, ds = pulled(masking.soft_threshold, w, s)
    t = 1 / (1 + np.exp(0.3))
    active = np.abs(w) > t
    np.testing.assert_allclose(
        out, np.where(active, np.sign(w) * (np.abs(w) - t), 0), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(dw, ct * active, rtol=1e-6)
    expected = -t * (1 - t) * np.sum(ct * np.sign(w) * active)
    np.testing.assert_allclose(ds, expected, rtol=1e-4)


def test_errors_name_the_parameter():
    params = problems.params()
    scores = masking.init_scores(params)
    wrong = {**scores, "dense_1": {"kernel": jnp.zeros((2, 2))}}
    with pytest.raises(ValueError, match=r"dense_1/kernel: scores of shape \(2, 2\)"):
        masking.masked_by_scores(params, wrong, 0.5)
    with pytest.raises(ValueError, match="in place of a sparsity"):
        masking.masked_by_scores(params, scores, 0.5, threshold=0.0)
    with pytest.raises(ValueError, match="No scores"):
        masking.masked_by_scores(params, jax.tree.map(lambda _: None, params), 0.5)
    with pytest.raises(ValueError, match=r"dense_0/bias has shape \(3,\)"):
        masking.soft_threshold(params, {"dense_0": {"bias": jnp.zeros(3)}})
