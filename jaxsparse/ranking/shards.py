"""Shards of arrays, as a function under `shard_map` sees them, and sums over them."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxsparse._sharded import varying_axes
from jaxsparse._typing import Array

Split = tuple[tuple[str, ...], ...]
"""The mesh axes over which each axis of an array is split, the first outermost."""


def names_along(split: Split, axes: Sequence[int] | None) -> tuple[str, ...]:
    """The mesh axes over which an array is split along some of its axes (None: all)."""
    chosen = range(len(split)) if axes is None else sorted(axes)
    return tuple(name for a in chosen for name in split[a])


def pieces(names: Sequence[str]) -> int:
    """How many devices lie along mesh axes."""
    return math.prod(lax.axis_size(name) for name in names)


def total(counts: Sequence[Array], names: Sequence[tuple[str, ...]]) -> Array:
    """The sum of counts over arrays, each over the mesh axes that it is split over."""
    sums: dict[tuple[str, ...], Array] = {}
    for counted, over in zip(counts, names, strict=True):
        sums[over] = sums[over] + counted if over in sums else counted
    found = [lax.psum(x, over) if over else x for over, x in sums.items()]
    return sum(found[1:], start=found[0])


def index_along(x: Array, axis: int, split: Split, dtype: Any) -> Array:
    """The index of every entry along an axis of the whole array."""
    here = lax.broadcasted_iota(dtype, x.shape, axis)
    if split[axis]:
        shard = lax.axis_index(split[axis]).astype(dtype)
        here = here + shard * jnp.asarray(x.shape[axis], dtype)
    return here


def varying_as(
    x: Array, arrays: Sequence[Array], summed: Sequence[tuple[str, ...]]
) -> Array:
    """`x`, of the type that sums of the arrays over mesh axes have in a loop."""
    varies: set[str] = set()
    for array, names in zip(arrays, summed, strict=True):
        varies |= varying_axes(array) - set(names)
    missing = tuple(sorted(varies - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x
