"""Scores as integers of the same order, and where entries lie in their group."""

import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import count_dtype
from jaxsparse._loops import after
from jaxsparse._typing import Array
from jaxsparse.ranking.counting import Competing
from jaxsparse.ranking.shards import Split, index_along, names_along, pieces


def ordered_keys(x: Array) -> Array:
    """Unsigned integers in the order of the floating-point numbers `x`.

    The bits of a non-negative float are in order as they stand; those of a negative
    one are in reverse. -0.0 and 0.0 get the same key, NaN the key 0 below all others.
    """
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    raw = lax.bitcast_convert_type(x, unsigned)
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    raw = jnp.where(raw == sign, jnp.zeros_like(raw), raw)
    keys = jnp.where(raw >= sign, ~raw, raw | sign)
    return jnp.where(jnp.isnan(x), jnp.zeros_like(keys), keys)


def positions(
    x: Array,
    axes: Competing = None,
    split: Split | None = None,
    *,
    now: Array | None = None,
) -> Array:
    """The row-major position of every entry among those along `axes`."""
    axes = tuple(range(x.ndim)) if axes is None else axes
    split = split or ((),) * x.ndim
    dtype = count_dtype(x.size * pieces(names_along(split, axes)))
    position = jnp.zeros(x.shape, dtype)
    stride = jnp.ones((), dtype)
    if now is not None and now.ndim == 0:  # a count, which is not negative
        stride = stride + jnp.minimum(now.astype(dtype), 0)
    elif now is not None:
        stride = after(now, stride)
    for axis in sorted(axes, reverse=True):
        position = position + stride * index_along(x, axis, split, dtype)
        stride = stride * (x.shape[axis] * pieces(split[axis]))
    return position
