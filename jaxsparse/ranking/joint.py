"""The largest of all entries of many arrays, by one search for all of them.

What is compiled for each array is how its keys become codes, one byte each, and how
its mask is read off: the codes of all lie one array behind the other in one buffer,
which is searched, and in which ties are in order. So a search takes a byte an entry,
and not much longer to compile for many arrays than for one.

A code says more than a digit of `search`: 0 is below the interval, 255 at its end or
above it, and the others number its parts. It is in the order of the keys, so that
the codes of the last turn are all that the masks need.

What each array keeps at least takes three rounds of the same program: a search for the
best of all, and if an array has too few of them, one for the best of each array, and
one for the best of all behind those.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._dtypes import count_dtype
from jaxsparse._loops import after, when
from jaxsparse._platform import unknown
from jaxsparse._sharded import manual_axes
from jaxsparse._typing import Array
from jaxsparse.ranking.counting import count_reaching
from jaxsparse.ranking.search import near, shift_of
from jaxsparse.ranking.ties import place

_BITS = 8
_TOP = 2**_BITS - 1
_LANES = 512  # of a row, at least
_STRIP = 32  # lanes
_ROWS = 2**14  # about as many at most: what is done for each row takes no time then
_MOST = 2**31 - 2**24  # entries of one buffer

KeyOf = Callable[[Array], Array]


class _Layout(NamedTuple):
    """Where arrays lie in the buffer: each begins with a row."""

    sizes: tuple[int, ...]
    begins: tuple[int, ...]
    rows: int
    lanes: int

    @property
    def size(self) -> int:
        return self.rows * self.lanes

    def owners(self) -> np.ndarray:
        """The array to which each row belongs."""
        rows = np.diff([*self.begins, self.rows])
        return np.repeat(np.arange(len(rows), dtype=np.int32), rows)

    def reaching(
        self, codes: Array, least: Array, strips: Array | None = None
    ) -> Array:
        """How many codes of each row are at least what is given for its array.

        It goes through the rows in narrow strips, whose sums take little memory, and
        stops after so many of them.
        """
        rows = codes.reshape(self.rows, self.lanes)
        bound = least[self.owners()][:, None]
        in_all = self.lanes // _STRIP
        narrow = jnp.uint8 if in_all < 2**8 else jnp.int32

        def add(i: Array, sums: Array) -> Array:
            strip = lax.dynamic_slice_in_dim(rows, i * _STRIP, _STRIP, axis=1)
            return sums + (strip >= bound).astype(narrow)

        sums = jnp.zeros((self.rows, _STRIP), narrow)
        sums = lax.fori_loop(0, in_all if strips is None else strips, add, sums)
        return jnp.sum(sums, axis=1, dtype=jnp.int32)

    def sums(self, rows: Array) -> Array:
        """Sums of what is counted in rows, for each array."""
        number = np.arange(len(self.sizes), dtype=np.int32)[:, None]
        own = jnp.asarray(self.owners())[None] == number
        return jnp.sum(jnp.where(own, rows[None], 0), axis=1, dtype=rows.dtype)


class _Place(NamedTuple):
    """An array's number, and where it begins in the buffer; see `unknown`."""

    number: Array
    begin: Array


class _Cut(NamedTuple):
    """Where to cut, for each array; the same for all where they compete.

    Attributes:
      low: the lowest key of an interval in which the last one kept is.
      width: the highest one of it less `low`.
      code: the code of those in it.
      above: how many keys are above it.
      reach: how many are in it or above it.
    """

    low: Array
    width: Array
    code: Array
    above: Array
    reach: Array


class _First(NamedTuple):
    """For each array, what comes before all others: see `threshold.First`."""

    low: Array
    end: Array


def fits(arrays: Sequence[Array], layers: Sequence[tuple[int, ...]]) -> bool:
    """Whether arrays can be searched together: on one device, each of them a layer."""
    sizes = [x.size for x in arrays]
    alone = not manual_axes() and all(jax.typeof(x).sharding.mesh.empty for x in arrays)
    whole = all(len(axes) == x.ndim for x, axes in zip(arrays, layers, strict=True))
    return alone and whole and 0 < sum(sizes) < _MOST


