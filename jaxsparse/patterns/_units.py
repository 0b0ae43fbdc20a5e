"""From weights to the units of a pattern and back."""

import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.linalg.ordered_sums import ordered_mean
from jaxsparse.patterns._spec import Balanced, Block, Channel, Pattern
from jaxsparse.ranking.shards import Split, names_along, pieces
from jaxsparse.tree import Axes


def batch_axes(pattern: Pattern, ndim: int, axes: Axes | None) -> tuple[int, ...]:
    """The axes each of whose indices is a layer that competes on its own."""
    batch = () if axes is None else axes.batch
    if isinstance(pattern, Channel):
        return tuple(a for a in batch if a != pattern.axis % ndim)
    return batch


def channel_scores(
    path: str,
    scores: Array,
    pattern: Channel,
    axes: Axes | None = None,
    split: Split | None = None,
) -> Array:
    """Scores of the slices along `pattern.axis`."""
    if not -scores.ndim <= pattern.axis < scores.ndim:
        raise ValueError(
            f"{path}: {pattern} asks for axis {pattern.axis}, but the parameter has "
            f"shape {tuple(scores.shape)}."
        )
    whole = (pattern.axis % scores.ndim, *batch_axes(pattern, scores.ndim, axes))
    others = tuple(a for a in range(scores.ndim) if a not in whole)
    over = names_along(split, others) if split else ()
    if pattern.reduce == "mean":
        return ordered_mean(scores, others, over, pieces(over))
    most = jnp.max(scores, axis=others, keepdims=True)
    return lax.pmax(most, over) if over else most


def block_scores(
    path: str, scores: Array, pattern: Block | Balanced, axes: Axes
) -> Array:
    """Scores of the tiles."""
    sides = _sides(path, scores, pattern, axes)
    tiles, inner = scores, []
    # One axis at a time, from the last: explicitly sharded arrays allow no more.
    for axis in reversed(range(scores.ndim)):
        if sides[axis] > 1:
            tiles = _split(tiles, axis, sides[axis])
            inner = [axis + 1, *(a + 1 for a in inner)]
    if pattern.reduce == "max":
        return jnp.max(tiles, axis=tuple(inner))
    if jnp.finfo(tiles.dtype).bits < 32:
        tiles = tiles.astype(jnp.float32)  # rounded to 16 bits, means would tie
    # A tile lies on one device, or is brought there: its sum has one order.
    return jnp.mean(tiles, axis=tuple(inner))


def expand_blocks(units: Array, shape: tuple[int, ...]) -> Array:
    """Spreads one value a tile over the tile's weights."""
    for axis, (count, size) in enumerate(zip(units.shape, shape, strict=True)):
        if count != size:
            tiled = (
                *units.shape[:axis],
                count,
                size // count,
                *units.shape[axis + 1 :],
            )
            spread = jnp.broadcast_to(jnp.expand_dims(units, axis + 1), tiled)
            units = spread.reshape(*tiled[:axis], size, *tiled[axis + 2 :])
    return units


def _split(x: Array, axis: int, side: int) -> Array:
    shape = x.shape
    return x.reshape(*shape[:axis], shape[axis] // side, side, *shape[axis + 1 :])


def _sides(
    path: str, scores: Array, pattern: Block | Balanced, axes: Axes
) -> list[int]:
    """The tile's side on every axis; 1 where the tile does not reach."""
    sides = [1] * scores.ndim
    named = zip(
        (axes.input[-1], axes.output[-1]),
        pattern.shape,
        ("input", "output"),
        strict=True,
    )
    for axis, side, name in named:
        if scores.shape[axis] % side:
            raise ValueError(
                f"{path}: {pattern} needs an {name} axis that {side} divides, but "
                f"axis {axis} of shape {tuple(scores.shape)} is {scores.shape[axis]}. "
                "Choose another block, or leave this parameter out with `where`."
            )
        sides[axis] = side
    return sides
