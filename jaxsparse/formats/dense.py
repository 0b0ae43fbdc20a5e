"""The dense matrices of packed kernels, as far as other packages need them."""

from typing import Any

from jaxsparse._typing import Array
from jaxsparse.formats._bitmap import Bitmap, bitmap_matrices
from jaxsparse.formats._condensed import Condensed, condensed_matrices
from jaxsparse.formats._csr import Csr16, csr_matrices
from jaxsparse.formats._nm import Nm, nm_matrices
from jaxsparse.formats._nm import nm_planes as planes_of
from jaxsparse.formats._tiles import Tiles, tiles_matrices

PackedArray = Bitmap | Csr16 | Nm | Tiles | Condensed
"""What stands in the place of a kernel."""


def is_packed(x: Any) -> bool:
    """Whether this is a packed kernel."""
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


__all__ = ["PackedArray", "is_packed", "matrices_of", "planes_of"]
