"""`Tiles`: kept tiles of inputs and outputs, and where each lies among the inputs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array
from jaxsparse.formats._weight import (
    Weight,
    index_type,
    placed,
    row_of_each,
    rows_of,
    taken,
)
from jaxsparse.patterns import Balanced, Block
from jaxsparse.tree import MatrixView

Tiling = Block | Balanced


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "rows", "offsets"],
    meta_fields=["tile", "most", "view"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """A kernel as its kept tiles of `a` inputs and `v` outputs.

    The `v` outputs of a tile are a group; a matrix product gathers the inputs of a
    group's tiles and multiplies them by a dense matrix. Where all groups keep the same
    number of tiles (`js.Balanced` masks do) that is one batched product. Elsewhere
    tiles are stored one after another, and `offsets` say where each group begins.

    Attributes:
      values: balanced `[*batch, groups, k, a, v]`, else `[*batch, pieces, length, a,
        v]`; tiles of a group ascend. Outputs that are sharded over devices are in as
        many pieces; shorter ones end with tiles of zeros, which nothing reads.
      rows: balanced `[*batch, groups, k]`, else `[*batch, pieces, length]`, uint16 or
        uint32: the number of a tile among the `d_in / a` of its group.
      offsets: None if balanced, else `[*batch, pieces, groups / pieces + 1]`, int32.
      tile: `(a, v)`.
      most: the tiles of the largest group.
      view: the kernel's shape and axes.
    """

    values: Array
    rows: Array
    offsets: Array | None
    tile: tuple[int, int]
    most: int
    view: MatrixView


def tiles_of(weight: Weight, tile: tuple[int, int]) -> Tiles:
    """Packs a kernel."""
    kept = kept_tiles(weight, tile)
    pieces = _pieces(weight, kept)
    counts = kept.sum(-1, dtype=np.int64)
    balanced = bool((counts == counts.flat[0]).all())
    rows = rows_of(kept, kept.shape[-2] if balanced else pieces)
    values = taken(_units(weight.matrices, tile), rows.index)
    at = len(weight.view.batch)
    if isinstance(values, np.ndarray):
        values = placed(values, weight.place, at)
    place = functools.partial(placed, place=weight.place, axis=at)
    number = place(rows.column.astype(index_type(kept.shape[-1])))
    offsets = None if balanced else place(rows.offsets)
    return Tiles(values, number, offsets, tile, int(counts.max()), weight.view)


def kept_tiles(weight: Weight, tile: tuple[int, int]) -> np.ndarray:
    """Which tiles are kept, `[*batch, groups, d_in / a]`."""
    units = _units(weight.kept, tile)
    some, whole = (np.asarray(f(units, axis=(-2, -1))) for f in (np.any, np.all))
    *batch, d_out, d_in = weight.kept.shape
    shape = (*batch, d_out // tile[1], d_in // tile[0])
    part = (some & ~whole).reshape(shape)
    if part.any():
        *layer, group, number = map(int, np.unravel_index(np.argmax(part), shape))
        of = f" of layer {tuple(layer)}" if layer else ""
        a, v = tile
        raise ValueError(
            f"{weight.path}: the tile of inputs {number * a} to {number * a + a - 1} "
            f"and outputs {group * v} to {group * v + v - 1}{of} is kept in part, "
            f"against tiles of {tile}. Choose the masks with js.Block({tile}) or "
            f"js.Balanced({tile}), or another format: formats.Bitmap has any mask."
        )
    return some.reshape(shape)


def _units(matrices: Array | np.ndarray, tile: tuple[int, int]) -> Array | np.ndarray:
    """`[tiles, a, v]` of `[*batch, d_out, d_in]`: layer, group, number."""
    a, v = tile
    *_, d_out, d_in = matrices.shape
    split = matrices.reshape(-1, d_out // v, v, d_in // a, a)
    return split.transpose(0, 1, 3, 4, 2).reshape(-1, a, v)


def check_divides(weight: Weight, tile: tuple[int, int]) -> None:
    """Raises unless tiles fit a kernel."""
    sizes = ((weight.view.d_in, "inputs"), (weight.view.d_out, "outputs"))
    for side, (size, name) in zip(tile, sizes, strict=True):
        if size % side:
            raise ValueError(
                f"{weight.path}: tiles of {tile} need a number of {name} that {side} "
                f"divides, but this kernel of shape {weight.view.shape} has {size}. "
                "Choose another tile or format."
            )


def _pieces(weight: Weight, kept: np.ndarray) -> int:
    return 1 if kept.shape[-2] % weight.place.pieces else weight.place.pieces


def tiles_bytes(weight: Weight, tile: tuple[int, int]) -> int:
    """What it takes; an error where the mask has another structure."""
    kept = kept_tiles(weight, tile)
    counts = kept.sum(-1, dtype=np.int64)
    each = math.prod(tile) * weight.itemsize + index_type(kept.shape[-1]).itemsize
    if (counts == counts.flat[0]).all():
        return int(counts.sum()) * each
    pieces = _pieces(weight, kept)
    parts = counts.reshape(math.prod(weight.view.batch) * pieces, -1)
    offsets = 4 * (parts.shape[1] + 1)
    return len(parts) * (int(parts.sum(1).max()) * each + offsets)


def tiles_matrices(packed: Tiles) -> Array:
    """The dense matrices `[*batch, d_out, d_in]`."""
    values, rows, (a, v) = packed.values, packed.rows, packed.tile
    batch, length = values.shape[:-4], values.shape[-3]
    d_out, d_in = packed.view.d_out, packed.view.d_in
    parts, groups = values.shape[-4], d_out // v
    each = math.prod(values.shape[:-3])
    flat = values.reshape(each, length, a, v)
    number = rows.reshape(each, length).astype(jnp.int32)
    if packed.offsets is None:
        here, group = 1, jnp.zeros(number.shape, jnp.int32)
    else:
        here = groups // parts
        group = row_of_each(packed.offsets, length).reshape(each, length)

    def one(values: Array, group: Array, number: Array) -> Array:
        dense = jnp.zeros((here, d_in // a, a, v), values.dtype)
        # What is behind the last tile is in no group.
        at = dense.at[group, number]
        return at.set(values, mode="drop", unique_indices=True)

    dense = jax.vmap(one)(flat, group, number)
    dense = dense.reshape(-1, groups, d_in // a, a, v).transpose(0, 1, 4, 2, 3)
    return dense.reshape(*batch, d_out, d_in)
