"""The dense matrices of packed kernels, as far as other packages need them."""

import dataclasses
from typing import Any

from jaxsparse._typing import Array
from jaxsparse.formats._bitmap import Bitmap, bitmap_matrices
from jaxsparse.formats._condensed import Condensed, condensed_matrices
from jaxsparse.formats._csr import Csr16, csr_matrices
from jaxsparse.formats._int8 import MOST_INT8_INPUTS, Int8Tiles, int8_matrices
from jaxsparse.formats._int8 import integer_matrices as integers_of
from jaxsparse.formats._nm import Nm, nm_matrices
from jaxsparse.formats._nm import nm_planes as planes_of
from jaxsparse.formats._tiles import Tiles, tiles_matrices

PackedArray = Bitmap | Csr16 | Nm | Tiles | Condensed | Int8Tiles
"""What stands in the place of a kernel."""


def is_packed(x: Any) -> bool:
    """Return whether this is a packed kernel."""
    return isinstance(x, PackedArray)


def matrices_of(packed: PackedArray) -> Array:
    """The dense matrices `[*batch, d_out, d_in]`, of as many layers as are there."""
    match packed:
        case Bitmap():
            return bitmap_matrices(packed)
        case Csr16():
            return csr_matrices(packed)
        case Nm():
            return nm_matrices(packed)
        case Tiles():
            return tiles_matrices(packed)
        case Condensed():
            return condensed_matrices(packed)
        case Int8Tiles():
            return int8_matrices(packed)


def dtype_of(packed: PackedArray) -> Any:
    """Return the dtype of the kernel that it stands for."""
    return packed.dtype if isinstance(packed, Int8Tiles) else packed.values.dtype


def with_dtype(packed: PackedArray, dtype: Any) -> PackedArray:
    """The packed kernel, cast to another type of floating point."""
    if dtype_of(packed) == dtype:
        return packed
    if isinstance(packed, Int8Tiles):
        return dataclasses.replace(packed, dtype=dtype)
    return dataclasses.replace(packed, values=packed.values.astype(dtype))


__all__ = [
    "MOST_INT8_INPUTS",
    "PackedArray",
    "dtype_of",
    "integers_of",
    "is_packed",
    "matrices_of",
    "planes_of",
    "with_dtype",
]
