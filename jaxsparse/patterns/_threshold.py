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
    scores: Sequence[Array], keep: Array, *, axes: Competing = None
) -> list[Array]:
    """Masks of the `keep` largest scores of each competing group.

    Args:
      scores: floating-point arrays of one dtype. Several of them form one group, which
        needs `axes=None`.
      keep: how many stay in each group, an integer that may be traced.
      axes: the axes along which the entries of a single array compete; the indices of
        the other axes are groups of their own. None: all entries.

    Returns:
      Bool arrays of the shapes of `scores`, exactly `keep` of each group True. Among
      equal scores the one with the lower flat index (in the order of the list) comes
      first.

    Cost: one pass over 16-bit digits for each bit of the dtype, one over the scores for
    each digit and one for the mask; two more where the threshold is tied. Memory: the
    digits, as large as the scores.
    """
    keep = jnp.asarray(keep, count_dtype(sum(x.size for x in scores)))
    if axes is not None and len(axes) == scores[0].ndim:
        axes = None
    digits, cut = _search(scores, keep, axes)
    if axes is None:
        ends = _tie_ends(digits, cut)
    else:
        ends = [_tie_ends_of_groups(digits[0], cut, axes)]
    masks = []
    for own, end in zip(digits, ends, strict=True):
        above, tied = _compare(own, cut)
        masks.append(above | (tied & (_positions(own[0], axes, now=end) < end)))
    return masks


def _search(
    scores: Sequence[Array], keep: Array, axes: Competing
) -> tuple[list[Digits], Cut]:
    """Finds the cut digit by digit, from the highest, and gives the arrays' digits."""
    if axes is None:
        groups, size = (), sum(x.size for x in scores)
    else:
        (x,) = scores
        groups = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        size = math.prod(x.shape[a] for a in axes)
    need = jnp.broadcast_to(keep, groups)
    inside = jnp.full(groups, size, keep.dtype)
    found: list[Digits] = [() for _ in scores]
    cut = Cut((), need, need < inside)
    wait = _zero(keep)
    low = jnp.finfo(scores[0].dtype).bits
    while low:
        low = max(0, low - _DIGIT)
        for i, x in enumerate(scores):
            found[i] = (*found[i], _digit(x, low + wait, found[i], cut))
        digit, need, inside = _find_digit([d[-1] for d in found], need, inside, axes)
        cut = Cut((*cut.digits, digit), need, need < inside)
    return found, cut


def _zero(number: Array) -> Array:
    """0, which XLA cannot know: no count is negative.

    What is made with it waits for the count, and its memory can serve others before.
    """
    return jnp.minimum(number, jnp.zeros_like(number))


def _digit(x: Array, low: Array, higher: Digits, cut: Cut) -> Array:
    """Bits `low` to `low + 16` of the keys; 0 where higher ones are not those of `cut`.

    What is 0 for that reason never counts: a candidate has at least one bit.
    """
    key = ordered_keys(x)
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
    digits: Sequence[Array], need: Array, inside: Array, axes: Competing
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
        counted = sum(counts[1:], start=counts[0])
        accept = counted >= need
        # The last candidate that was refused is the digit's successor.
        return (
            jnp.where(accept, candidate, digit),
            jnp.where(accept, counted, reach),
            jnp.where(accept, above, counted),
        )

    start = jnp.zeros(need.shape, jnp.uint16), inside, jnp.zeros_like(inside)
    digit, reach, above = lax.fori_loop(0, _DIGIT, try_bit, start)
    return digit, need - above, reach - above


# Ties. XLA makes and stores in front of a loop what does not depend on its turn. Flags
# and positions of all weights would cost more than the whole search, also where it
# makes no turn; so they are tied to it (`now`, `after`) and fuse into the pass.


def _tie_ends(digits: Sequence[Digits], cut: Cut) -> list[Array]:
    """For each array the position before which ties are kept, `cut.need` in all.

    Two passes, and none where no tie is cut: one counts the ties of each row (the last
    axis), from which follows the row in which the last one is kept; one takes this row
    out.
    """

    def find(turn: Array, ends: list[Array]) -> list[Array]:
        need, found = cut.need, []
        for own, end in zip(after(turn, digits), ends, strict=True):
            # One array after the other: each waits for the `need` that is left.
            wait = _zero(need).astype(jnp.uint16)
            here_cut = cut._replace(digits=tuple(d + wait for d in cut.digits))
            tied = jnp.atleast_1d(_compare(own, here_cut)[1])
            narrow = jnp.int16 if tied.shape[-1] < 2**15 else need.dtype
            rows = jnp.sum(tied, axis=-1, dtype=narrow).astype(need.dtype)
            here = jnp.minimum(need, jnp.sum(rows, dtype=need.dtype))
            row, left = _place(rows, here)
            chosen = (tied & (_positions(rows)[..., None] == row)).astype(jnp.uint8)
            columns = jnp.max(chosen, axis=tuple(range(tied.ndim - 1)), initial=0)
            column, _ = _place(columns.astype(need.dtype), left)
            last = row.astype(end.dtype) * tied.shape[-1] + column.astype(end.dtype)
            found.append(jnp.where(here > 0, last + 1, jnp.zeros_like(end)))
            need = need - here
        return found

    ends = [jnp.asarray(d[0].size, count_dtype(d[0].size)) for d in digits]
    return lax.fori_loop(0, cut.partly.astype(jnp.int32), find, ends)


def _place(counts: Array, need: Array) -> tuple[Array, Array]:
    """Where the `need`-th of things counted in order lies, and its number in there."""
    position = _positions(counts)

    def before(end: Array) -> Array:
        inside = jnp.where(position < end, counts, jnp.zeros((), counts.dtype))
        return jnp.sum(inside, dtype=counts.dtype)

    end = _smallest(lambda end: before(end) >= need, position.dtype, counts.size)
    place = jnp.maximum(end - 1, jnp.zeros_like(end))
    return place, need - before(place)


def _tie_ends_of_groups(digits: Digits, cut: Cut, axes: tuple[int, ...]) -> Array:
    """For each group the position along `axes` before which ties are kept."""
    shape = digits[0].shape

    def enough(end: Array) -> Array:
        _, tied = _compare(after(end, digits), cut)
        tied = tied & (_positions(tied, axes, now=end) < end)
        return count(tied, axes, cut.need.dtype) >= cut.need

    size = math.prod(shape[a] for a in axes)
    start = jnp.where(cut.partly, jnp.zeros_like(cut.need), size)
    return _smallest(enough, count_dtype(math.prod(shape)), size, start=start)


def _smallest(
    enough: Callable[[Array], Array], dtype, most: int, *, start: Array | None = None
) -> Array:
    """The smallest number from `start` to `most` of which `enough` says True."""
    low = jnp.zeros((), dtype) if start is None else start.astype(dtype)

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        yes = enough(middle)
        return jnp.where(yes, low, middle + 1), jnp.where(yes, middle, high)

    bounds = (low, jnp.full_like(low, most))
    return lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, bounds)[0]


def _positions(x: Array, axes: Competing = None, *, now: Array | None = None) -> Array:
    """The row-major position of every entry among those along `axes`."""
    axes = tuple(range(x.ndim)) if axes is None else axes
    dtype = count_dtype(x.size)
    position = jnp.zeros(x.shape, dtype)
    stride = jnp.ones((), dtype) if now is None else after(now, jnp.ones((), dtype))
    for axis in sorted(axes, reverse=True):
        position = position + stride * lax.broadcasted_iota(dtype, x.shape, axis)
        stride = stride * x.shape[axis]
    return position
