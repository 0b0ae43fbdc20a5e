"""The exact top-k masks of many arrays by one search.

Small arrays are rows of one matrix and are searched together: what is compiled for each
array is how it gets there, and how its mask gets out. That takes a copy; so it is for
arrays that are small.

Larger ones are searched one after the other, by one program that is compiled once for
all of them. Its copies cost a third of the time of the search, so it is for calls
without jit, which compile more than they run.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._checks import is_concrete
from jaxsparse._dtypes import count_dtype
from jaxsparse._platform import unknown
from jaxsparse._sharded import manual_axes
from jaxsparse._typing import Array
from jaxsparse.ranking.counting import Competing
from jaxsparse.ranking.keys import ordered_keys
from jaxsparse.ranking.threshold import masks_by_keys

_LANES = 512  # what rows are filled up to a multiple of
_TOGETHER = 2**18  # entries of a matrix
_SMALL = 2**16  # entries: a row of as many is filled in no time
_IN_TURN = 2**22  # entries of arrays that are searched one after the other
_LONGEST = 2**20  # entries of one of them


def together(arrays: Sequence[Array], units: Sequence[Any]) -> list[list[int]]:
    """Which arrays may share a program: on one device, of similar size."""
    found: dict[Any, list[list[int]]] = {}
    for i, (x, unit) in enumerate(zip(arrays, units, strict=True)):
        if not unit.size or manual_axes() or not jax.typeof(x).sharding.mesh.empty:
            continue
        known = isinstance(x, jax.Array) and is_concrete(x)
        devices = frozenset(x.devices()) if known else frozenset()
        if len(devices) > 1:
            continue
        size_class = max(0, math.ceil(math.log2(unit.size / _SMALL)))
        in_turn = known and size_class > 0 and unit.size <= _LONGEST
        own = found.setdefault((unit.dtype, size_class, devices, in_turn), [[]])
        longest = max([unit.size, *(units[j].size for j in own[-1])])
        most = _IN_TURN if in_turn else _TOGETHER
        if (len(own[-1]) + 1) * _length(longest) > most:
            own.append([])
        own[-1].append(i)
    groups: list[list[int]] = []
    for (*_, in_turn), own in found.items():
        # By themselves, arrays of equal shape share a program.
        alone = {arrays[i].shape for group in own for i in group}
        if not in_turn or len(own) < len(alone):
            groups += own
    return [group for group in groups if len(group) > 1]


def top_k_masks_of_each(scores: Sequence[Array], keep: Sequence[Array]) -> list[Array]:
    """Masks of the largest scores of each array."""
    scores = lax.stop_gradient(list(scores))
    if jnp.finfo(scores[0].dtype).bits < 16:
        scores = [x.astype(jnp.float32) for x in scores]  # which has the same order
    length = _length(max(x.size for x in scores))
    # Among the lowest keys, that of NaN, those behind come last.
    fill = lambda key: jnp.pad(key.reshape(-1), (0, length - key.size))
    keys = jnp.stack([fill(ordered_keys(x)) for x in scores])
    most = jnp.stack([jnp.asarray(k, count_dtype(length)) for k in keep])
    if keys.size > _TOGETHER:
        rows = keys.reshape(len(keys), -1, _LANES)
        kept = lax.map(_mask_of_row, (rows, most)).reshape(keys.shape)
    else:
        kept = _masks(keys, most[:, None], (1,))
    numbers = unknown(most[0], range(len(scores)), np.int32)
    return [
        lax.dynamic_slice(kept, (n, jnp.zeros_like(n)), (1, x.size)).reshape(x.shape)
        for n, x in zip(numbers, scores, strict=True)
    ]


def _mask_of_row(row: tuple[Array, Array]) -> Array:
    """The mask of one array's keys."""
    return _masks(row[0], row[1], None)


def _masks(keys: Array, keep: Array, axes: Competing) -> Array:
    """The mask of keys that are on one device."""
    split = [((), ())]
    (kept,) = masks_by_keys([keys], lambda key: key, keep, axes=axes, splits=split)
    return kept


def _length(size: int) -> int:
    """Of a row that holds an array."""
    return -(-size // _LANES) * _LANES
