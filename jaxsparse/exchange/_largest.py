"""The largest entries of an array, and how workers exchange them."""

import math

import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import Array


def largest(x: Array, count: int) -> tuple[Array, Array]:
    """Return the values and flat indices of the entries of largest magnitude.

    The largest come first, and ties are ordered by index. NaN counts as largest, so
    that it is always sent and noticed.

    Args:
      x: an array of any shape.
      count: how many entries, at least 1 and at most all.

    Returns:
      `(values, indices)`, each `[count]`, of the type of `x` and int32; indices are
      into `x.ravel()`.

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
    flat = jnp.asarray(x).ravel()
    # XLA's selection takes three passes over the memory for few entries, a search for
    # the threshold by counting more.
    indices = lax.top_k(jnp.abs(flat).astype(wide_dtype(flat.dtype)), count)[1]
    return flat[indices], indices


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