def joint_masks(
    arrays: Sequence[Array], key_of: KeyOf, keep: Array, least: Sequence[int]
) -> list[Array]:
    """Masks of the `keep` largest keys of all, and of the `least` largest of each."""
    sizes = tuple(x.size for x in arrays)
    layout = _lay_out(sizes)
    dtype = count_dtype(layout.size)
    n = len(arrays)
    keep = jnp.asarray(keep, dtype)
    most = np.asarray(least, dtype)
    key = jax.eval_shape(key_of, arrays[0]).dtype
    zero = jnp.zeros((n,), key)
    start = _start(arrays, key_of, keep, sum(sizes), zero)
    nothing = _First(~zero, jnp.zeros((n,), dtype))
    codes = jnp.zeros((layout.size,), jnp.uint8)
    begins = [row * layout.lanes for row in layout.begins]
    hidden = unknown(keep, [*range(n), *begins], dtype)
    places = list(map(_Place, hidden[:n], hidden[n:]))

    def one_round(state: Any, arrays: list[Array], keep: Array) -> Any:
        number, codes, _, start, first = state
        each = number == 1
        need = jnp.where(number == 0, keep, jnp.maximum(keep, most.sum(dtype=dtype)))
        need = jnp.where(each, most, need)
        write = functools.partial(_write_codes, arrays, key_of, places, first)
        codes, cut = _search(layout, write, codes, need, each, start)
        codes, ends = _without_ties(layout, codes, cut, need, each)
        short = (number == 0) & _is_short(layout, codes, cut.code, least)
        found = _First(cut.low, jnp.maximum(ends - np.asarray(begins, dtype), 0))
        found = jax.tree.map(lambda a, b: jnp.where(most > 0, a, b), found, nothing)
        first = jax.tree.map(lambda a, b: jnp.where(each, a, b), found, first)
        after_it = jnp.where((number == 0) & ~short, 3, number + 1)
        whole = zero, shift_of(~zero)
        return after_it, codes, cut.code, whole, first

    code = jnp.zeros((n,), jnp.uint8)
    state = jnp.zeros((), jnp.int32), codes, code, start, nothing
    turn = lambda s: one_round(s, after(s[0], list(arrays)), keep)
    if any(least):
        state = lax.while_loop(lambda s: s[0] < 3, turn, state)
    else:
        state = one_round(state, list(arrays), keep)
    _, codes, code, *_ = state
    return [
        _kept(codes, code, at, x.size).reshape(x.shape)
        for x, at in zip(arrays, places, strict=True)
    ]


