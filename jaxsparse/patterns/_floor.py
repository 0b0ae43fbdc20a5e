"""What each layer keeps at least, when all compete for one budget.

The best units of each layer come first, before the best of all. Where a layer has as
many among the best of all, as it mostly has, nothing is changed by that. So the masks
are looked at, in one pass, and the selection is repeated only if a layer has too few.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import count_dtype
from jaxsparse._loops import when
from jaxsparse._typing import Array
from jaxsparse.ranking.counting import count
from jaxsparse.ranking.joint import fits, joint_masks
from jaxsparse.ranking.keys import ordered_keys, positions
from jaxsparse.ranking.shards import Split, names_along, pieces, total, varying_as
from jaxsparse.ranking.threshold import First, held_keys, masks_by_keys


def top_k_with_floor(
    scores: Sequence[Array],
    keep: Array,
    layers: Sequence[tuple[int, ...]],
    splits: Sequence[Split],
    min_keep: int,
    of: Callable[[Array], Array] | None = None,
) -> list[Array]:
    """Masks of the `keep` largest scores of all arrays, and of some of each layer."""
    arrays = lax.stop_gradient(list(scores))
    key_of = ordered_keys if of is None else lambda x: ordered_keys(of(x))
    if fits(scores, layers):
        least = [min(min_keep, x.size) for x in scores]
        return joint_masks(arrays, key_of, keep, least)
    if of is None:
        arrays, key_of = held_keys(scores, keep)
    masks = masks_by_keys(arrays, key_of, keep, splits=splits)
    sizes = [
        math.prod(x.shape[a] for a in axes) * pieces(names_along(split, axes))
        for x, axes, split in zip(scores, layers, splits, strict=True)
    ]
    least = [min(min_keep, n) for n in sizes]
    if not any(least):
        return masks
    whole = [
        x.size * pieces(names_along(split, None))
        for x, split in zip(scores, splits, strict=True)
    ]
    each = zip(least, whole, sizes, strict=True)
    in_all = sum(n * (size // layer) for n, size, layer in each if n)

    def again(masks: list[Array], arrays: list[Array], keep: Array) -> list[Array]:
        first, now = [], keep
        for x, axes, split, n in zip(arrays, layers, splits, least, strict=True):
            first.append(_best(key_of(x), axes, split, n, now))
            # One after the other: each takes memory.
            now = jnp.minimum(now, jnp.sum(first[-1].end, dtype=now.dtype))
        keep = jnp.maximum(keep, jnp.asarray(in_all, keep.dtype))
        floor = {"first": first, "layers": layers}
        return masks_by_keys(arrays, key_of, keep, splits=splits, **floor)

    short = [
        _is_short(mask, axes, split, n)
        for mask, axes, split, n in zip(masks, layers, splits, least, strict=True)
        if n
    ]
    short = functools.reduce(jnp.maximum, short)
    return when(short > 0, again, masks, arrays, keep)


def _is_short(mask: Array, axes: tuple[int, ...], split: Split, least: int) -> Array:
    """1 if a layer keeps fewer than `least`, else 0."""
    over = names_along(split, axes)
    if least == 1:  # a maximum of bytes is quicker than a sum
        some = jnp.max(mask.astype(jnp.uint8), axis=axes, keepdims=True)
        kept = total([some.astype(jnp.int32)], [over])
    else:
        kept = total([count(mask, axes, count_dtype(mask.size))], [over])
    short = jnp.max((kept < least).astype(jnp.int32))
    apart = tuple(n for n in names_along(split, None) if n not in over)
    return lax.pmax(short, apart) if apart else short


def _best(
    keys: Array, axes: tuple[int, ...], split: Split, least: int, now: Array
) -> First:
    """The `least` largest of each layer; of equal ones those with lower positions.

    Nothing is made before `now`, which is not negative: else it were in every step.
    """
    over = names_along(split, axes)
    zero = jnp.minimum(now, jnp.zeros_like(now))
    shape = [1 if a in axes else n for a, n in enumerate(keys.shape)]

    def add(_, found: First) -> First:
        # The next one is the highest below the last, or one equal to it and behind it.
        low, end = found
        position = positions(keys, axes, split, now=now)
        behind = (keys < low) | ((keys == low) & (position >= end))
        rest = jnp.where(behind, keys, jnp.zeros_like(keys))
        top = jnp.max(rest, axis=axes, keepdims=True)
        top = lax.pmax(top, over) if over else top
        there = behind & (keys == top)
        place = jnp.where(there, position, jnp.iinfo(position.dtype).max)
        place = jnp.min(place, axis=axes, keepdims=True)
        place = lax.pmin(place, over) if over else place
        return First(top, place + 1)

    dtype = jax.eval_shape(lambda x: positions(x, axes, split), keys).dtype
    start = First(~zero.astype(keys.dtype), zero.astype(dtype))
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, shape), start)
    start = jax.tree.map(lambda n: varying_as(n, [keys], [over]), start)
    if least == 0:  # an array without entries has no best one
        return start
    return add(0, start) if least == 1 else lax.fori_loop(0, least, add, start)
