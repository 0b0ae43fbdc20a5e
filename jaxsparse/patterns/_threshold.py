"""The exact top-k mask without a sort.

The k-th largest score is found on a key that has the order of the scores, one digit of
it after the other, and each digit bit by bit: a pass asks how many digits reach a
candidate, and the answer is one integer per competing group. So the search runs on any
device, under `vmap`, with a traced k, and over sharded arrays at the cost of a scalar
all-reduce a pass; nothing is gathered, sorted or copied. Ties are settled by position,
in two more passes, and in none when no tie is cut.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse._loops import after
from jaxsparse._typing import Array
from jaxsparse.patterns._counting import Competing, count, count_reaching
from jaxsparse.patterns._counts import count_dtype
from jaxsparse.patterns._shards import (
    Split,
    index_along,
    names_along,
    pieces,
    total,
    varying_as,
)

_DIGIT = 16  # bits

Digits = tuple[Array, ...]
"""The keys of one array in digits of 16 bits, uint16, the highest first."""


class Cut(NamedTuple):
    """Where to cut, for each competing group.

    Attributes:
      digits: the k-th largest key, in digits of 16 bits, the highest first.
      need: how many of those equal to it are kept, from the lowest index on.
      partly: whether that is fewer than there are.
    """

    digits: Digits
    need: Array
    partly: Array


def ordered_keys(x: Array) -> Array:
    """Unsigned integers in the order of the floating-point numbers `x`.

    The bits of a non-negative float are in order as they stand; those of a negative
    one are in reverse. -0.0 and 0.0 get the same key, NaN the key 0 below all others.

    Args:
      x: floating point, 16, 32 or 64 bits.

    Returns:
      Unsigned integers of the same width and shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsparse.patterns._threshold import ordered_keys
      >>> x = jnp.array([jnp.nan, -jnp.inf, -1.0, -0.0, 0.0, 1e-30, 2.0, jnp.inf])
      >>> keys = ordered_keys(x)
      >>> (keys[1:] >= keys[:-1]).tolist(), bool(keys[3] == keys[4])
      ([True, True, True, True, True, True, True], True)
    """
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    raw = lax.bitcast_convert_type(x, unsigned)
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    raw = jnp.where(raw == sign, jnp.zeros_like(raw), raw)
    keys = jnp.where(raw >= sign, ~raw, raw | sign)
    return jnp.where(jnp.isnan(x), jnp.zeros_like(keys), keys)


def top_k_masks(
    scores: Sequence[Array],
    keep: Array,
    *,
    axes: Competing = None,
    first: Sequence[Array] | None = None,
    splits: Sequence[Split] | None = None,
) -> list[Array]:
    """Masks of the `keep` largest scores of each competing group.

    Args:
      scores: floating-point arrays of one dtype. Several of them form one group, which
        needs `axes=None`.
      keep: how many stay in each group, an integer that may be traced.
      axes: the axes along which the entries of a single array compete; the indices of
        the other axes are groups of their own. None: all entries.
      first: bools like `scores`: entries that come before all others, at most `keep` in
        a group.
      splits: of shards, over which mesh axes each array is split.

    Returns:
      Bool arrays of the shapes of `scores`, exactly `keep` of each group True. Among
      equal scores the one with the lower flat index (in the order of the list) comes
      first.

    Cost: one pass over 16-bit digits for each bit of the dtype, one over the scores for
    each digit and one for the mask; two more where the threshold is tied. Memory: the
    digits, as large as the scores.
    """
    if splits is None:
        splits = [((),) * x.ndim for x in scores]
    if axes is not None and len(axes) == scores[0].ndim:
        axes = None
    digits, cut = _search(scores, first, keep, axes, splits)
    if axes is None:
        ends = _tie_ends(digits, cut, splits)
    else:
        ends = [_tie_ends_of_groups(digits[0], cut, axes, splits[0])]
    masks = []
    for own, end, split in zip(digits, ends, splits, strict=True):
        above, tied = _compare(own, cut)
        position = positions(own[0], axes, split, now=end)
        masks.append(above | (tied & (position < end)))
    return masks


def _search(
    scores: Sequence[Array],
    first: Sequence[Array] | None,
    keep: Array,
    axes: Competing,
    splits: Sequence[Split],
) -> tuple[list[Digits], Cut]:
    """Finds the cut digit by digit, from the highest, and gives the arrays' digits."""
    names = [names_along(split, axes) for split in splits]
    if axes is None:
        groups = ()
        size = sum(x.size * pieces(n) for x, n in zip(scores, names, strict=True))
    else:
        shape = scores[0].shape
        groups = tuple(1 if a in axes else n for a, n in enumerate(shape))
        size = math.prod(shape[a] for a in axes) * pieces(names[0])
    keep = jnp.asarray(keep, count_dtype(size))
    need = varying_as(jnp.broadcast_to(keep, groups), scores, names)
    inside = jnp.full_like(need, size)
    found: list[Digits] = [() for _ in scores]
    cut = Cut((), need, need < inside)
    wait = _zero(keep)
    low = jnp.finfo(scores[0].dtype).bits
    while low:
        low = max(0, low - _DIGIT)
        for i, x in enumerate(scores):
            ahead = None if first is None else first[i]
            found[i] = (*found[i], _digit(x, ahead, low + wait, found[i], cut))
        last = [d[-1] for d in found]
        digit, need, inside = _find_digit(last, need, inside, axes, names)
        cut = Cut((*cut.digits, digit), need, need < inside)
    return found, cut


