"""The Jensen-Shannon divergence against NumPy in float64, and at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.losses import jensen_shannon


def reference(a, b):
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (a, b))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = lambda x: np.where(x > 0, x * np.log(x / m), 0).sum(-1)
        return (kl(p) + kl(q)) / 2


def logits(seed, *shape):
    return 3 * np.random.default_rng(seed).standard_normal(shape)


def test_it_is_the_mean_divergence_from_the_mean():
    a, b = logits(0, 5, 2, 7), logits(1, 5, 2, 7)
    a[0, 0, :3] = b[0, 0, 2:5] = -np.inf
    got = jensen_shannon(*map(jnp.float32, (a, b)))
    assert got.shape == (5, 2)
    np.testing.assert_allclose(got, reference(a, b), rtol=2e-5)
    back = jensen_shannon(*map(jnp.float32, (b, a)))
    np.testing.assert_allclose(got, back, rtol=1e-6)


def test_in_float64_to_the_last_digits():
    with jax.enable_x64(True):
        a, b = map(jnp.asarray, (logits(2, 9), logits(3, 9)))
        np.testing.assert_allclose(
            jensen_shannon(a, b), reference(*map(np.asarray, (a, b))), rtol=1e-12
        )


def test_small_divergences_keep_their_digits():
    a = logits(5, 4, 9)
    b = a + 1e-3 * logits(6, 4, 9)
    a, b = np.float32(a), np.float32(b)
    exact = reference(np.float64(a), np.float64(b))  # 1e-7
    np.testing.assert_allclose(jensen_shannon(a, b), exact, rtol=2e-3)


def test_it_is_zero_for_equals_and_log_two_for_what_never_meets():
    a = jnp.float32(logits(4, 3, 50))
    assert np.all(jensen_shannon(a, a) == 0)
    apart = jnp.array([[0.0, -jnp.inf, -jnp.inf]]), jnp.array([[-jnp.inf, 0.0, 1.0]])
    np.testing.assert_allclose(jensen_shannon(*apart), np.log(2), rtol=1e-6)
    assert jensen_shannon(jnp.bfloat16(a), a).dtype == jnp.float32


def test_gradients_flow_into_the_student_alone_and_are_numbers():
    a = jnp.array([0.5, -1.0, 2.0, -jnp.inf, -jnp.inf])
    b = jnp.array([1.5, 0.0, -1.0, 0.0, -jnp.inf])
    student, teacher = jax.grad(jensen_shannon, argnums=(0, 1))(a, b)
    assert np.all(teacher == 0)
    assert np.all(np.isfinite(student))
    h = 1e-6
    for i in range(3):
        moved = [np.float64(a) + h * s * np.eye(5)[i] for s in (1, -1)]
        slope = reference(moved[0], np.float64(b)) - reference(moved[1], np.float64(b))
        np.testing.assert_allclose(student[i], slope / (2 * h), rtol=1e-3, atol=1e-5)


def test_nan_is_seen():
    a = jnp.array([[0.0, jnp.nan], [0.0, 1.0]])
    got = jensen_shannon(a, jnp.zeros((2, 2)))
    assert np.isnan(got[0])
    assert np.isfinite(got[1])


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="one shape"):
        jensen_shannon(jnp.ones((2, 3)), jnp.ones((2, 4)))
