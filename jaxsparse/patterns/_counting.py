"""Counting passes over an array: the one thing that selection does often."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array

Competing = tuple[int, ...] | None
"""The axes along which entries compete; None: all entries of all arrays."""

_ROW = 4096
_WIDE = 128  # columns from which adding rows up fills the vector units


def count(flags: Array, axes: Competing, dtype: Any) -> Array:
    """How many flags are True in each group.

    It counts in float32 along one axis and in integers along the rest: sums of float32
    vectorise where sums of integers do not (twice as fast on x86), and they are exact
    below 2**24, which one axis is.

    Args:
      flags: bools.
      axes: the axes to count along, which stay with size 1; None: a scalar for all.
      dtype: an integer type that holds the result.

    Returns:
      Integers.
    """
    along = tuple(range(flags.ndim)) if axes is None else axes
    if not along:
        return flags.astype(dtype)
    if flags.shape[along[-1]] >= 2**24:
        total = jnp.sum(flags, axis=along, dtype=dtype, keepdims=True)
    else:
        inner = jnp.sum(flags, axis=along[-1], dtype=jnp.float32, keepdims=True)
        inner = inner.astype(dtype)
        total = jnp.sum(inner, axis=along[:-1], dtype=dtype, keepdims=True)
    return jnp.squeeze(total) if axes is None else total


def count_reaching(
    digits: Array, candidate: Array, axes: Competing, dtype: Any
) -> Array:
    """How many digits are at least `candidate`, in each group.

    On one CPU it adds rows up in 16-bit integers, which keeps the vector units busy: a
    sixth of the time of the reduction in `count`, for all entries, and half of it along
    leading axes (the outputs of a flax kernel). Rows are slices, which would gather
    an array that is spread over devices; so where there is a mesh, and on accelerators,
    it is a reduction.

    Args:
      digits: uint16.
      candidate: uint16; broadcasts to `digits`.
      axes: the axes to count along, which stay with size 1; None: a scalar for all.
      dtype: an integer type that holds the result.

    Returns:
      Integers.
    """
    reduced = lambda d, c: count(d >= c, axes, dtype)
    by_rows = lambda d, c: _count_by_rows(d, c, dtype)
    if axes is not None:
        leading = tuple(sorted(axes)) == tuple(range(len(axes)))
        if not leading or math.prod(digits.shape[len(axes) :]) < _WIDE:
            return reduced(digits, candidate)
        by_rows = lambda d, c: _count_down(d, c, len(axes), dtype)
    if not jax.typeof(digits).sharding.mesh.empty:
        return reduced(digits, candidate)
    return lax.platform_dependent(digits, candidate, cpu=by_rows, default=reduced)


def _count_down(digits: Array, candidate: Array, axes: int, dtype: Any) -> Array:
    """Along the leading axes, in each column of what trails them."""
    columns = math.prod(digits.shape[axes:])
    rows = digits.reshape(-1, columns)
    bound = candidate.reshape(1, columns)
    narrow = jnp.int16 if len(rows) < 2**15 else jnp.int32

    def add(i, sums: Array) -> Array:
        row = lax.dynamic_slice_in_dim(rows, i, 1, axis=0)
        return sums + (row >= bound).astype(narrow)

    sums = lax.fori_loop(0, len(rows), add, jnp.zeros((1, columns), narrow))
    return sums.astype(dtype).reshape(candidate.shape)


def _count_by_rows(digits: Array, candidate: Array, dtype: Any) -> Array:
    flat = digits.reshape(-1)
    rows, rest = divmod(flat.size, _ROW)
    total = jnp.sum(flat[flat.size - rest :] >= candidate, dtype=dtype)
    if rows == 0:
        return total
    narrow = jnp.int16 if rows < 2**15 else jnp.int32

    def add(i, sums: Array) -> Array:
        row = lax.dynamic_slice(flat, (i * _ROW,), (_ROW,))
        return sums + (row >= candidate).astype(narrow)

    first, end = 0, rows
    if jnp.dtype(dtype) == jnp.int64:  # then positions may not fit in 32 bits
        first, end = jnp.zeros((), dtype), jnp.asarray(rows, dtype)
    sums = lax.fori_loop(first, end, add, jnp.zeros((_ROW,), narrow))
    return total + jnp.sum(sums, dtype=dtype)
