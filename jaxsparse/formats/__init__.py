"""Sparse formats that store only the kept weights of pruned kernels."""

from jaxsparse.formats._bitmap import Bitmap as Bitmap
from jaxsparse.formats._condensed import Condensed as Condensed
from jaxsparse.formats._csr import Csr16 as Csr16
from jaxsparse.formats._int8 import Int8Tiles as Int8Tiles
from jaxsparse.formats._nm import Nm as Nm
from jaxsparse.formats._pack import Format as Format
from jaxsparse.formats._pack import pack as pack
from jaxsparse.formats._pack import sizes as sizes
from jaxsparse.formats._tiles import Tiles as Tiles
from jaxsparse.formats._unpack import unpack as unpack
from jaxsparse.formats._unpack import values as values
from jaxsparse.formats._unpack import with_values as with_values
from jaxsparse.formats.dense import PackedArray as PackedArray

__all__ = [
    "Bitmap",
    "Condensed",
    "Csr16",
    "Format",
    "Int8Tiles",
    "Nm",
    "PackedArray",
    "Tiles",
    "pack",
    "sizes",
    "unpack",
    "values",
    "with_values",
]
