"""The largest entries of an array, chosen without a sort, and exchanged."""

import math

import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import Array
from jaxsparse.ranking.threshold import top_k_masks

_ROW = 256  # entries that are counted together


def largest(x: Array, count: int) -> tuple[Array, Array]:
    """Return the values and flat indices of the entries of largest magnitude.

    The threshold is found by counting, without a sort, and entries are collected in the
    order of their indices; among equals those of lower index are taken. `jax.lax.top_k`
    sorts, which takes many times as long for large arrays.

    Args:
      x: an array of any shape.
      count: how many entries, at least 1 and at most all.

    Returns:
      `(values, indices)`, each `[count]`; indices into `x.ravel()` are int32, or int64
      where they do not fit.

    Raises:
      ValueError: a count out of range.
      TypeError: an array that is not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> values, indices = js.exchange.largest(jnp.array([[1.0, -5.0, 2.0, 4.0]]), 2)
      >>> values.tolist(), indices.tolist()
      ([-5.0, 4.0], [1, 3])
    """
    _checks.check_arrays(x=x)
    _checks.check_floating("x", x)
    _checks.check_positive_int(count, name="count")
    if count > x.size:
        raise ValueError(f"count is {count}, but x has {x.size} entries.")
    flat = x.ravel()
    indices = _indices_of(_mask(flat, count), count)
    return flat[indices], indices


def _mask(flat: Array, count: int) -> Array:
    keep = jnp.asarray(count, jnp.int32)
    (mask,) = top_k_masks([jnp.abs(flat).astype(wide_dtype(flat.dtype))], keep)
    return mask


def _indices_of(mask: Array, count: int) -> Array:
    """The indices of the `count` entries that are True, in order.

    By rows: how many come before each row, in which row an entry lies, and where in it.
    A sum over all that come before each entry would take far longer.
    """
    rows = -(-mask.size // _ROW)
    padded = jnp.pad(mask, (0, rows * _ROW - mask.size)).reshape(rows, _ROW)
    ends = jnp.cumsum(jnp.sum(padded, axis=1, dtype=jnp.int32), dtype=jnp.int32)
    number = jnp.arange(count, dtype=jnp.int32)
    row = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
    before = jnp.where(row > 0, ends[jnp.maximum(row - 1, 0)], 0)
    inside = jnp.cumsum(padded[row], axis=1, dtype=jnp.int32)
    place = jnp.sum(inside <= (number - before)[:, None], axis=1, dtype=jnp.int32)
    if mask.size > jnp.iinfo(jnp.int32).max:
        row, place = row.astype(jnp.int64), place.astype(jnp.int64)
    return row * _ROW + place


def count_of(fraction: float, x: Array) -> int:
    """How many entries of an array are sent: `ceil(fraction * n)`, at least one."""
    return min(x.size, max(1, math.ceil(fraction * x.size)))


def mean_of_sent(
    values: Array, indices: Array, like: Array, axis_name: str | tuple[str, ...]
) -> Array:
    """The mean over workers of what each has sent, dense. Moves values and indices."""
    gather = lambda x: lax.all_gather(x, axis_name, to="invarying")
    values, indices = gather(values), gather(indices)
    workers = math.prod(values.shape[:-1])
    total = jnp.zeros(like.size, values.dtype)
    total = total.at[indices.ravel()].add(values.ravel())
    return (total / workers).reshape(like.shape)


def bytes_sent(values: Array, indices: Array) -> int:
    """What one worker sends, to each of the others."""
    return values.size * values.dtype.itemsize + indices.size * indices.dtype.itemsize


def mean(x: Array, axis_name: str | tuple[str, ...]) -> Array:
    """The mean of whole arrays over workers."""
    return lax.pmean(x, axis_name)
