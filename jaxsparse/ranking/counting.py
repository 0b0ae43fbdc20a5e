"""Counting passes over an array: the one thing that selection does often."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._platform import on_cpu
from jaxsparse._typing import Array

Competing = tuple[int, ...] | None
"""The axes along which entries compete; None: all entries of all arrays."""

_ROW = 8192
_BLOCK = 128  # rows that are added up in 8 bits
_WIDE = 128  # columns from which adding rows up fills the vector units


def count(flags: Array, axes: Competing, dtype: Any) -> Array:
    """How many flags are True in each group.

    It counts in float32 along one axis and in integers along the rest: sums of float32
    vectorise where sums of integers do not (twice as fast on x86), and they are exact
    below 2**24, which one axis is.
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

    On one CPU it adds rows up in integers of 8 or 16 bits, which keeps the vector units
    busy: a tenth of the time of the reduction in `count`. Rows are slices, which would
    gather an array that is spread over devices; so where there is a mesh, and on
    accelerators, it is a reduction.
    """
    reduced = lambda d, c: count(d >= c, axes, dtype)
    by_rows = lambda d, c: _count_all(d, c, dtype)
    if axes is not None:
        along = tuple(sorted(axes))
        apart = [n for a, n in enumerate(digits.shape) if a not in along]
        if along == tuple(range(len(along))) and math.prod(apart) >= _WIDE:
            by_rows = lambda d, c: _count_down(d, c, len(along), dtype)
        elif along == tuple(range(len(apart), digits.ndim)):
            by_rows = lambda d, c: _count_along(d, c, len(apart), dtype)
        else:
            return reduced(digits, candidate)
    if not jax.typeof(digits).sharding.mesh.empty:
        return reduced(digits, candidate)
    return on_cpu(by_rows, reduced, digits, candidate)


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


def _count_along(digits: Array, candidate: Array, axes: int, dtype: Any) -> Array:
    """Along the axes behind the first few, in each of what these number."""
    groups = math.prod(digits.shape[:axes])
    flat = digits.reshape(groups, -1)
    bound = candidate.reshape(groups, 1)
    length = flat.shape[1]
    lanes = _lanes(length, groups)
    rows, rest = divmod(length, lanes)
    total = count(flat[:, length - rest :] >= bound, (1,), dtype)
    if not rows:
        return total.reshape(candidate.shape)
    narrow = jnp.uint8 if rows < 2**8 else jnp.int16 if rows < 2**15 else jnp.int32

    def add(i, sums: Array) -> Array:
        row = lax.dynamic_slice_in_dim(flat, i * lanes, lanes, axis=1)
        return sums + (row >= bound).astype(narrow)

    sums = lax.fori_loop(0, rows, add, jnp.zeros((groups, lanes), narrow))
    total = total + jnp.sum(sums, axis=1, keepdims=True, dtype=dtype)
    return total.reshape(candidate.shape)


def _count_all(digits: Array, candidate: Array, dtype: Any) -> Array:
    """Of all entries."""
    flat = digits.reshape(-1)
    lanes = _lanes(flat.size, 1)
    rows, rest = divmod(flat.size, lanes)
    total = jnp.sum(flat[flat.size - rest :] >= candidate, dtype=dtype)
    if rows == 0:
        return total

    def add_up(first: Array, rows: Array | int) -> Array:
        def add(i, sums: Array) -> Array:
            start = first + i * jnp.asarray(lanes, first.dtype)
            row = lax.dynamic_slice(flat, (start,), (lanes,))
            return sums + (row >= candidate).astype(jnp.uint8)

        # Counters as dtype, in which positions fit.
        turns = jnp.zeros((), dtype), jnp.asarray(rows, dtype)
        sums = lax.fori_loop(*turns, add, jnp.zeros((lanes,), jnp.uint8))
        return jnp.sum(sums, dtype=dtype)

    if rows <= _BLOCK:
        return total + add_up(jnp.zeros((), dtype), rows)

    def add_block(i, total: Array) -> Array:
        rest = jnp.minimum(rows - i * _BLOCK, _BLOCK)
        return total + add_up(i * (_BLOCK * lanes), rest)

    blocks = jnp.zeros((), dtype), jnp.asarray(-(-rows // _BLOCK), dtype)
    return lax.fori_loop(*blocks, add_block, total)


def _lanes(length: int, groups: int) -> int:
    """How much of each group to add at once: to begin a turn takes time, too."""
    lanes = _ROW // groups if length >= 2**16 else _ROW // 8
    return max(2**8, 2 ** (lanes.bit_length() - 1))
