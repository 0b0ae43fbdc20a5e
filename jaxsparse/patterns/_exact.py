"""Sums that do not depend on their order.

Devices that each add up a part round in another order than one that adds up all, and
two channels whose scores nearly agree would be ranked otherwise. Here numbers are cut
into integers, relative to the largest of their sum, and sums of integers have no order.
What is cut off of each is below 2**-30 of that one (2**-52 for float64).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array

Sum = Callable[[Array], Array]


def ordered_mean(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean along axes, bit for bit the same however the sum is split.

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
    most = jnp.max(jnp.abs(finite(x)), axis=axes, keepdims=True)
    add = lambda x: jnp.sum(x, axis=axes, keepdims=True, dtype=x.dtype)
    return ordered_sum(x, add, most, most, n) / n


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 4))
def ordered_sum(x: Array, add: Sum, most: Array, here: Array, n: int) -> Array:
    """A sum of any kind, bit for bit the same however it is split.

    Its derivative is that of the plain sum.

    Args:
      x: floating point, at least float32.
      add: sums up an array like `x`, in its own type.
      most: like the result, the largest finite magnitude of each sum's terms.
      here: the same where the terms are: what broadcasts to `x`.
      n: how many terms a sum has at most.

    Returns:
      The sums.
    """
    zero = jnp.zeros((), x.dtype)
    rest = finite(x) / _power_of_two(here)  # exact, and below 2
    bits = 29 - math.ceil(math.log2(max(n, 1)))  # n below 2 ** (bits + 1) fit in int32
    precision = 30 if x.dtype == jnp.float32 else 52
    total = jnp.zeros_like(most)
    for place in range(1, math.ceil(precision / bits) + 1):
        rest = rest * 2.0**bits
        limb = rest.astype(jnp.int32)
        rest = rest - limb.astype(x.dtype)
        total = total + add(limb).astype(x.dtype) * 2.0 ** (-bits * place)
    # Infinities and NaN add up the same in every order.
    wild = add(jnp.where(jnp.isfinite(x), zero, x))
    return total * _power_of_two(most) + wild


@ordered_sum.defjvp
def _(add: Sum, n: int, primals, tangents):
    x, most, here = primals
    return ordered_sum(x, add, most, here, n), add(tangents[0])


def finite(x: Array) -> Array:
    """What is finite of an array, and 0."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def _power_of_two(x: Array) -> Array:
    """The largest power of two that is not above a number; 1 for 0."""
    bits = jnp.finfo(x.dtype).bits
    mantissa = (1 << jnp.finfo(x.dtype).nmant) - 1
    unsigned = jnp.dtype(f"uint{bits}")
    raw = lax.bitcast_convert_type(x, unsigned) & ~jnp.asarray(mantissa, unsigned)
    power = lax.bitcast_convert_type(raw, x.dtype)
    return jnp.where(power > 0, power, jnp.ones_like(power))