def _zero(number: Array) -> Array:
    """0, which XLA cannot know: no count is negative.

    What is made with it waits for the count, and its memory can serve others before.
    """
    return jnp.minimum(number, jnp.zeros_like(number))


def _digit(
    x: Array, first: Array | None, low: Array, higher: Digits, cut: Cut
) -> Array:
    """Bits `low` to `low + 16` of the keys; 0 where higher ones are not those of `cut`.

    What is 0 for that reason never counts: a candidate has at least one bit.
    """
    key = ordered_keys(x)
    if first is not None:
        key = jnp.where(first, ~jnp.zeros_like(key), key)  # no number has this key
    digit = (key >> low.astype(key.dtype)).astype(jnp.uint16)
    if not higher:
        return digit
    _, member = _compare(higher, cut)
    return jnp.where(member, digit, jnp.zeros_like(digit))


def _compare(digits: Digits, cut: Cut) -> tuple[Array, Array]:
    """Which keys are above the cut, and which equal it, in the digits at hand."""
    above = digits[0] > cut.digits[0]
    equal = digits[0] == cut.digits[0]
    for digit, bound in zip(digits[1:], cut.digits[1:], strict=True):
        above = above | (equal & (digit > bound))
        equal = equal & (digit == bound)
    return above, equal


def _find_digit(
    digits: Sequence[Array],
    need: Array,
    inside: Array,
    axes: Competing,
    names: Sequence[tuple[str, ...]],
) -> tuple[Array, Array, Array]:
    """The largest digit that `need` of the `inside` digits reach, from its highest bit.

    Gives the digit, how many of those that have it are still needed, and how many have
    it.
    """

    def try_bit(i, carry):
        digit, reach, above = carry
        bit = jnp.asarray(_DIGIT - 1 - i, jnp.uint16)
        candidate = digit | (jnp.ones((), jnp.uint16) << bit)
        counts = [count_reaching(d, candidate, axes, need.dtype) for d in digits]
        counted = total(counts, names)
        accept = counted >= need
        # The last candidate that was refused is the digit's successor.
        return (
            jnp.where(accept, candidate, digit),
            jnp.where(accept, counted, reach),
            jnp.where(accept, above, counted),
        )

    start = jnp.zeros_like(need, jnp.uint16), inside, jnp.zeros_like(inside)
    digit, reach, above = lax.fori_loop(0, _DIGIT, try_bit, start)
    return digit, need - above, reach - above


# Ties. XLA makes and stores in front of a loop what does not depend on its turn. Flags
# and positions of all weights would cost more than the whole search, also where it
# makes no turn; so they are tied to it (`now`, `after`) and fuse into the pass.


