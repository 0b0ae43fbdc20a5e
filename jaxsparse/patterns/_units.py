"""From weights to the units of a pattern and back."""

import jax.numpy as jnp

from jaxsparse._typing import Array
from jaxsparse.patterns._spec import Block, Channel, Reduce
from jaxsparse.tree import Axes


def channel_scores(path: str, scores: Array, pattern: Channel) -> Array:
    """Scores of the slices along `pattern.axis`.

    Args:
      path: the parameter's path, for the message.
      scores: one score a weight.
      pattern: which axis, and how to reduce.

    Returns:
      An array with size 1 on every other axis; it broadcasts to the parameter.

    Raises:
      ValueError: the parameter has no such axis.
    """
    if not -scores.ndim <= pattern.axis < scores.ndim:
        raise ValueError(
            f"{path}: {pattern} asks for axis {pattern.axis}, but the parameter has "
            f"shape {tuple(scores.shape)}."
        )
    others = tuple(a for a in range(scores.ndim) if a != pattern.axis % scores.ndim)
    return _reduce(scores, others, pattern.reduce)


def block_scores(path: str, scores: Array, pattern: Block, axes: Axes) -> Array:
    """Scores of the tiles.

    Args:
      path: the parameter's path, for the message.
      scores: one score a weight.
      pattern: the tile's shape, and how to reduce.
      axes: the kernel's axes, counted from the front.

    Returns:
      An array in which the last input and the last output axis are shorter by the
      tile's sides.

    Raises:
      ValueError: a tile's side does not divide its axis.
    """
    split, inner = [], []
    for axis, (size, side) in enumerate(_sides(path, scores, pattern, axes)):
        split += [size // side, side]
        inner.append(2 * axis + 1)
    return _reduce(scores.reshape(split), tuple(inner), pattern.reduce, keepdims=False)


def expand_blocks(units: Array, shape: tuple[int, ...]) -> Array:
    """Spreads one value a tile over the tile's weights.

    Args:
      units: one value a tile.
      shape: the parameter's shape.

    Returns:
      An array of that shape.
    """
    fine, tiled = [], []
    for count, size in zip(units.shape, shape, strict=True):
        fine += [count, 1]
        tiled += [count, size // count]
    return jnp.broadcast_to(units.reshape(fine), tiled).reshape(shape)


def _sides(path: str, scores: Array, pattern: Block, axes: Axes):
    """(size, tile side) of every axis; 1 where the tile does not reach."""
    sides = [1] * scores.ndim
    for axis, side, name in zip(
        (axes.input[-1], axes.output[-1]),
        pattern.shape,
        ("input", "output"),
        strict=True,
    ):
        if scores.shape[axis] % side:
            raise ValueError(
                f"{path}: {pattern} needs an {name} axis that {side} divides, but "
                f"axis {axis} of shape {tuple(scores.shape)} is {scores.shape[axis]}. "
                "Choose another block, or leave this parameter out with `where`."
            )
        sides[axis] = side
    return list(zip(scores.shape, sides, strict=True))


def _reduce(x: Array, axes, how: Reduce, *, keepdims: bool = True) -> Array:
    reduce = jnp.mean if how == "mean" else jnp.max
    return reduce(x, axis=axes, keepdims=keepdims)
