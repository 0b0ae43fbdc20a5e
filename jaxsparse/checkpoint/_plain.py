"""How an array is held by a format that lacks its type: as unsigned integers."""

import numpy as np

from jaxsparse.checkpoint._safetensors import CODES
from jaxsparse.checkpoint._types import is_foreign


def stored(name: str, x: np.ndarray, *, npz: bool) -> np.ndarray:
    """An array as the format holds it."""
    if npz:
        return _bits(x) if is_foreign(x.dtype) else x
    if x.dtype.name in CODES:
        return x if x.dtype.byteorder != ">" else x.astype(x.dtype.newbyteorder("<"))
    if not is_foreign(x.dtype):
        raise TypeError(
            f"{name}: a .safetensors file has no {x.dtype.name}. Export to .npz, which "
            "has, or cast it: complex64 and float64 are the widest there."
        )
    return _bits(x)


def retyped(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What was `stored`, in its own type."""
    return x.view(dtype) if is_foreign(dtype) else x.astype(dtype)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, order="C").view(f"u{x.dtype.itemsize}")
