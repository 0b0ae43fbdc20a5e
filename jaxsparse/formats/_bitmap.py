"""`Bitmap`: the kept values and one bit a weight."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array
from jaxsparse.formats._weight import Weight, placed, rows_of, taken
from jaxsparse.tree import MatrixView


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "bits"],
    meta_fields=["view"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Bitmap:
    """A kernel as its kept values and one bit a weight.

    The smallest format of an unstructured mask up to a sparsity of about 94 %: with
    values of `b` bytes a weight takes `(1 - s) b + 1/8` bytes, at 90 % 0.131 of a dense
    float32 and 0.1625 of a dense bfloat16 array. The bits are those of
    compressed-tensors' bitmask, but for their order within a byte.

    Attributes:
      values: `[*batch, pieces, length]`, output after output, inputs ascending. Outputs
        that are sharded over devices are in as many pieces; shorter pieces (and layers)
        end with zeros, which nothing reads.
      bits: `[*batch, d_out, ceil(d_in / 8)]`, uint8; the first input is the highest
        bit.
      view: the kernel's shape and axes.
    """

    values: Array
    bits: Array
    view: MatrixView


def bitmap_of(weight: Weight) -> Bitmap:
    """Packs a kernel."""
    rows = rows_of(weight.kept, weight.place.pieces)
    values = taken(weight.matrices.reshape(-1), rows.index)
    bits = np.packbits(weight.kept, axis=-1)
    at = len(weight.view.batch)
    if isinstance(values, np.ndarray):
        values = placed(values, weight.place, at)
    return Bitmap(values, placed(bits, weight.place, at), weight.view)


def bitmap_bytes(weight: Weight) -> int:
    """What it takes."""
    kept, (*_, d_in) = weight.kept, weight.kept.shape
    pieces = kept.reshape(math.prod(weight.view.batch) * weight.place.pieces, -1)
    longest = int(pieces.sum(1, dtype=np.int64).max(initial=0))
    bits = kept.size // max(1, d_in) * -(-d_in // 8)
    return len(pieces) * longest * weight.itemsize + bits


def bitmap_matrices(packed: Bitmap) -> Array:
    """The dense matrices `[*batch, d_out, d_in]`."""
    values, bits = packed.values, packed.bits
    *batch, pieces, length = values.shape
    d_out, d_in = packed.view.d_out, packed.view.d_in
    kept = jnp.unpackbits(bits, axis=-1, count=d_in).astype(bool)
    flat = kept.reshape(-1, d_out // pieces * d_in)
    if not length:
        return jnp.zeros((*batch, d_out, d_in), values.dtype)
    place = jnp.cumsum(flat, axis=1, dtype=jnp.int32) - 1
    own = values.reshape(-1, length)
    # Where the mask is False any value is read, and none is used.
    found = jnp.take_along_axis(own, jnp.maximum(place, 0), axis=1)
    dense = jnp.where(flat, found, jnp.zeros((), values.dtype))
    return dense.reshape(*batch, d_out, d_in)
