"""A mean that does not depend on the order of its sum."""

import math

import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array


def ordered_mean(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean along axes, bit for bit the same however the sum is split.

    Devices that each add up a part round in another order than one that adds up all,
    and two channels whose scores nearly agree would be ranked otherwise. Here numbers
    are cut into integers relative to the largest, and sums of integers have no order.
    What is cut off is below 2**-30 of the largest number (2**-52 for float64).

    Args:
      x: floating point.
      axes: the axes to average over, which stay with size 1.

    Returns:
      The means, at least in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsparse.patterns._exact import ordered_mean
      >>> ordered_mean(jnp.array([[1.0, 2.0, 6.0], [1.0, 1.0, 1.0]]), (1,)).tolist()
      [[3.0], [1.0]]
    """
    if jnp.finfo(x.dtype).bits < 32:
        x = x.astype(jnp.float32)
    n = math.prod(x.shape[a] for a in axes)
    if n < 2 or not x.size:
        return jnp.mean(x, axis=axes, keepdims=True)
    finite = jnp.isfinite(x)
    zero = jnp.zeros((), x.dtype)
    rest = jnp.where(finite, x, zero)
    unit = _power_of_two(jnp.max(jnp.abs(rest)))
    rest = rest / unit  # exact, and below 2
    bits = 29 - math.ceil(math.log2(n))  # n numbers below 2 ** (bits + 1) fit in int32
    precision = 30 if x.dtype == jnp.float32 else 52
    total = jnp.zeros((), x.dtype)
    for place in range(1, math.ceil(precision / bits) + 1):
        rest = rest * 2.0**bits
        limb = rest.astype(jnp.int32)
        rest = rest - limb.astype(x.dtype)
        added = jnp.sum(limb, axis=axes, keepdims=True, dtype=jnp.int32)
        total = total + added.astype(x.dtype) * 2.0 ** (-bits * place)
    # Infinities and NaN add up the same in every order.
    wild = jnp.sum(jnp.where(finite, zero, x), axis=axes, keepdims=True)
    return total / n * unit + wild


def _power_of_two(x: Array) -> Array:
    """The largest power of two that is not above a number; 1 for 0."""
    bits = jnp.finfo(x.dtype).bits
    mantissa = (1 << jnp.finfo(x.dtype).nmant) - 1
    unsigned = jnp.dtype(f"uint{bits}")
    raw = lax.bitcast_convert_type(x, unsigned) & ~jnp.asarray(mantissa, unsigned)
    power = lax.bitcast_convert_type(raw, x.dtype)
    return jnp.where(power > 0, power, jnp.ones_like(power))
