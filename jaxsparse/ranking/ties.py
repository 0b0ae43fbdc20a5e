"""Equal scores: which of them stay, where only some of them do.

XLA makes and stores in front of a loop what does not depend on its turn. Flags and
positions of all weights would cost more than the whole search, also where it makes no
turn; so they are tied to it (`now`, `after`) and fuse into the pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import count_dtype
from jaxsparse._loops import after
from jaxsparse._typing import Array
from jaxsparse.ranking.counting import count
from jaxsparse.ranking.keys import positions
from jaxsparse.ranking.search import Cut
from jaxsparse.ranking.shards import Split, names_along, pieces, total

_LANES = 512

KeyOf = Callable[[Any], Array]


def tie_ends(
    arrays: Sequence[Any], keys_of: Sequence[KeyOf], cut: Cut, splits: Sequence[Split]
) -> list[Array]:
    """For each array the position before which ties are kept, `cut.need` in all.

    Two passes, and none where no tie is cut: one counts the ties of each row (the last
    axis), from which follows the row in which the last one is kept; one takes this row
    out. Where an array is split over devices the position is searched for.
    """
    names = [names_along(split, None) for split in splits]

    def find(turn: Array, ends: list[Array]) -> list[Array]:
        need, found = cut.need, []
        for i, x in enumerate(after(turn, list(arrays))):
            # One array after the other: each waits for the `need` that is left.
            low = cut.low + jnp.minimum(need, 0).astype(cut.low.dtype)
            tied, end = jnp.atleast_1d(keys_of[i](x) == low), ends[i]
            if names[i]:
                inside, end = _tie_end_of_shards(tied, need, splits[i], end)
                found.append(end)
                need = need - inside
                continue
            narrow = jnp.int16 if tied.shape[-1] < 2**15 else need.dtype
            rows = jnp.sum(tied, axis=-1, dtype=narrow).astype(need.dtype)
            here = jnp.minimum(need, jnp.sum(rows, dtype=need.dtype))
            row, left = place(rows, here)
            chosen = tied & (positions(rows)[..., None] == row)
            columns = jnp.max(
                chosen.astype(jnp.uint8), axis=tuple(range(tied.ndim - 1)), initial=0
            )
            column, _ = place(columns.astype(need.dtype), left)
            last = row.astype(end.dtype) * tied.shape[-1] + column.astype(end.dtype)
            found.append(jnp.where(here > 0, last + 1, jnp.zeros_like(end)))
            need = need - here
        return found

    keys = [jax.eval_shape(f, x) for f, x in zip(keys_of, arrays, strict=True)]
    sizes = [k.size * pieces(n) for k, n in zip(keys, names, strict=True)]
    ends = [jnp.full_like(cut.need, n, dtype=count_dtype(n)) for n in sizes]
    partly = cut.need < cut.inside
    return lax.fori_loop(0, partly.astype(jnp.int32), find, ends)


def tie_ends_of_groups(
    x: Any, key_of: KeyOf, cut: Cut, axes: tuple[int, ...], split: Split
) -> Array:
    """For each group the position along `axes` before which ties are kept."""
    shape, names = jax.eval_shape(key_of, x).shape, names_along(split, axes)
    size = math.prod(shape[a] for a in axes) * pieces(names)
    partly = cut.need < cut.inside
    if len(shape) == 2 and axes == (1,) and not names and size % _LANES == 0:
        return _tie_ends_of_rows(x, key_of, cut, size)

    def enough(end: Array) -> Array:
        tied = key_of(after(end, x)) == cut.low
        tied = tied & (positions(tied, axes, split, now=end) < end)
        return total([count(tied, axes, cut.need.dtype)], [names]) >= cut.need

    start = jnp.where(partly, jnp.zeros_like(cut.need), size)
    return _smallest(enough, size, start=start)


def _tie_ends_of_rows(x: Any, key_of: KeyOf, cut: Cut, size: int) -> Array:
    """`tie_ends` for groups that are the rows of a matrix."""
    partly = cut.need < cut.inside

    def find(turn: Array, end: Array) -> Array:
        tied = (key_of(after(turn, x)) == cut.low).reshape(len(end), -1, _LANES)
        rows = count(tied, (2,), end.dtype)[..., 0]
        row, left = place(rows, cut.need, (1,))
        chosen = tied & (
            lax.broadcasted_iota(row.dtype, tied.shape, 1) == row[..., None]
        )
        columns = jnp.max(chosen.astype(jnp.uint8), axis=1, initial=0)
        column, _ = place(columns.astype(end.dtype), left, (1,))
        last = jnp.where(cut.need > 0, row * _LANES + column + 1, jnp.zeros_like(end))
        return jnp.where(partly, last, end)

    some = jnp.any(partly).astype(jnp.int32)
    return lax.fori_loop(0, some, find, jnp.full_like(cut.need, size))


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


def place(
    counts: Array, need: Array, axes: tuple[int, ...] | None = None
) -> tuple[Array, Array]:
    """Where the `need`-th of things counted in order lies, and its number in there."""
    position = positions(counts, axes)
    keep = axes is not None

    def halve(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, before = state
        middle = low + (high - low) // 2
        inside = jnp.where(position <= middle, counts, jnp.zeros((), counts.dtype))
        reached = jnp.sum(inside, axis=axes, dtype=counts.dtype, keepdims=keep)
        yes = reached >= need
        low = jnp.where(yes, low, middle + 1)
        return low, jnp.where(yes, middle, high), jnp.where(yes, before, reached)

    last = max(0, counts.size // max(1, need.size) - 1)
    zero = jnp.zeros_like(need, position.dtype)
    start = zero, jnp.full_like(zero, last), jnp.zeros_like(need, counts.dtype)
    state = lax.while_loop(lambda s: jnp.any(s[0] < s[1]), halve, start)
    place, _, before = state
    return place, need - before


def _smallest(enough: Callable[[Array], Array], most: int, *, start: Array) -> Array:
    """The smallest number from `start` to `most` of which `enough` says True."""

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        yes = enough(middle)
        return jnp.where(yes, low, middle + 1), jnp.where(yes, middle, high)

    bounds = (start, jnp.full_like(start, most))
    return lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, bounds)[0]
