"""The exact top-k masks of many small arrays by one loop.

The search of `_threshold` is unrolled over arrays, and XLA compiles some loops for each
of them: most of the time that a training step with many kernels takes to compile. Here
one loop runs over the arrays and brings them into a buffer of rows in turn. What is
compiled for each shape is how it gets there, and its mask. That takes a copy of what it
reads; so it is for arrays that are small.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._checks import is_concrete
from jaxsparse._loops import after
from jaxsparse._sharded import manual_axes
from jaxsparse._typing import Array
from jaxsparse.patterns._counts import count_dtype
from jaxsparse.patterns._threshold import ordered_keys, positions

_ROW = 4096
_DIGIT = 16  # bits
_TOGETHER = 2**20  # weights
_SMALL = 2**16  # weights: a buffer of that size is filled in no time


def together(arrays: Sequence[Array], units: Sequence[Any]) -> list[list[int]]:
    """Which arrays may share a loop: small ones, on one device, of similar size.

    Args:
      arrays: whole arrays or shards.
      units: what competes in each, with a shape and a dtype.

    Returns:
      Lists of at least two indices into `arrays`.
    """
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
        if sum(units[j].size for j in own[-1]) + unit.size > _TOGETHER:
            own.append([])
        own[-1].append(i)
    return [group for own in found.values() for group in own if len(group) > 1]


def top_k_masks_of_each(scores: Sequence[Array], keep: Sequence[Array]) -> list[Array]:
    """Masks of the largest scores of each array.

    Args:
      scores: floating-point arrays of one dtype, on one device.
      keep: how many stay of each, integers that may be traced.

    Returns:
      Bool arrays like `scores`. Among equal scores the one with the lower flat index
      comes first.
    """
    scores = lax.stop_gradient(list(scores))
    if jnp.finfo(scores[0].dtype).bits < _DIGIT:
        scores = [x.astype(jnp.float32) for x in scores]  # which has the same order
    rows = [-(-x.size // _ROW) for x in scores]
    most = max(rows)
    dtype = count_dtype(most * _ROW)
    bits = jnp.finfo(scores[0].dtype).bits
    keys = jnp.dtype(f"uint{bits}")
    filled = np.asarray(rows, np.int32)
    nth = functools.partial(_nth, rows=most)

    def one(turn: Array, queue: Any) -> Any:
        arrays = after(turn, scores)
        (_, need, inside), *rest = queue

        def digit(i: Array, carry: Any) -> Any:
            higher, need, inside = carry
            low = (bits - _DIGIT * (i + 1)).astype(keys)
            buffer = nth(turn, arrays, lambda x: _digits(ordered_keys(x), low, higher))
            found = _find_digit(buffer, need, inside, jnp.asarray(filled)[turn])
            return (higher << _DIGIT) | found[0].astype(keys), *found[1:]

        start = jnp.zeros((), keys), need, inside
        cut, need, inside = lax.fori_loop(0, bits // _DIGIT, digit, start)

        def tie(_: Array, end: Array) -> Array:
            tied = lambda x: (ordered_keys(x) == cut).astype(jnp.uint8)
            return _end_of_ties(nth(turn, after(end, arrays), tied), need)

        partly = (need < inside).astype(jnp.int32)
        end = lax.fori_loop(0, partly, tie, jnp.full_like(need, most * _ROW))
        return *rest, (cut, end, inside)

    # A queue of scalars, in which each array's results take the place of what it waited
    # with. In a vector each would have its index, and XLA would make a function for
    # every mask; so it makes one for every shape.
    queue = tuple(
        (jnp.zeros((), keys), jnp.asarray(k, dtype), jnp.full((), x.size, dtype))
        for x, k in zip(scores, keep, strict=True)
    )
    found = lax.fori_loop(0, len(scores), one, queue)
    masks = []
    for x, (cut, end, _) in zip(scores, found, strict=True):
        key = ordered_keys(x)
        before = positions(x, now=end) < end
        masks.append((key > cut) | ((key == cut) & before))
    return masks


def _digits(keys: Array, low: Array, higher: Array) -> Array:
    """Bits `low` to `low + 16`; 0, which never counts, where those above are others.

    A key that is shifted by its width or more is 0, and so is `higher` then.
    """
    high = lax.shift_right_logical(keys, low)
    rest = lax.shift_right_logical(high, jnp.asarray(_DIGIT, keys.dtype))
    digit = high.astype(jnp.uint16)
    return jnp.where(rest == higher, digit, jnp.zeros_like(digit))


def _nth(
    i: Array, arrays: Sequence[Array], f: Callable[[Array], Array], *, rows: int
) -> Array:
    """`f` of the i-th array, in rows, with zeros behind it."""

    def branch(k: int) -> Callable[[list[Array]], Array]:
        def fill(arrays: list[Array]) -> Array:
            flat = f(arrays[k]).reshape(-1)
            return jnp.pad(flat, (0, rows * _ROW - flat.size)).reshape(rows, _ROW)

        return fill

    return lax.switch(i, [branch(k) for k in range(len(arrays))], list(arrays))


def _find_digit(
    buffer: Array, need: Array, inside: Array, filled: Array
) -> tuple[Array, Array, Array]:
    """The largest digit that `need` of the `inside` digits reach, from its highest bit.

    Gives the digit, how many of those that have it are still needed, and how many have
    it.
    """

    def try_bit(i: Array, carry: Any) -> Any:
        digit, reach, above = carry
        bit = jnp.asarray(_DIGIT - 1 - i, jnp.uint16)
        candidate = digit | (jnp.ones((), jnp.uint16) << bit)
        counted = _count(buffer, candidate, filled, need.dtype)
        accept = counted >= need
        # The last candidate that was refused is the digit's successor.
        return (
            jnp.where(accept, candidate, digit),
            jnp.where(accept, counted, reach),
            jnp.where(accept, above, counted),
        )

    start = jnp.zeros((), jnp.uint16), inside, jnp.zeros_like(inside)
    digit, reach, above = lax.fori_loop(0, _DIGIT, try_bit, start)
    return digit, need - above, reach - above


def _count(buffer: Array, candidate: Array, filled: Array, dtype: Any) -> Array:
    """How many digits are at least `candidate`; those behind the filled rows are 0."""

    def by_rows(buffer: Array, candidate: Array, filled: Array) -> Array:
        def add(i: Array, sums: Array) -> Array:
            row = lax.dynamic_index_in_dim(buffer, i, keepdims=False)
            return sums + (row >= candidate).astype(jnp.int16)

        zeros = jnp.zeros((_ROW,), jnp.int16)
        sums = lax.fori_loop(jnp.zeros_like(filled), filled, add, zeros)
        return jnp.sum(sums, dtype=dtype)

    def reduced(buffer: Array, candidate: Array, filled: Array) -> Array:
        del filled
        return jnp.sum(buffer >= candidate, dtype=dtype)

    return lax.platform_dependent(
        buffer, candidate, filled, cpu=by_rows, default=reduced
    )


def _end_of_ties(flags: Array, need: Array) -> Array:
    """The position before which `need` flags lie, of 0s and 1s in rows."""
    counts = jnp.sum(flags, axis=1, dtype=jnp.float32).astype(need.dtype)
    row, left = _place(counts, need)
    chosen = lax.dynamic_index_in_dim(flags, row, keepdims=False)
    column, _ = _place(chosen.astype(need.dtype), left)
    end = row * _ROW + column + 1
    return jnp.where(need > 0, end, jnp.zeros_like(end))


def _place(counts: Array, need: Array) -> tuple[Array, Array]:
    """Where the `need`-th of things counted in order lies, and its number in there."""
    n = len(counts)
    position = lax.iota(need.dtype, n)

    def before(end: Array) -> Array:
        inside = jnp.where(position < end, counts, jnp.zeros_like(counts))
        return jnp.sum(inside, dtype=counts.dtype)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        yes = before(middle) >= need
        return jnp.where(yes, low, middle + 1), jnp.where(yes, middle, high)

    bounds = jnp.zeros_like(need), jnp.full_like(need, n)
    _, end = lax.fori_loop(0, n.bit_length(), halve, bounds)
    place = jnp.maximum(end - 1, jnp.zeros_like(end))
    return place, need - before(place)
