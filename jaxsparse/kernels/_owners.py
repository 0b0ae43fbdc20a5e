"""Whose a stored tile is: what kernels that take tile after tile need to know."""

import jax.numpy as jnp

from jaxsparse._typing import Array
from jaxsparse.formats import Tiles


def spans(packed: Tiles) -> tuple[Array, Array]:
    """Where among one layer's stored tiles each group begins and ends, `[groups]`."""
    pieces, length = packed.rows.shape
    first = length * jnp.arange(pieces, dtype=jnp.int32)
    if packed.offsets is None:  # each group is a piece
        return first, first + length
    places = first[:, None] + packed.offsets.astype(jnp.int32)
    return places[:, :-1].reshape(-1), places[:, 1:].reshape(-1)


def owners(packed: Tiles) -> tuple[Array, Array, Array]:
    """The group of each stored tile, whether it is one, and which groups have some.

    Groups ascend. What is stored behind the last tile of a piece counts as the last
    group's, so that a program that goes through the tiles stays with it.
    """
    begin, end = spans(packed)
    slot = jnp.arange(packed.rows.size, dtype=jnp.int32)
    # Of groups that begin at one place only the last may have tiles.
    begun = jnp.zeros(slot.size + 1, jnp.int32).at[begin].add(1)
    group = jnp.cumsum(begun, dtype=jnp.int32)[:-1] - 1
    return group, slot < end[group], end > begin
