"""The count rule: sparsity `s` removes exactly `floor(s * n + 1/2)` of `n`."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import Array


def removed_count(sparsity: float | Array, n: int) -> int | Array:
    """How many of `n` weights or units a sparsity removes: `floor(s * n + 1/2)`.

    A Python number is multiplied in float64. An array (a schedule's value) of less
    precision gives the same count: one that is the rounding of a decimal with up to
    six digits, as 0.9 is not a float32 but float32(0.9) is its rounding, means that
    decimal, and the product is taken in float64, also where JAX's 64-bit mode is off.
    Without this, 0.9 in float32 is two weights off at 1e8.

    Args:
      sparsity: a number in [0, 1), possibly traced.
      n: how many compete.

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
    if not isinstance(sparsity, jax.Array | np.ndarray):
        return min(math.floor(float(sparsity) * n + 0.5), n)
    with jax.enable_x64(True):
        short = jnp.asarray(sparsity)
        wide = short.astype(jnp.float64)
        if short.dtype != jnp.float64:
            decimal = jnp.round(wide * 1e6) / 1e6
            wide = jnp.where(decimal.astype(short.dtype) == short, decimal, wide)
        removed = jnp.clip(jnp.floor(wide * n + 0.5), 0, n)
        return removed.astype(count_dtype(n))


def count_dtype(n: int) -> type[np.signedinteger]:
    """The integer type in which `n` can be counted.

    Args:
      n: how many compete in one group.

    Returns:
      int32, or int64 for 2**31 and more.

    Raises:
      ValueError: int64 is needed and JAX's 64-bit mode is off.
    """
    if n < 2**31:
        return np.int32
    if not jax.config.jax_enable_x64:
        raise ValueError(
            f"{n:,} weights compete in one group, more than int32 can count. Set "
            "jax_enable_x64, or let fewer compete: js.Unstructured(scope='layer')."
        )
    return np.int64
