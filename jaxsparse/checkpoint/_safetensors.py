"""`.safetensors` files, for every type.

They are written and read here: the package's NumPy side has no bfloat16 and no float8,
and its JAX side cuts 64 bits to 32. The format is eight bytes with the length of a JSON
header, the header, and the arrays behind each other.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import IO, Any, NamedTuple, TypeGuard

import numpy as np

from jaxsparse.checkpoint._schema import is_size
from jaxsparse.checkpoint._types import type_of

_NOTE, _CRC = "jaxsparse", "jaxsparse_crc32"
_ALIGNED = 8
# What other programs know. The rest is written as unsigned integers of its size.
CODES = {
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
_TYPES = {code: name for name, code in CODES.items()} | {
    "F8_E4M3FNUZ": "float8_e4m3fnuz",  # of the newest readers only
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def write_safetensors(
    path: str, arrays: Mapping[str, np.ndarray], note: str, crc: int
) -> None:
    """Writes a `.safetensors` file."""
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
            "dtype": CODES[x.dtype.name],
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
    """An open `.safetensors` file: `note` is its text, `crc` the CRC-32 beside it."""

    npz = False

    def __init__(self, file: IO[bytes], max_bytes: int | None):
        del max_bytes  # arrays that do not overlap are no larger than the file
        self._file: Any = file
        size = file.seek(0, 2)
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        self._begin = 8 + length
        if self._begin > size:
            raise ValueError(
                f"its header would have {length} bytes, the file has {size}"
            )
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no dictionary")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata are no dictionary")
        self._arrays = {name: _entry(name, x) for name, x in header.items()}
        end = 0
        for name, entry in sorted(self._arrays.items(), key=lambda x: x[1].begin):
            if entry.begin < end:
                raise ValueError(f"{name} shares bytes with another array")
            end = max(end, entry.end)
        if self._begin + end > size:
            raise ValueError(
                f"its arrays would end after {end} bytes of {size - self._begin}"
            )
        note = metadata.get(_NOTE)
        self.note: str | None = None if note is None else str(note)
        self.crc = int(metadata[_CRC]) if _CRC in metadata else None

    def read(self, name: str) -> np.ndarray:
        """The array of a name."""
        if name not in self._arrays:
            raise ValueError("it is missing")
        dtype, shape, begin, end = self._arrays[name]
        found = np.empty(end - begin, np.uint8)
        self._file.seek(self._begin + begin)
        if self._file.readinto(found.data) != found.size:
            raise ValueError("the file ends within it")
        return found.view(dtype).reshape(shape)


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, entry: Any) -> _Entry:
    """What a header says of an array."""
    code = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(code, str) or code not in _TYPES:
        raise ValueError(f"its header says of {name} {entry!r}, which is no known type")
    dtype = type_of(_TYPES[code])
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"its header says of {name} {entry!r}")
    begin, end = offsets
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
        raise ValueError(
            f"{name}: {dtype}{shape} of {size} bytes is said to lie at bytes {begin} "
            f"to {end}"
        )
    return _Entry(dtype, tuple(shape), begin, end)


def _are_sizes(x: Any) -> TypeGuard[list[int]]:
    return isinstance(x, list) and all(map(is_size, x))
