"""SquareHead against NumPy in float64, with padding, and what it does in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.losses import square_head


def states(seed, layers=3):
    rng = np.random.default_rng(seed)
    return [10.0**l * rng.standard_normal((2, 5, 4)) for l in range(layers)]


def reference(student, teacher, mask, eps):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = s[mask], t[mask]
        total += np.mean((s - t) ** 2) / (np.mean(t**2) + eps)
    return total


@pytest.mark.parametrize("eps", [0.0, 2**-7])
def test_it_is_the_formula_over_tokens_that_are_no_padding(eps):
    student, teacher = states(0), states(1)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    of = lambda *x: square_head(*jax.tree.map(jnp.float32, x), mask=mask, eps=eps)
    np.testing.assert_allclose(
        of(student, teacher), reference(student, teacher, mask, eps), rtol=1e-5
    )
    whole = square_head(*jax.tree.map(jnp.float32, (student, teacher)), eps=eps)
    everything = np.ones((2, 5), bool)
    np.testing.assert_allclose(
        whole, reference(student, teacher, everything, eps), rtol=1e-5
    )


def test_padding_may_hold_nan_and_gradients_stay_numbers():
    student, teacher = (jax.tree.map(jnp.float32, states(s)) for s in (2, 3))
    mask = jnp.arange(5)[None] < jnp.array([[2], [4]])
    bad = jax.tree.map(lambda x: x.at[0, 3].set(jnp.nan), (student, teacher))
    loss = lambda s, t: square_head(s, t, mask=mask)
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*bad)
    np.testing.assert_allclose(value, loss(student, teacher), rtol=1e-6)
    for g, t in zip(*grads, strict=True):
        assert np.all(np.isfinite(g))
        assert np.all(np.asarray(g)[~np.asarray(mask)] == 0)
        assert np.any(np.asarray(g)[np.asarray(mask)] != 0)
        assert np.all(t == 0)  # of the teacher


def test_each_layer_counts_by_itself():
    """A tenth off in each of three layers of sizes 1, 10 and 100."""
    teacher = jax.tree.map(jnp.float32, states(4))
    student = jax.tree.map(lambda t: 1.1 * t, teacher)
    got = square_head(student, teacher, eps=0.0)
    np.testing.assert_allclose(got, 3 * 0.01, rtol=1e-4)


def test_sixteen_bits_are_averaged_in_32():
    teacher = jax.tree.map(jnp.bfloat16, states(5))
    student = jax.tree.map(jnp.bfloat16, states(6))
    got = square_head(student, teacher)
    assert got.dtype == jnp.float32
    wide = jax.tree.map(np.float64, (student, teacher))
    mask = np.ones((2, 5), bool)
    np.testing.assert_allclose(got, reference(*wide, mask, 2**-7), rtol=1e-5)


def test_nothing_but_padding_is_no_loss():
    x = states(7)
    assert square_head(x, states(8), mask=np.zeros((2, 5), bool)) == 0


@pytest.mark.parametrize(
    ("student", "options", "error", "message"),
    [
        (states(0, 2), {}, ValueError, "student must have exactly the structure"),
        ([x[:, :3] for x in states(0)], {}, ValueError, "0: student has the shape"),
        ([x.astype(int) for x in states(0)], {}, TypeError, "0: hidden states"),
        (states(0), {"mask": np.ones((5, 2), bool)}, ValueError, "0: a mask of shape"),
        (states(0), {"mask": np.ones((2, 5))}, TypeError, "mask holds bools"),
        (states(0), {"eps": -1.0}, ValueError, "eps must be at least 0"),
    ],
)
def test_states_that_do_not_fit_are_named(student, options, error, message):
    with pytest.raises(error, match=message):
        square_head(student, states(1), **options)
