"""The count rule: sparsity `s` removes exactly `floor(s * n + 1/2)` of `n`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import count_dtype
from jaxsparse._typing import Array


def removed_count(sparsity: float | Array, n: int) -> int | Array:
    """Return how many of `n` units a sparsity removes, `floor(s * n + 1/2)`.

    The product is taken in float64, also where JAX's 64-bit mode is off. If an array of
    less precision (a schedule's value) is the rounding of a decimal of up to six
    digits, that decimal is used: the float32 nearest to 0.9, times 1e8, is two weights
    off. So a traced sparsity counts like the Python number. A traced sparsity outside
    [0, 1] is clipped, and NaN removes nothing.

    Args:
      sparsity: a number in [0, 1), possibly traced.
      n: the number of competing units.

    Returns:
      A Python int for a Python number, else an int32 array (int64 where `n` does not
      fit).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.patterns.removed_count(0.9, 55), js.patterns.removed_count(0.95, 10)
      (50, 10)
      >>> int(js.patterns.removed_count(jnp.float32(0.9), 10**8))
      90000000
    """
    _checks.check_sparsity(sparsity)
    # numpy's float32 is a scalar of less precision, its float64 a Python float.
    _checks.check_positive_int(n, name="n", least=0)
    low = jax.Array | np.ndarray | np.generic
    if isinstance(sparsity, float) or not isinstance(sparsity, low):
        return min(math.floor(float(sparsity) * n + 0.5), n)
    dtype = count_dtype(n)
    with jax.enable_x64(True):
        return jnp.floor(_exact(sparsity) * n + 0.5).astype(dtype)


def freed_count(fraction: float | Array, kept: Array) -> Array:
    """How many of those that are kept a drop fraction frees, `floor(f * kept)`.

    The product is taken as `removed_count` takes it.
    """
    with jax.enable_x64(True):
        many = kept.astype(jnp.float64)
        return jnp.floor(_exact(fraction) * many).astype(kept.dtype)


def _exact(fraction: float | Array) -> Array:
    """A fraction in float64; or the decimal that it is a rounding of, if it is one."""
    short = jnp.asarray(fraction)
    wide = short.astype(jnp.float64)
    wide = jnp.clip(jnp.where(jnp.isnan(wide), 0, wide), 0, 1)
    millionths = jnp.round(wide * 1e6)
    # Without the barrier XLA multiplies by 1e-6 instead, which is not the same.
    decimal = millionths / lax.optimization_barrier(jnp.full((), 1e6))
    is_decimal = decimal.astype(short.dtype) == wide.astype(short.dtype)
    return jnp.where(is_decimal, decimal, wide)
