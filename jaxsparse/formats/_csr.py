"""`Csr16`: the kept values, the input of each in two bytes, and where outputs begin."""

import dataclasses
import functools
import math

import jax
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "columns", "offsets"],
    meta_fields=["view"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Csr16:
    """A kernel as its kept values, each with the number of its input.

    The engines for unstructured sparsity read this format. It is the smallest above
    94 %: with values of `b` bytes a weight takes `(1 - s) (b + 2)` bytes. Numbers of
    inputs take four bytes where there are more than 65,536.

    Attributes:
      values: `[*batch, pieces, length]`, output after output, inputs ascending, as in
        `Bitmap`.
      columns: the input of each value, uint16 or uint32; 0 behind the last.
      offsets: `[*batch, pieces, d_out / pieces + 1]`, int32: where in its piece each
        output begins, and where the last one ends.
      view: the kernel's shape and axes.
    """

    values: Array
    columns: Array
    offsets: Array
    view: MatrixView


def csr_of(weight: Weight) -> Csr16:
    """Packs a kernel."""
    rows = rows_of(weight.kept, weight.place.pieces)
    values = taken(weight.matrices.reshape(-1), rows.index)
    at = len(weight.view.batch)
    if isinstance(values, np.ndarray):
        values = placed(values, weight.place, at)
    columns = rows.column.astype(index_type(weight.view.d_in))
    place = functools.partial(placed, place=weight.place, axis=at)
    return Csr16(values, place(columns), place(rows.offsets), weight.view)


def csr_bytes(weight: Weight) -> int:
    """What it takes."""
    kept, pieces = weight.kept, weight.place.pieces
    parts = kept.reshape(math.prod(weight.view.batch) * pieces, -1)
    longest = int(parts.sum(1, dtype=np.int64).max(initial=0))
    each = weight.itemsize + index_type(weight.view.d_in).itemsize
    offsets = 4 * (weight.view.d_out // pieces + 1)
    return len(parts) * (longest * each + offsets)


def csr_matrices(packed: Csr16) -> Array:
    """The dense matrices `[*batch, d_out, d_in]`."""
    own = packed.values, packed.columns, packed.offsets
    return spread(*own, packed.view.d_in)
