"""The two formats of plain files, `.npz` and `.safetensors`, for every type.

Both hold arrays by name, a text, and the CRC-32 of the text. Safetensors files are
written and read here: the package's NumPy side has no bfloat16 and no float8, and its
JAX side cuts 64 bits to 32. The format is eight bytes with the length of a JSON header,
the header, and the arrays behind each other.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

_NOTE, _CRC = "jaxsparse", "jaxsparse_crc32"
_ALIGNED = 8
# What other programs know. The rest is written as unsigned integers of its size.
_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
_TYPES = {code: name for name, code in _CODES.items()} | {
    "F8_E4M3FNUZ": "float8_e4m3fnuz",  # of the newest readers only
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def type_name(dtype: np.dtype) -> str:
    """What the note calls a type.

    Args:
      dtype: of numbers or bools.

    Returns:
      A name for `type_of`, with the order of the bytes where it is not the usual one.
    """
    return dtype.str if dtype.byteorder == ">" else dtype.name


def type_of(name: str) -> np.dtype:
    """The type of a name.

    Args:
      name: what `type_name` returned.

    Returns:
      The type.
    """
    own = getattr(ml_dtypes, name, None) if name.isidentifier() else None
    return np.dtype(name if own is None else own)


def stored(name: str, x: np.ndarray, *, npz: bool) -> np.ndarray:
    """An array as the format holds it.

    Args:
      name: what a message calls it.
      x: an array of numbers or bools.
      npz: which format.

    Returns:
      The array, or its bits, which `retyped` turns back.

    Raises:
      TypeError: of a type that the format cannot hold.
    """
    if npz:
        return _bits(x) if is_foreign(x.dtype) else x
    if x.dtype.name in _CODES:
        return x if x.dtype.byteorder != ">" else x.astype(x.dtype.newbyteorder("<"))
    if not is_foreign(x.dtype):
        raise TypeError(
            f"{name}: a .safetensors file has no {x.dtype.name}. Export to .npz, which "
            "has, or cast it: complex64 and float64 are the widest there."
        )
    return _bits(x)


def retyped(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What was `stored`, in its own type.

    Args:
      x: the array in the file.
      dtype: the type it had.

    Returns:
      The array as it was.
    """
    return x.view(dtype) if is_foreign(dtype) else x.astype(dtype)


def is_foreign(dtype: np.dtype) -> bool:
    """Whether a type is not of NumPy itself, whatever its `kind` says.

    Args:
      dtype: any type.

    Returns:
      True for those of ml_dtypes: the kind of float8_e5m2 is "f".
    """
    return dtype.isbuiltin == 2


def is_number(dtype: np.dtype) -> bool:
    """Whether a type is of numbers or bools.

    Args:
      dtype: any type.

    Returns:
      False for text, dates, objects and records.
    """
    return dtype.kind in "biufc" or is_foreign(dtype)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, order="C").view(f"u{x.dtype.itemsize}")


def write_npz(path: str, arrays: Mapping[str, np.ndarray], note: str, crc: int) -> None:
    """Writes a `.npz` file.

    Args:
      path: of the file.
      arrays: what `stored` returned, by name.
      note: a text.
      crc: its CRC-32.
    """
    named: Any = {f"params/{name}": x for name, x in arrays.items()}
    np.savez(path, note=np.array(note), note_crc32=np.array(crc, np.uint32), **named)


class Npz:
    """An open `.npz` file.

    Attributes:
      note: its text, or None.
      crc: the CRC-32 that was written with it, or None.
    """

    npz = True

    def __init__(self, file: Any):
        self._file: Any = np.load(file)
        if not isinstance(self._file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name")
        self.note: str | None = None
        self.crc: int | None = None
        if "note" in self._file:
            self.note = str(self._file["note"])
        if "note_crc32" in self._file:
            self.crc = int(self._file["note_crc32"])

    def read(self, name: str) -> np.ndarray:
        """The array of a name."""
        # With its ending, or `x` would be found for `x.npy`.
        return self._file[f"params/{name}.npy"]


def write_safetensors(
    path: str, arrays: Mapping[str, np.ndarray], note: str, crc: int
) -> None:
    """Writes a `.safetensors` file.

    Args:
      path: of the file.
      arrays: what `stored` returned, by name.
      note: a text.
      crc: its CRC-32.

    Raises:
      ValueError: a name that the format has taken.
    """
    if "__metadata__" in arrays:
        raise ValueError(
            "__metadata__: a .safetensors file keeps this name for itself. Rename the "
            "parameter, or export to .npz."
        )
    header: dict[str, Any] = {"__metadata__": {_NOTE: note, _CRC: str(crc)}}
    # Wide types first, so that all are aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    end = 0
    for name in order:
        x = arrays[name]
        begin, end = end, end + x.nbytes
        header[name] = {
            "dtype": _CODES[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            if arrays[name].size:
                data = np.ascontiguousarray(arrays[name]).reshape(-1)
                file.write(data.view(np.uint8).data)


class Safetensors:
    """An open `.safetensors` file.

    Attributes:
      note: its text, or None.
      crc: the CRC-32 that was written with it, or None.
    """

    npz = False

    def __init__(self, file: Any):
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        self._begin = 8 + length
        if self._begin > self._size:
            raise ValueError(
                f"its header would have {length} bytes, the file has {self._size}"
            )
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        self._arrays = header
        self.note: str | None = metadata.get(_NOTE)
        self.crc = int(metadata[_CRC]) if _CRC in metadata else None

    def read(self, name: str) -> np.ndarray:
        """The array of a name."""
        if name not in self._arrays:
            raise ValueError("it is missing")
        entry = self._arrays[name]
        dtype = type_of(_TYPES[entry["dtype"]])
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size or begin < 0 or self._begin + end > self._size:
            raise ValueError(
                f"{dtype}{list(shape)} of {size} bytes is said to lie at bytes "
                f"{begin} to {end} of {self._size - self._begin}"
            )
        found = np.empty(size, np.uint8)
        self._file.seek(self._begin + begin)
        if self._file.readinto(found.data) != size:
            raise ValueError("the file ends within it")
        return found.view(dtype).reshape(shape)
