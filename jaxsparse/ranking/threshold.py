"""The exact top-k mask without a sort.

The k-th largest score is found on a key that has the order of the scores; see
`search`. That runs on any device, under `vmap`, with a traced k, and over sharded
arrays at the cost of a scalar all-reduce a pass; nothing is gathered, sorted or copied.
Ties are settled by position, in two more passes, and in none when no tie is cut.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.ranking.counting import Competing
from jaxsparse.ranking.keys import ordered_keys, positions
from jaxsparse.ranking.search import search
from jaxsparse.ranking.shards import Split
from jaxsparse.ranking.ties import tie_ends, tie_ends_of_groups


class First(NamedTuple):
    """Entries that come before all others: those above a key, and some equal to it.

    Attributes:
      low: the lowest key, for each group.
      end: the position in the group before which those with that key belong to them.
    """

    low: Array
    end: Array


KeyOf = Callable[[Array], Array]
"""The ordered key of every entry of an array."""


def top_k_masks(
    scores: Sequence[Array],
    keep: Array,
    *,
    axes: Competing = None,
    splits: Sequence[Split] | None = None,
) -> list[Array]:
    """Masks of the `keep` largest scores of each competing group.

    Cost: for each digit of 8 bits one pass over the keys and 8 over the digits, and one
    for the mask; two more where the threshold is tied. Memory: the keys, and the
    digits, one byte a score.
    """
    if splits is None:
        splits = [((),) * x.ndim for x in scores]
    keys, key_of = held_keys(scores, keep)
    return masks_by_keys(keys, key_of, keep, axes=axes, splits=splits)


def held_keys(scores: Sequence[Array], keep: Array) -> tuple[list[Array], KeyOf]:
    """Keys that are made once.

    A loop takes what it reads as arrays, and scores that are computed would be held for
    it anyway. None is made before `keep` is there: a bit of 0 waits for it.
    """
    zero = jnp.minimum(jnp.min(keep), 0)
    keys = [ordered_keys(x) for x in lax.stop_gradient(list(scores))]
    return [key | zero.astype(key.dtype) for key in keys], lambda key: key


def masks_by_keys(
    arrays: Sequence[Array],
    key_of: KeyOf,
    keep: Array,
    *,
    axes: Competing = None,
    splits: Sequence[Split],
    first: Sequence[First] | None = None,
    layers: Sequence[tuple[int, ...]] | None = None,
) -> list[Array]:
    """Masks of the `keep` largest keys of each competing group."""
    if axes is not None and len(axes) == arrays[0].ndim:
        axes = None
    entries: list[Any] = list(arrays)
    keys_of: list[Callable[[Any], Array]] = [key_of] * len(entries)
    if first is not None:
        assert layers is not None
        entries = list(zip(arrays, first, strict=True))
        keys_of = [
            functools.partial(_with_first, key_of, layer, split)
            for layer, split in zip(layers, splits, strict=True)
        ]
    cut = search(entries, keys_of, keep, axes, splits, begin_near=first is None)
    if axes is None:
        ends = tie_ends(entries, keys_of, cut, splits)
    else:
        ends = [tie_ends_of_groups(entries[0], keys_of[0], cut, axes, splits[0])]
    masks = []
    for x, key_of, end, split in zip(entries, keys_of, ends, splits, strict=True):
        key = key_of(x)
        position = positions(key, axes, split, now=end)
        masks.append((key > cut.low) | ((key == cut.low) & (position < end)))
    return masks


def _with_first(
    key_of: KeyOf, axes: tuple[int, ...], split: Split, entry: tuple[Array, First]
) -> Array:
    """Keys of which those that come first are the highest."""
    x, first = entry
    key = key_of(x)
    position = positions(x, axes, split, now=first.end)
    ahead = (key > first.low) | ((key == first.low) & (position < first.end))
    return jnp.where(ahead, ~jnp.zeros_like(key), key)  # no number has this key
