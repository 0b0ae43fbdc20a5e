"""The k-th largest key of each group, digit by digit, without a sort.

A turn maps the keys of an interval to digits of 8 bits and finds the digit of the k-th
bit by bit: a pass asks how many digits reach a candidate, and the answer is one integer
per group. Its digit's keys are the next interval. The search ends where all keys of the
interval are kept, which mostly is before they are one key.

A turn reads the scores and makes their keys anew, which costs less than to hold them:
what is held is one byte a score.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import count_dtype
from jaxsparse._loops import after
from jaxsparse._platform import on_cpu
from jaxsparse._sharded import manual_axes
from jaxsparse._typing import Array
from jaxsparse.ranking.counting import Competing, count_reaching
from jaxsparse.ranking.shards import Split, names_along, pieces, total, varying_as

_DIGIT = 8  # bits
_TOP = 2**_DIGIT - 1
_SAMPLE = 2**13, 2**16  # entries, at least and at most
_SHARE = 2**7  # one in so many
_RUN = 64  # entries that lie together: memory is slow to give single ones
_LARGE = 2**20  # entries from which a sample pays
_DEVIATIONS = 4


class Cut(NamedTuple):
    """Where to cut, for each competing group.

    Attributes:
      low: the lowest key of an interval in which the k-th largest is.
      width: the highest one of it less `low`: 0, or all keys in it are kept.
      need: how many of those in it are kept, from the lowest index on.
      inside: how many there are.
    """

    low: Array
    width: Array
    need: Array
    inside: Array


def search(
    arrays: Sequence[Any],
    keys_of: Sequence[Callable[[Any], Array]],
    keep: Array,
    axes: Competing,
    splits: Sequence[Split],
    *,
    begin_near: bool = False,
) -> Cut:
    """Finds the cut of each group."""
    keys = [jax.eval_shape(f, x) for f, x in zip(keys_of, arrays, strict=True)]
    names = [names_along(split, axes) for split in splits]
    if axes is None:
        groups = ()
        size = sum(k.size * pieces(n) for k, n in zip(keys, names, strict=True))
    else:
        shape = keys[0].shape
        groups = tuple(1 if a in axes else n for a, n in enumerate(shape))
        size = math.prod(shape[a] for a in axes) * pieces(names[0])
    keep = jnp.asarray(keep, count_dtype(size))
    some = [jax.tree.leaves(x)[0] for x in arrays]
    need = varying_as(jnp.broadcast_to(keep, groups), some, names)
    low = jnp.zeros_like(need, keys[0].dtype)
    whole = Cut(low, ~low, need, jnp.full_like(need, size))
    start = whole, shift_of(~low)
    if begin_near and axes is None and _whole(some):
        found = near(arrays, keys_of, need, size)
        if found is not None:
            start = whole._replace(low=found[0], width=~found[0]), found[1]

    def turn(state: tuple[Cut, Array]) -> tuple[Cut, Array]:
        cut, shift = state
        digits = [
            _digit(f(x), cut, shift)
            for f, x in zip(keys_of, after(cut.low, list(arrays)), strict=True)
        ]
        digit, need, inside = _find_digit(digits, cut, axes, names)
        width = (jnp.ones_like(shift) << shift) - 1
        low = cut.low + (digit.astype(cut.low.dtype) << shift)
        found = Cut(low, jnp.full_like(low, width), need, inside), shift_of(width)
        # Where there are more parts than digits, the outer digits stand for the rest.
        outer = (digit == 0) | (digit == _TOP)
        missed = jnp.any(((cut.width >> shift) > _TOP) & outer)
        again = whole, shift_of(~jnp.zeros_like(low))
        return jax.tree.map(lambda a, b: jnp.where(missed, a, b), again, found)

    def unfinished(state: tuple[Cut, Array]) -> Array:
        cut, _ = state
        return jnp.any((cut.width > 0) & (cut.need < cut.inside))

    return lax.while_loop(unfinished, turn, start)[0]


def shift_of(width: Array, bits: int = _DIGIT) -> Array:
    """By how many bits to shift what is at most `width`, so that so many are left."""
    most = jnp.max(width)
    all_bits = jnp.asarray(jnp.iinfo(most.dtype).bits, most.dtype)
    used = all_bits - lax.clz(most)
    return used - jnp.minimum(used, jnp.asarray(bits, most.dtype))


def _digit(key: Array, cut: Cut, shift: Array) -> Array:
    """Which part of the interval a key is in; 0, which never counts, outside of it."""
    part = key - cut.low
    part = jnp.where(part <= cut.width, part, jnp.zeros_like(part)) >> shift
    return jnp.minimum(part, jnp.asarray(_TOP, part.dtype)).astype(jnp.uint8)


def _find_digit(
    digits: Sequence[Array], cut: Cut, axes: Competing, names: Sequence[tuple[str, ...]]
) -> tuple[Array, Array, Array]:
    """The largest digit that as many as are needed reach, from its highest bit.

    Gives the digit, how many of those that have it are still needed, and how many have
    it.
    """

    def try_bit(i, carry):
        digit, reach, above = carry
        bit = jnp.asarray(_DIGIT - 1 - i, jnp.uint8)
        candidate = digit | (jnp.ones((), jnp.uint8) << bit)
        counts = [count_reaching(d, candidate, axes, above.dtype) for d in digits]
        counted = total(counts, names)
        accept = counted >= cut.need
        # The last candidate that was refused is the digit's successor.
        return (
            jnp.where(accept, candidate, digit),
            jnp.where(accept, counted, reach),
            jnp.where(accept, above, counted),
        )

    zero = jnp.zeros_like(cut.need)
    start = zero.astype(jnp.uint8), cut.inside, zero
    digit, reach, above = lax.fori_loop(0, _DIGIT, try_bit, start)
    return digit, cut.need - above, reach - above


# Where to begin. Most of a search's turns only find out which power of 2 the cut is
# near.


def _whole(arrays: Sequence[Array]) -> bool:
    """Whether no array is spread over devices, where a sample would have to be sent."""
    spread = any(not jax.typeof(x).sharding.mesh.empty for x in arrays)
    return not spread and not manual_axes()


def near(
    arrays: Sequence[Array],
    keys_of: Sequence[Callable[[Array], Array]],
    need: Array,
    size: int,
) -> tuple[Array, Array] | None:
    """Where an interval begins of which most digits hold the cut's surroundings.

    Gives its lowest key and by how many bits keys are shifted, from a sample; None
    where there are too few entries.

    It is for CPUs. A pass of an accelerator takes less time than it takes to start the
    passes over the sample.
    """
    if size < _LARGE:
        return None
    least, most = _SAMPLE
    stride = size // min(max(size // _SHARE, least), most)
    stride = stride | 1  # odd: else it may never leave some columns

    def some(x: Array) -> Array:
        flat = x.reshape(-1)
        runs = lax.slice(flat, (0,), (x.size - x.size % _RUN,)).reshape(-1, _RUN)
        return lax.slice(runs, (0, 0), runs.shape, (stride, 1)).reshape(-1)

    def sampled(need: Array, *arrays: Array) -> tuple[Array, Array]:
        pairs = zip(keys_of, arrays, strict=True)
        sample = jnp.concatenate([f(some(x)) for f, x in pairs])
        n = sample.size
        share = need.astype(jnp.float32) / size
        margin = _DEVIATIONS * jnp.sqrt(share * (1 - share) * n) + 1
        ranks = share * n + jnp.stack([-margin, margin])
        keep = jnp.clip(ranks, 0, n).astype(jnp.int32)[:, None]
        pair = jnp.broadcast_to(sample, (2, n))
        found = search([pair], [lambda key: key], keep, (1,), [((), ())])
        nothing = jnp.zeros((), sample.dtype)
        high = jnp.where(ranks[0] < 1, ~nothing, (found.low + found.width)[0, 0])
        low = jnp.where(ranks[1] > n, nothing, found.low[1, 0])
        # A half of the digits or fewer are between the two, the others around them.
        shift = shift_of(high - low, _DIGIT - 1)
        below = jnp.asarray(2 ** (_DIGIT - 2), sample.dtype) << shift
        return low - jnp.minimum(low, below), shift

    def everything(need: Array, *arrays: Array) -> tuple[Array, Array]:
        del need
        key = jax.eval_shape(keys_of[0], arrays[0]).dtype
        return jnp.zeros((), key), shift_of(~jnp.zeros((), key))

    return on_cpu(sampled, everything, need, *arrays)
