"""Sums that do not depend on their order.

Devices that each add up a part round in another order than one that adds up all, and
two channels whose scores nearly agree would be ranked otherwise. Here numbers are
rounded to integers, relative to the largest of their sum, and sums of integers have no
order. What is rounded off each is below 2**-30 of that one (2**-52 for float64).

They are added up as float64, in a local scope: int32 has few bits left for many terms,
and XLA's sums of integers are several times slower on CPUs. All else is of the numbers'
own type: what has no float64 has to emulate the sum alone.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array

_EXACT = 46  # bits of an integer; what emulates float64 in two float32 has 48
Add = Callable[[Array], Array]


def ordered_mean(
    x: Array, axes: tuple[int, ...], over: tuple[str, ...] = (), shards: int = 1
) -> Array:
    """The mean along axes, bit for bit the same however the sum is split."""
    if jnp.finfo(x.dtype).bits < 32:
        x = x.astype(jnp.float32)
    n = math.prod(x.shape[a] for a in axes) * shards
    if n < 2 or not x.size:
        return jnp.mean(x, axis=axes, keepdims=True)
    most = largest(x, axes)
    if over:
        most = lax.pmax(most, over)
    add = lambda totals: lax.psum(totals, over) if over else totals
    return ordered_sum(x, axes, add, most, most, n) / n


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 5))
def ordered_sum(
    x: Array, axes: tuple[int, ...], add: Add, most: Array, here: Array, n: int
) -> Array:
    """A sum of any kind, bit for bit the same however it is split.

    Its derivative is that of the plain sum.
    """
    with jax.enable_x64(True):
        total = jnp.zeros(most.shape, jnp.float64)
        for scale, limb in _limbs(x, here, axes=axes, n=n):
            total = total + add(limb) * scale
        return (total * _power_of_two(most).astype(jnp.float64)).astype(x.dtype)


@ordered_sum.defjvp
def _(axes, add, n, primals, tangents):
    x, most, here = primals
    moved = add(jnp.sum(tangents[0], axis=axes, keepdims=True))
    return ordered_sum(x, axes, add, most, here, n), moved


def largest(x: Array, axes: Sequence[int]) -> Array:
    """The largest magnitude along axes, which stay with size 1; NaN if there is one."""
    return _largest(x, axes=tuple(axes))


# In programs of their own: without jit around them they would be a dozen passes.
@functools.partial(jax.jit, static_argnames="axes")
def _largest(x: Array, *, axes: tuple[int, ...]) -> Array:
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True)


@functools.partial(jax.jit, static_argnames=("axes", "n"))
def _limbs(x: Array, here: Array, *, axes: tuple[int, ...], n: int) -> list[Any]:
    """Sums of integers, each with the number that it is to be multiplied by."""
    bits = _EXACT - math.ceil(math.log2(max(n, 1)))
    precision = 30 if x.dtype == jnp.float32 else 52
    rest = x * (1 / _power_of_two(here))  # exact, and below 4
    found = []
    for place in range(1, math.ceil(precision / bits) + 1):
        rest = rest * 2.0**bits
        limb = jnp.round(rest)  # infinities and NaN add up the same in every order
        rest = jnp.where(jnp.isfinite(limb), rest - limb, 0.0)
        total = jnp.sum(limb.astype(jnp.float64), axis=axes, keepdims=True)
        found.append((jnp.float64(2.0 ** (-bits * place)), total))
    return found


def _power_of_two(x: Array) -> Array:
    """The largest power of two that is not above a number; 1 for 0 and NaN."""
    info = jnp.finfo(x.dtype)
    unsigned = jnp.dtype(f"uint{info.bits}")
    mantissa = jnp.asarray((1 << info.nmant) - 1, unsigned)
    raw = lax.bitcast_convert_type(x, unsigned) & ~mantissa
    power = lax.bitcast_convert_type(raw, x.dtype)
    # Past that the reciprocal would be 0: infinities would be NaN.
    most = jnp.asarray(2.0 ** (info.maxexp - 2), x.dtype)
    return jnp.where(power > 0, jnp.minimum(power, most), jnp.ones_like(power))
