"""The exact top-k mask without a sort.

The k-th largest score is found on a key that has the order of the scores; see
`_search`. That runs on any device, under `vmap`, with a traced k, and over sharded
arrays at the cost of a scalar all-reduce a pass; nothing is gathered, sorted or copied.
Ties are settled by position, in two more passes, and in none when no tie is cut.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.patterns._counting import Competing
from jaxsparse.patterns._keys import ordered_keys, positions
from jaxsparse.patterns._search import search
from jaxsparse.patterns._shards import Split
from jaxsparse.patterns._ties import tie_ends, tie_ends_of_groups


class First(NamedTuple):
    """Entries that come before all others: those above a key, and some equal to it.

    Attributes:
      low: the lowest key, for each group.
      end: the position in the group before which those with that key belong to them.
    """

    low: Array
    end: Array


def top_k_masks(
    scores: Sequence[Array],
    keep: Array,
    *,
    axes: Competing = None,
    splits: Sequence[Split] | None = None,
    of: Callable[[Array], Array] | None = None,
    first: Sequence[First] | None = None,
    layers: Sequence[tuple[int, ...]] | None = None,
) -> list[Array]:
    """Masks of the `keep` largest scores of each competing group.

    Args:
      scores: floating-point arrays of one dtype. Several of them form one group, which
        needs `axes=None`.
      keep: how many stay in each group, an integer that may be traced.
      axes: the axes along which the entries of a single array compete; the indices of
        the other axes are groups of their own. None: all entries.
      splits: of shards, over which mesh axes each array is split.
      of: a function of single entries: then the scores are `of(x)` for `x` in `scores`,
        made in every pass anew in place of being held.
      first: for each array what comes before all others, at most `keep` in a group.
      layers: for each array the axes along which the groups of `first` lie.

    Returns:
      Bool arrays of the shapes of `scores`, exactly `keep` of each group True. Among
      equal scores the one with the lower flat index (in the order of the list) comes
      first.

    Cost: for each digit of 8 bits one pass over the scores and 8 over the digits, and
    one for the mask; two more where the threshold is tied. Memory: the digits, one byte
    a score.
    """
    scores = lax.stop_gradient(list(scores))
    if splits is None:
        splits = [((),) * x.ndim for x in scores]
    if axes is not None and len(axes) == scores[0].ndim:
        axes = None
    score_of = of or (lambda x: x)
    arrays: list[Any] = scores
    keys_of: list[Callable[[Any], Array]]
    if of is None and first is None:
        # A loop takes what it reads as arrays: keys then, which say more than scores.
        # None has a bit of 0 that has to wait for `keep`, so that what is selected
        # later is not made before.
        zero = jnp.minimum(jnp.min(keep), 0)
        arrays = [ordered_keys(x) for x in scores]
        arrays = [key | zero.astype(key.dtype) for key in arrays]
        keys_of = [lambda key: key] * len(scores)
    elif first is None:
        keys_of = [lambda x: ordered_keys(score_of(x))] * len(scores)
    else:
        assert layers is not None
        arrays = list(zip(scores, first, strict=True))
        keys_of = [
            functools.partial(_with_first, score_of, layer, split)
            for layer, split in zip(layers, splits, strict=True)
        ]
    begin_near = first is None
    cut = search(arrays, keys_of, keep, axes, splits, begin_near=begin_near)
    if axes is None:
        ends = tie_ends(arrays, keys_of, cut, splits)
    else:
        ends = [tie_ends_of_groups(arrays[0], keys_of[0], cut, axes, splits[0])]
    masks = []
    for x, key_of, end, split in zip(arrays, keys_of, ends, splits, strict=True):
        key = key_of(x)
        position = positions(key, axes, split, now=end)
        masks.append((key > cut.low) | ((key == cut.low) & (position < end)))
    return masks


def _with_first(
    score_of: Callable[[Array], Array],
    axes: tuple[int, ...],
    split: Split,
    entry: tuple[Array, First],
) -> Array:
    """Keys of which those that come first are the highest."""
    x, first = entry
    key = ordered_keys(score_of(x))
    position = positions(x, axes, split, now=first.end)
    ahead = (key > first.low) | ((key == first.low) & (position < first.end))
    return jnp.where(ahead, ~jnp.zeros_like(key), key)  # no number has this key
