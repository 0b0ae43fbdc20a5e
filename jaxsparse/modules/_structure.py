"""Random balanced tiles: which inputs each group of outputs reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.formats import Tiles
from jaxsparse.patterns import Balanced, removed_count
from jaxsparse.tree import Axes, matrix_view


class Shape(NamedTuple):
    """The sizes of a layer with balanced tiles.

    Attributes:
      d_in: inputs.
      d_out: outputs.
      tile: inputs and outputs of a tile.
      kept: tiles of each group of outputs.
    """

    d_in: int
    d_out: int
    tile: tuple[int, int]
    kept: int

    @property
    def groups(self) -> int:
        """The groups of outputs."""
        return self.d_out // self.tile[1]

    @property
    def values(self) -> tuple[int, ...]:
        """The shape of the values."""
        return (self.groups, self.kept, *self.tile)


def shape_of(d_in: Any, d_out: Any, sparsity: Any, pattern: Any) -> Shape:
    """The sizes of a layer, checked."""
    _checks.check_positive_int(d_in, name="in_features")
    _checks.check_positive_int(d_out, name="out_features")
    _checks.check_sparsity(sparsity)
    if not isinstance(pattern, Balanced):
        raise TypeError(
            f"pattern must be js.Balanced((1, 128)) or another of its kind, got "
            f"{_checks.shown(pattern)}."
        )
    for side, size, name in zip(
        pattern.shape, (d_in, d_out), ("inputs", "outputs"), strict=True
    ):
        if size % side:
            raise ValueError(
                f"{pattern} needs a number of {name} that {side} divides, got {size}."
            )
    tiles = d_in // pattern.shape[0]
    kept = max(1, tiles - int(removed_count(sparsity, tiles)))
    return Shape(d_in, d_out, pattern.shape, kept)


def random_rows(key: Array, shape: Shape) -> Array:
    """For each group of outputs which tiles of inputs it reads, ascending."""
    tiles = shape.d_in // shape.tile[0]
    drawn = jax.random.uniform(key, (shape.groups, tiles))
    chosen = jnp.argsort(drawn, axis=1)[:, : shape.kept]
    return jnp.sort(chosen, axis=1).astype(jnp.uint16 if tiles <= 2**16 else jnp.uint32)


def initial_values(init: Any, key: Array, shape: Shape, dtype: Any) -> Array:
    """Values by an initializer, which sees what an output reads as its inputs."""
    inputs = shape.kept * shape.tile[0]
    draw = lambda key: init(key, (inputs, shape.tile[1]), dtype)
    values = jax.vmap(draw)(jax.random.split(key, shape.groups))
    return values.reshape(shape.values)


def tiles_of(shape: Shape, values: Array, rows: Array) -> Tiles:
    """The packed kernel."""
    view = matrix_view((shape.d_in, shape.d_out), Axes((0,), (1,)))
    return Tiles(values, rows, None, shape.tile, shape.kept, view)
