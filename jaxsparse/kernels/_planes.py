"""Selecting from the planes of N:M kernels, within kernels for accelerators."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxsparse._typing import Array


def present(positions: Sequence[Array]) -> list[Array]:
    """Which planes have a value: a position that does not ascend ends a group."""
    first, *rest = positions
    there = [first <= rest[0] if rest else first >= 0]
    for before, own in zip(positions, rest, strict=False):
        there.append(there[-1] & (own > before))
    return there


def plane(
    place: int,
    positions: Sequence[Array],
    there: Sequence[Array],
    values: Sequence[Array],
) -> Array:
    """What stands at a place of each group, zeros where nothing does."""
    chosen = jnp.zeros(values[0].shape, values[0].dtype)
    for position, some, value in zip(positions, there, values, strict=True):
        chosen = jnp.where(some & (position == place), value, chosen)
    return chosen