def _lay_out(sizes: tuple[int, ...]) -> _Layout:
    lanes = max(_LANES, 2 ** math.ceil(math.log2(max(1, sum(sizes) / _ROWS))))
    rows = [-(-size // lanes) for size in sizes]
    begins = np.cumsum([0, *rows[:-1]]).tolist()
    return _Layout(sizes, tuple(begins), sum(rows), lanes)


def _start(
    arrays: Sequence[Array], key_of: KeyOf, keep: Array, size: int, zero: Array
) -> tuple[Array, Array]:
    """The lowest key of the first interval, and how many bits a part of it has."""
    found = near(arrays, [key_of] * len(arrays), keep, size)
    if found is None:
        return zero, shift_of(~zero)
    low, shift = found
    return jnp.broadcast_to(low, zero.shape), shift


def _search(
    layout: _Layout,
    write: Callable[[Array, Array, Array], Array],
    codes: Array,
    need: Array,
    each: Array,
    start: tuple[Array, Array],
) -> tuple[Array, _Cut]:
    """The cut, and codes that it is among."""
    dtype = need.dtype
    sizes = np.asarray(layout.sizes, dtype)
    size = jnp.where(each, sizes, sizes.sum(dtype=dtype))
    low, shift = start
    zero = jnp.zeros_like(need)
    cut = _Cut(low, ~low, jnp.zeros(low.shape, jnp.uint8), zero, size)

    def turn(state: tuple[Array, _Cut, Array]) -> tuple[Array, _Cut, Array]:
        codes, cut, shift = state
        codes = write(codes, cut.low, shift)
        found = _find_code(layout, codes, cut, need, size, each)
        return codes, *_within(cut, shift, *found)

    def unfinished(state: tuple[Array, _Cut, Array]) -> Array:
        _, cut, _ = state
        # Of the outer codes, keys that are no part of the interval have them too.
        parts = (cut.width > 0) | (cut.code == 0) | (cut.code == _TOP)
        return jnp.any((cut.reach != need) & parts)

    codes, cut, _ = lax.while_loop(unfinished, turn, (codes, cut, shift))
    return codes, cut


def _write_codes(
    arrays: Sequence[Array],
    key_of: KeyOf,
    places: Sequence[_Place],
    first: _First,
    codes: Array,
    low: Array,
    shift: Array,
) -> Array:
    """The codes of all keys, array by array."""
    top = jnp.asarray(_TOP, low.dtype)
    arrays, first = after(low, (list(arrays), first))
    for x, at in zip(arrays, places, strict=True):
        if not x.size:
            continue
        key = key_of(x).reshape(-1)
        least, ahead, end = (_of(at, n) for n in (low, *first))
        part = jnp.minimum((key - least) >> shift, top - 1)
        code = jnp.where(key < least, jnp.zeros_like(part), part + 1)
        before = lax.iota(end.dtype, key.size) < end
        code = jnp.where((key > ahead) | ((key == ahead) & before), top, code)
        code = code.astype(jnp.uint8)
        codes = lax.dynamic_update_slice(codes, code, (at.begin,))
    return codes


def _of(at: _Place, numbers: Array) -> Array:
    """The number of an array among those of all."""
    return lax.dynamic_slice(numbers, (at.number,), (1,))


def _find_code(
    layout: _Layout, codes: Array, cut: _Cut, need: Array, size: Array, each: Array
) -> tuple[Array, Array, Array]:
    """The largest code that as many as are needed reach, from its highest bit.

    Gives the code, how many reach it, and how many are above the interval it stands
    for.
    """

    def in_all(zero: Array, codes: Array, candidate: Array) -> Array:
        return zero + count_reaching(codes, candidate[0], None, zero.dtype)

    def in_each(zero: Array, codes: Array, candidate: Array) -> Array:
        return zero + layout.sums(layout.reaching(codes, candidate))

    def try_bit(i: Array, carry: tuple[Array, Array, Array]):
        code, reach, above = carry
        bit = jnp.asarray(_BITS - 1 - i, jnp.uint8)
        candidate = code | (jnp.ones((), jnp.uint8) << bit)
        counted = when(~each, in_all, jnp.zeros_like(need), codes, candidate)
        counted = when(each, in_each, counted, codes, candidate)
        accept = counted >= need
        # The last candidate that was refused is the code's successor.
        return (
            jnp.where(accept, candidate, code),
            jnp.where(accept, counted, reach),
            jnp.where(accept, above, counted),
        )

    start = jnp.zeros(need.shape, jnp.uint8), size, cut.above
    return lax.fori_loop(0, _BITS, try_bit, start)


def _within(
    cut: _Cut, shift: Array, code: Array, reach: Array, above: Array
) -> tuple[_Cut, Array]:
    """The interval that a code stands for, and the shift for parts of it."""
    one = jnp.ones((), cut.low.dtype)
    below, top = code == 0, code == _TOP
    low = cut.low + ((code.astype(cut.low.dtype) - one) << shift)
    rest = cut.width - jnp.minimum(cut.width, (one * (_TOP - 1)) << shift)
    width = jnp.where(top, rest, (one << shift) - one)
    # A sample may have been wrong.
    low = jnp.where(below, jnp.zeros_like(low), low)
    width = jnp.where(below, cut.low - one, width)
    return _Cut(low, width, code, above, reach), shift_of(width)


def _without_ties(
    layout: _Layout, codes: Array, cut: _Cut, need: Array, each: Array
) -> tuple[Array, Array]:
    """Codes of which all that reach the cut's are kept.

    Ties that are too many get the code 0. The other result is the position in the
    buffer from which on they are.
    """

    def find(state: tuple[Array, Array], cut: _Cut) -> tuple[Array, Array]:
        codes, ends = state
        rows = codes.reshape(layout.rows, layout.lanes)
        owners = layout.owners()
        tied = layout.reaching(codes, cut.code) - layout.reaching(codes, cut.code + 1)
        longest = max(rows.shape)  # of one length, they share their kernels
        place_in = lambda x, need: place(jnp.pad(x, (0, longest - x.size)), need)

        def one(i: Array, ends: Array) -> Array:
            own = jnp.where((owners == i) | ~each, tied, 0)
            row, left = place_in(own, need[i] - cut.above[i])
            line = lax.dynamic_slice_in_dim(rows, row, 1)[0] == cut.code[i]
            column, _ = place_in(line.astype(need.dtype), left)
            end = row.astype(ends.dtype) * layout.lanes + column.astype(ends.dtype) + 1
            mine = (jnp.arange(len(ends)) == i) & (cut.reach > need)
            return jnp.where(mine | ~each, end, ends)

        ends = lax.fori_loop(0, jnp.where(each, len(need), 1), one, ends)
        # As flat as the codes are, so that they are changed where they lie.
        spread = lambda x: jnp.broadcast_to(x[:, None], rows.shape).reshape(-1)
        behind = lax.iota(ends.dtype, layout.size) >= spread(ends[owners])
        gone = (codes == spread(cut.code[owners])) & behind
        return jnp.where(gone, jnp.zeros((), jnp.uint8), codes), ends

    ends = jnp.full_like(need, layout.size)
    return when(jnp.any(cut.reach > need), find, (codes, ends), cut)


def _is_short(
    layout: _Layout, codes: Array, code: Array, least: Sequence[int]
) -> Array:
    """Whether an array keeps fewer than it has to, where all compete."""
    # Mostly the first strip has enough of each.
    turns = np.asarray([1, layout.lanes // _STRIP], np.int32)

    def look(state: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, _ = state
        strips = jnp.asarray(turns)[turn]
        found = layout.sums(layout.reaching(codes, code, strips))
        return turn + 1, jnp.any(found < np.asarray(least, found.dtype))

    start = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    return lax.while_loop(lambda s: (s[0] < 2) & s[1], look, start)[1]


def _kept(codes: Array, code: Array, at: _Place, size: int) -> Array:
    """The mask of an array, flat."""
    own = lax.dynamic_slice(codes, (at.begin,), (size,))
    return own >= _of(at, code)
