"""The exact top-k masks of many small arrays by one search.

Each array is a row of one matrix, and the rows are searched together: what is compiled
for each array is how it gets there, and how its mask gets out. That takes a copy; so it
is for arrays that are small.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._checks import is_concrete
from jaxsparse._dtypes import count_dtype
from jaxsparse._sharded import manual_axes
from jaxsparse._typing import Array
from jaxsparse.patterns._keys import ordered_keys
from jaxsparse.patterns.threshold import masks_by_keys

_LANES = 512  # what rows are filled up to a multiple of
_TOGETHER = 2**18  # entries of a matrix
_SMALL = 2**16  # entries: a row of as many is filled in no time


def together(arrays: Sequence[Array], units: Sequence[Any]) -> list[list[int]]:
    """Which arrays may share a search: small ones, on one device, of similar size."""
    found: dict[Any, list[list[int]]] = {}
    for i, (x, unit) in enumerate(zip(arrays, units, strict=True)):
        if not unit.size or manual_axes() or not jax.typeof(x).sharding.mesh.empty:
            continue
        known = isinstance(x, jax.Array) and is_concrete(x)
        devices = frozenset(x.devices()) if known else frozenset()
        if len(devices) > 1:
            continue
        size_class = max(0, math.ceil(math.log2(unit.size / _SMALL)))
        own = found.setdefault((unit.dtype, size_class, devices), [[]])
        longest = max([unit.size, *(units[j].size for j in own[-1])])
        if (len(own[-1]) + 1) * _length(longest) > _TOGETHER:
            own.append([])
        own[-1].append(i)
    return [group for own in found.values() for group in own if len(group) > 1]


def top_k_masks_of_each(scores: Sequence[Array], keep: Sequence[Array]) -> list[Array]:
    """Masks of the largest scores of each array."""
    scores = lax.stop_gradient(list(scores))
    if jnp.finfo(scores[0].dtype).bits < 16:
        scores = [x.astype(jnp.float32) for x in scores]  # which has the same order
    length = _length(max(x.size for x in scores))
    # Among the lowest keys, that of NaN, those behind come last.
    fill = lambda key: jnp.pad(key.reshape(-1), (0, length - key.size))
    keys = jnp.stack([fill(ordered_keys(x)) for x in scores])
    most = jnp.stack([jnp.asarray(k, count_dtype(length)) for k in keep])[:, None]
    split = [((), ())]
    (kept,) = masks_by_keys([keys], lambda key: key, most, axes=(1,), splits=split)
    return [row[: x.size].reshape(x.shape) for row, x in zip(kept, scores, strict=True)]


def _length(size: int) -> int:
    """Of a row that holds an array."""
    return -(-size // _LANES) * _LANES
