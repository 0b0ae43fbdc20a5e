"""Sums without an order: as precise as others, and with derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse.linalg.ordered_sums import largest, ordered_mean, ordered_sum


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_of_any_scale_are_as_precise_as_others(dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        scale = 10.0 ** np.arange(-30, 10, 2)[:, None]
        x = (rng.normal(size=(20, 1000)) * scale).astype(dtype)
        want = x.astype(np.float64).mean(1, keepdims=True)
        got = ordered_mean(jnp.asarray(x), (1,))
        size = np.abs(x).max(1, keepdims=True).astype(np.float64)
        error = {"float32": 2e-9, "float64": 3e-16}[dtype] * size
        rounding = np.finfo(dtype).eps * np.abs(want)
        assert np.all(np.abs(np.asarray(got, np.float64) - want) <= error + rounding)


def test_the_order_of_the_devices_does_not_matter():
    x = np.random.default_rng(1).normal(size=(4, 4096)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = jax.jit(lambda x: ordered_mean(x, (1,)))
    want = mean(jnp.asarray(x))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "d")))
    np.testing.assert_array_equal(mean(spread), want)
    np.testing.assert_array_equal(mean(jnp.asarray(x[:, ::-1])), want)


def test_infinities_and_nan_are_kept():
    x = jnp.array([[1.0, jnp.inf], [jnp.nan, 1.0], [jnp.inf, -jnp.inf], [1.0, 2.0]])
    got = ordered_mean(x, (1,)).ravel()
    np.testing.assert_array_equal(got, [jnp.inf, jnp.nan, jnp.nan, 1.5])


def test_the_derivative_is_that_of_a_sum():
    x = jnp.array([[1.0, 2.0, 5.0], [0.0, -1.0, 1.0]])
    weights = jnp.array([[2.0], [3.0]])
    slope = jax.grad(lambda x: jnp.sum(weights * ordered_mean(x, (1,)) ** 2))(x)
    want = jax.grad(lambda x: jnp.sum(weights * x.mean(1, keepdims=True) ** 2))(x)
    np.testing.assert_allclose(slope, want, rtol=1e-6)


def test_a_sum_of_any_kind():
    x, labels = jnp.array([1.0, 2.0, 4.0, 1e-20]), np.array([0, 1, 0, 2])
    add = lambda x: jax.ops.segment_sum(x, labels, num_segments=3)
    most = jnp.array([4.0, 2.0, 1e-20])
    got = ordered_sum(x, (), add, most, most[labels], 2)
    np.testing.assert_allclose(got, [5.0, 2.0, 1e-20], rtol=1e-7)


@pytest.mark.parametrize("power", [16, 20, 28, 29, 30, 40])
def test_sums_of_very_many_terms(power):
    """Only their number is given: it says how many bits a term may have."""
    x = jnp.array([[1.0, 2.0**-20, 3.0], [3e38, -1e38, 1e30]])
    most = largest(x, (1,))
    got = ordered_sum(x, (1,), lambda x: x, most, most, 2**power).ravel()
    np.testing.assert_allclose(got, [4.0 + 2.0**-20, 2e38 + 1e30], rtol=1e-7)