def _tie_ends(
    digits: Sequence[Digits], cut: Cut, splits: Sequence[Split]
) -> list[Array]:
    """For each array the position before which ties are kept, `cut.need` in all.

    Two passes, and none where no tie is cut: one counts the ties of each row (the last
    axis), from which follows the row in which the last one is kept; one takes this row
    out. Where an array is split over devices the position is searched for.
    """
    names = [names_along(split, None) for split in splits]

    def find(turn: Array, ends: list[Array]) -> list[Array]:
        need, found = cut.need, []
        for i, (own, end) in enumerate(zip(after(turn, digits), ends, strict=True)):
            # One array after the other: each waits for the `need` that is left.
            wait = _zero(need).astype(jnp.uint16)
            here_cut = cut._replace(digits=tuple(d + wait for d in cut.digits))
            tied = jnp.atleast_1d(_compare(own, here_cut)[1])
            if names[i]:
                inside, end = _tie_end_of_shards(tied, need, splits[i], end)
                found.append(end)
                need = need - inside
                continue
            narrow = jnp.int16 if tied.shape[-1] < 2**15 else need.dtype
            rows = jnp.sum(tied, axis=-1, dtype=narrow).astype(need.dtype)
            here = jnp.minimum(need, jnp.sum(rows, dtype=need.dtype))
            row, left = _place(rows, here)
            chosen = (tied & (positions(rows)[..., None] == row)).astype(jnp.uint8)
            columns = jnp.max(chosen, axis=tuple(range(tied.ndim - 1)), initial=0)
            column, _ = _place(columns.astype(need.dtype), left)
            last = row.astype(end.dtype) * tied.shape[-1] + column.astype(end.dtype)
            found.append(jnp.where(here > 0, last + 1, jnp.zeros_like(end)))
            need = need - here
        return found

    sizes = [d[0].size * pieces(n) for d, n in zip(digits, names, strict=True)]
    ends = [jnp.full_like(cut.need, n, dtype=count_dtype(n)) for n in sizes]
    return lax.fori_loop(0, cut.partly.astype(jnp.int32), find, ends)


def _tie_end_of_shards(
    tied: Array, need: Array, split: Split, end: Array
) -> tuple[Array, Array]:
    """How many of an array's ties are kept, and the position before which they are."""
    names = names_along(split, None)
    counted = lambda flags: total([count(flags, None, need.dtype)], [names])
    here = jnp.minimum(need, counted(tied))
    position = positions(tied, None, split)
    found = _smallest(
        lambda e: counted(tied & (position < e)) >= here,
        tied.size * pieces(names),
        start=jnp.zeros_like(end),
    )
    return here, found


def _place(counts: Array, need: Array) -> tuple[Array, Array]:
    """Where the `need`-th of things counted in order lies, and its number in there."""
    position = positions(counts)

    def before(end: Array) -> Array:
        inside = jnp.where(position < end, counts, jnp.zeros((), counts.dtype))
        return jnp.sum(inside, dtype=counts.dtype)

    start = jnp.zeros_like(need, position.dtype)
    end = _smallest(lambda end: before(end) >= need, counts.size, start=start)
    place = jnp.maximum(end - 1, jnp.zeros_like(end))
    return place, need - before(place)


def _tie_ends_of_groups(
    digits: Digits, cut: Cut, axes: tuple[int, ...], split: Split
) -> Array:
    """For each group the position along `axes` before which ties are kept."""
    shape, names = digits[0].shape, names_along(split, axes)

    def enough(end: Array) -> Array:
        _, tied = _compare(after(end, digits), cut)
        tied = tied & (positions(tied, axes, split, now=end) < end)
        return total([count(tied, axes, cut.need.dtype)], [names]) >= cut.need

    size = math.prod(shape[a] for a in axes) * pieces(names)
    start = jnp.where(cut.partly, jnp.zeros_like(cut.need), size)
    return _smallest(enough, size, start=start)


def _smallest(enough: Callable[[Array], Array], most: int, *, start: Array) -> Array:
    """The smallest number from `start` to `most` of which `enough` says True."""

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        yes = enough(middle)
        return jnp.where(yes, low, middle + 1), jnp.where(yes, middle, high)

    bounds = (start, jnp.full_like(start, most))
    return lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, bounds)[0]


def positions(
    x: Array,
    axes: Competing = None,
    split: Split | None = None,
    *,
    now: Array | None = None,
) -> Array:
    """The row-major position of every entry among those along `axes`.

    Args:
      x: an array; its shape counts.
      axes: the axes to count along; None: all.
      split: of a shard, over which mesh axes the array is split: then it is the
        position in the whole array.
      now: what has to be there before; see above.

    Returns:
      Integers.
    """
    axes = tuple(range(x.ndim)) if axes is None else axes
    split = split or ((),) * x.ndim
    dtype = count_dtype(x.size * pieces(names_along(split, axes)))
    position = jnp.zeros(x.shape, dtype)
    stride = jnp.ones((), dtype) if now is None else after(now, jnp.ones((), dtype))
    for axis in sorted(axes, reverse=True):
        position = position + stride * index_along(x, axis, split, dtype)
        stride = stride * (x.shape[axis] * pieces(split[axis]))
    return position
