"""The types of arrays that files name, from a fixed list.

A name in a file is looked up here and nowhere else: it is what others may have written.
"""

from typing import Any

import ml_dtypes
import numpy as np

_OF_NUMPY: tuple[Any, ...] = (
    *(np.bool_, np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64, np.longdouble),
    *(np.complex64, np.complex128, np.clongdouble),
)
_OF_ML_DTYPES = (
    *("bfloat16", "bcomplex32", "complex32"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e5m3fnu"),
    *("float8_e8m0fnu", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"),
    *("int1", "int2", "int4", "uint1", "uint2", "uint4"),
)


def _table() -> dict[str, np.dtype]:
    types = [np.dtype(kind) for kind in _OF_NUMPY]
    table = {dtype.name: dtype for dtype in types}
    # In the other order of bytes, by which NumPy names them.
    table |= {d.str: d for dtype in types if (d := dtype.newbyteorder(">")) != dtype}
    # Some versions of ml_dtypes have fewer.
    own = {name: getattr(ml_dtypes, name, None) for name in _OF_ML_DTYPES}
    return table | {name: np.dtype(kind) for name, kind in own.items() if kind}


_TYPES = _table()


def type_name(dtype: np.dtype) -> str:
    """What a file calls a type."""
    return dtype.str if dtype.byteorder == ">" else dtype.name


def type_of(name: Any) -> np.dtype:
    """The type of a name."""
    if not isinstance(name, str) or name not in _TYPES:
        raise ValueError(f"the type {name!r} is none that this version knows")
    return _TYPES[name]


def is_known(dtype: np.dtype) -> bool:
    """Whether a type is of numbers or bools, and can be named in a file."""
    return _TYPES.get(type_name(dtype)) == dtype


def is_foreign(dtype: np.dtype) -> bool:
    """Whether a type is not of NumPy itself, whatever its `kind` says."""
    return dtype.isbuiltin == 2
