"""`Int8Tiles`: kept weights rounded to one byte each, in tiles of four inputs."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array
from jaxsparse.formats._weight import (
    Weight,
    index_type,
    placed,
    rows_of,
    spread,
    taken,
)
from jaxsparse.tree import MatrixView

MOST_INT8_INPUTS = (2**31 - 1) // (127 * 128)
"""Inputs whose products of int8 are sure to have a sum that fits into int32."""

_INPUTS = 4  # of a tile: what one instruction multiplies and adds up
_LEAST = np.finfo(np.float32).tiny


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "rows", "offsets"],
    meta_fields=["dtype", "view"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Int8Tiles:
    """A kernel in int8: tiles of four inputs and one output, with a scale per output.

    The one format that rounds: `w ~ scale * q` with `scale = max |w| / 127` of each
    output and `q = round(w / scale)` (symmetric), so each weight is within `scale / 2`
    of its original value (up to a rounding of its type). Removed weights are exactly 0.
    A tile is stored where its mask keeps any of its four weights, so any mask can be
    packed; `js.Block((4, 1))` chooses whole tiles. A stored tile takes six bytes, and
    an output eight: at 90 % of whole tiles 0.0375 of a dense float32 array, besides the
    outputs.

    Products round the activations too, each row by its own scale, and add up integers
    exactly (Jacob et al. 2018): about 1 % of error each. `pack` and `sparsify` use it
    only on request. It cannot be trained: prune and train in another format, and round
    at the end.

    Attributes:
      values: `[*batch, pieces, length, 4]`, int8 from -127 to 127; output after output,
        inputs ascending. Outputs that are sharded over devices are in as many pieces;
        shorter ones end with tiles of zeros, which nothing reads. Where 4 does not
        divide the inputs, those that are missing in the last tile are zeros.
      scale: `[*batch, d_out]`, float32; at least the smallest normal number, which an
        output of zeros has.
      rows: `[*batch, pieces, length]`, uint16 or uint32: the number of a tile among the
        `ceil(d_in / 4)` of its output.
      offsets: `[*batch, pieces, d_out / pieces + 1]`, int32: where in its piece each
        output begins, and where the last one ends.
      dtype: the type of the kernel that was packed, which `unpack` gives back.
      view: the kernel's shape and axes.
    """

    values: Array
    scale: Array
    rows: Array
    offsets: Array
    dtype: Any
    view: MatrixView


def int8_tiles_of(weight: Weight) -> Int8Tiles:
    """Rounds and packs a kernel."""
    _check_can_round(weight)
    kept = _kept_tiles(weight)
    rows = rows_of(kept, weight.place.pieces)
    whole, scale = _rounded(weight)
    values = taken(_tiled(whole).reshape(-1, _INPUTS), rows.index)
    number = rows.column.astype(index_type(kept.shape[-1]))
    at = len(weight.view.batch)
    place = functools.partial(placed, place=weight.place, axis=at)
    structure = place(number), place(rows.offsets)
    dtype = np.dtype(weight.matrices.dtype)
    return Int8Tiles(place(values), place(scale), *structure, dtype, weight.view)


def _check_can_round(weight: Weight) -> None:
    dtype, d_in = weight.matrices.dtype, weight.view.d_in
    if not isinstance(weight.matrices, np.ndarray):
        raise TypeError(
            f"{weight.path}: formats.Int8Tiles rounds weights where they are known, "
            "but these are traced. Call pack outside of jit and grad."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{weight.path}: formats.Int8Tiles rounds kernels of floating point, got "
            f"{dtype}. Take another format: formats.Bitmap has any type."
        )
    if d_in > MOST_INT8_INPUTS:
        raise ValueError(
            f"{weight.path}: sums of int8 products over {d_in:,} inputs may not fit "
            f"into int32; formats.Int8Tiles takes {MOST_INT8_INPUTS:,} at most. Take "
            "another format: formats.Csr16 has any number."
        )


def _tiled(matrices: np.ndarray) -> np.ndarray:
    """`[..., d_out, ceil(d_in / 4), 4]`, filled up with zeros."""
    *lead, d_in = matrices.shape
    edges = [*[(0, 0)] * len(lead), (0, -d_in % _INPUTS)]
    padded = np.pad(matrices, edges) if d_in % _INPUTS else matrices
    return padded.reshape(*lead, -1, _INPUTS)


def _kept_tiles(weight: Weight) -> np.ndarray:
    """Which tiles have a kept weight, `[*batch, d_out, ceil(d_in / 4)]`."""
    return np.any(_tiled(weight.kept), axis=-1)


def _rounded(weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """Int8 matrices `[*batch, d_out, d_in]`, and the scales `[*batch, d_out]`."""
    narrow = weight.itemsize <= 4
    w = weight.matrices.astype(np.float32 if narrow else np.float64)
    w = np.where(weight.kept, w, w.dtype.type(0))
    largest = np.abs(w).max(-1)  # NaN where there is one
    with np.errstate(over="ignore"):
        fits = np.isfinite(largest.astype(np.float32))
    if not fits.all():
        *layer, output = at = np.unravel_index(np.argmin(fits), fits.shape)
        of = f" of layer {tuple(map(int, layer))}" if layer else ""
        raise ValueError(
            f"{weight.path}: the largest weight of output {output}{of} is "
            f"{largest[at]}; formats.Int8Tiles rounds finite numbers of float32. Find "
            "where it comes from, or take another format: formats.Bitmap has any "
            "weight."
        )
    scale = np.maximum((largest / 127).astype(np.float32), _LEAST)
    return np.rint(w / scale[..., None]).astype(np.int8), scale


def int8_bytes(weight: Weight) -> int:
    """What it takes; an error for a kernel that cannot be rounded."""
    _check_can_round(weight)
    kept, (*batch, d_out, _) = _kept_tiles(weight), weight.kept.shape
    pieces = weight.place.pieces
    parts = kept.reshape(math.prod(batch) * pieces, -1)
    longest = int(parts.sum(1, dtype=np.int64).max(initial=0))
    each = _INPUTS + index_type(kept.shape[-1]).itemsize
    offsets = 4 * (d_out // pieces + 1)
    return len(parts) * (longest * each + offsets) + 4 * math.prod(batch) * d_out


def integer_matrices(packed: Int8Tiles) -> Array:
    """The dense integers `[*batch, d_out, d_in]`, int8."""
    d_in = packed.view.d_in
    count = -(-d_in // _INPUTS)
    tiles = spread(packed.values, packed.rows, packed.offsets, count)
    return tiles.reshape(*tiles.shape[:-2], count * _INPUTS)[..., :d_in]


def int8_matrices(packed: Int8Tiles) -> Array:
    """The dense matrices `[*batch, d_out, d_in]` that the integers stand for."""
    whole = integer_matrices(packed).astype(jnp.float32)
    return (whole * packed.scale[..., None]).astype(packed.dtype)
