"""Functions with which other packages put kernels into formats."""

from jaxsparse.formats._pack import ROUNDED, bytes_of_each, pack_one, with_packed
from jaxsparse.formats._weight import Weight, weight_of

__all__ = [
    "ROUNDED",
    "Weight",
    "bytes_of_each",
    "pack_one",
    "weight_of",
    "with_packed",
]
