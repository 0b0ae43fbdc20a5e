"""One number for each index of each group, from what lies in its slices."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._dtypes import as_wide, wide_dtype
from jaxsparse._sharded import everywhere, with_auto_axes
from jaxsparse._typing import Array, PyTree
from jaxsparse.channels.slices import (
    Part,
    Slices,
    is_plain,
    others_of,
    paths_of,
    wide_leaves,
)
from jaxsparse.linalg.ordered_sums import largest, ordered_sum
from jaxsparse.tree import leaves_with_paths

Reduce = Literal["sum", "mean", "max", "prod", "first"]
Measure = Callable[[Part, Array, tuple[int, ...]], Array]
"""`f(part, leaf, shape) -> [prod(shape)]`: what one member says of each index."""


def combined(
    slices: Mapping[str, Slices],
    tree: PyTree,
    measure: Measure,
    *,
    reduce: Reduce = "sum",
    absolute: bool = False,
) -> dict[str, Array]:
    """What the members of each group say of its indices, together."""
    if reduce not in get_args(Reduce):
        known = ", ".join(map(repr, get_args(Reduce)))
        raise ValueError(f"reduce={reduce!r}: expected one of {known}.")
    paths = set(paths_of(slices))
    leaves = {path: x for path, x in leaves_with_paths(tree) if path in paths}

    def all_groups(leaves: dict[str, Array]) -> dict[str, Array]:
        return {name: one(s, leaves) for name, s in slices.items()}

    def one(s: Slices, leaves: dict[str, Array]) -> Array:
        parts = [part for part in s.parts if part.path in leaves]
        if not parts:
            dtype = wide_dtype(*(x.dtype for x in leaves.values()))
            return jnp.zeros(s.shape, dtype)
        found = [measure(part, leaves[part.path], s.shape) for part in parts]
        found = list(map(jnp.abs, found)) if absolute else found
        return _reduced(found, parts, reduce).reshape(s.shape)

    # Sums over differently sharded axes cannot be added where shardings are types.
    return with_auto_axes(all_groups, everywhere, leaves)


def _reduced(found: list[Array], parts: list[Part], reduce: Reduce) -> Array:
    dtype = wide_dtype(*[x.dtype for x in found])
    arrays = [x.astype(dtype) for x in found]
    if reduce == "sum":
        return sum(arrays[1:], start=arrays[0])
    # Which indices a member has at all.
    count = lambda x: np.bincount(x[x >= 0], minlength=arrays[0].size)
    present = np.stack([count(part.labels) > 0 for part in parts])
    if reduce == "mean":
        total = sum(arrays[1:], start=arrays[0])
        return total / jnp.asarray(np.maximum(present.sum(0), 1), dtype)
    if reduce == "first":  # of those that have the index
        whole = arrays[-1]
        for x, here in zip(arrays[-2::-1], present[-2::-1], strict=True):
            whole = x if here.all() else jnp.where(here, x, whole)
    else:
        neutral, join = _JOINS[reduce]
        if not present.all():
            none = jnp.asarray(neutral, dtype)
            pairs = zip(arrays, present, strict=True)
            arrays = [jnp.where(here, x, none) for x, here in pairs]
        whole = functools.reduce(join, arrays)
    some = present.any(0)
    return whole if some.all() else jnp.where(some, whole, jnp.zeros((), dtype))


_JOINS = {"max": (-jnp.inf, jnp.maximum), "prod": (1.0, jnp.multiply)}


def part_sum(part: Part, x: Array, shape: tuple[int, ...]) -> Array:
    """The sum over all entries with an index, of one member."""
    by_place = jnp.sum(x, axis=others_of(part, x.ndim), dtype=wide_dtype(x.dtype))
    return _adder(part, math.prod(shape))(by_place)


def ordered_part_sum(part: Part, x: Array, shape: tuple[int, ...]) -> Array:
    """`part_sum`, bit for bit the same however the leaf is sharded.

    For scores, which decide what goes. It reads the leaf twice.
    """
    x, total, others = as_wide(x), math.prod(shape), others_of(part, x.ndim)
    labels = np.where(part.labels < 0, total, part.labels)
    places = np.bincount(labels.ravel(), minlength=total + 1)[:total]
    terms = int(places.max()) * math.prod(x.shape[a] for a in others)
    here = largest(x, others)
    most = here.ravel()
    if not is_plain(part, total):
        found = jax.ops.segment_max(most, labels.ravel(), total + 1)
        found = jnp.maximum(found, jnp.zeros((), x.dtype))  # where none is
        most, here = found[:total], found[labels].reshape(here.shape)
    return ordered_sum(x, others, _adder(part, total), most, here, terms)


def _adder(part: Part, total: int) -> Callable[[Array], Array]:
    """Sums up what is left of a leaf for each place that has an index."""
    # What has no index gets a number that is out of range, which segment_sum drops.
    labels = np.where(part.labels < 0, total, part.labels).ravel()

    def add(by_place: Array) -> Array:
        by_place = by_place.ravel()
        if is_plain(part, total):
            return by_place
        return jax.ops.segment_sum(by_place, labels, num_segments=total)

    return add


def sums(
    slices: Mapping[str, Slices], entries: Mapping[str, Array]
) -> dict[str, Array]:
    """The sum over each index's slices."""
    dtype = wide_dtype(*(x.dtype for x in entries.values()))
    used = {p: entries[p].astype(dtype) for p in paths_of(slices) if p in entries}
    return combined(slices, used, part_sum)


def squared_norms(slices: Mapping[str, Slices], params: PyTree) -> dict[str, Array]:
    """The squared L2 norm of each index's slices."""
    return sums(slices, {p: w * w for p, w in wide_leaves(slices, params).items()})


def entry_counts(slices: Mapping[str, Slices], params: PyTree) -> dict[str, np.ndarray]:
    """How many entries each index's slices have."""
    shapes = {path: np.shape(x) for path, x in leaves_with_paths(params)}
    result = {}
    for name, s in slices.items():
        total = np.zeros(math.prod(s.shape), np.int64)
        for part in s.parts:
            if part.path in shapes:
                shape = shapes[part.path]
                each = math.prod(shape[a] for a in others_of(part, len(shape)))
                here = part.labels[part.labels >= 0]
                total += each * np.bincount(here, minlength=total.size)
        result[name] = total.reshape(s.shape)
    return result
