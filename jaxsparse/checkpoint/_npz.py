"""`.npz` files: read only as far as the archive has what its headers promise.

A small archive may say that it unpacks to any size. What its entries hold is added up
before one is read, and each array's own header is compared with its entry.
"""

import math
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

_TIMES = 16  # as large as the file, before it must be asked for
_NOTE, _CRC = "note.npy", "note_crc32.npy"


def write_npz(path: str, arrays: Mapping[str, np.ndarray], note: str, crc: int) -> None:
    """Writes a `.npz` file."""
    named: Any = {f"params/{name}": x for name, x in arrays.items()}
    np.savez(path, note=np.array(note), note_crc32=np.array(crc, np.uint32), **named)


class Npz:
    """An open `.npz` file: `note` is its text, `crc` the CRC-32 beside it."""

    npz = True

    def __init__(self, file: IO[bytes], max_bytes: int | None):
        size = file.seek(0, 2)
        self._zip = zipfile.ZipFile(file)
        entries = self._zip.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) < len(entries):
            raise ValueError("two of its entries have one name")
        total = sum(entry.file_size for entry in entries)
        most = _TIMES * size if max_bytes is None else max_bytes
        if total > most:
            raise TooLarge(
                f"its {size:,} bytes would unpack to {total:,}, more than the "
                f"{most:,} allowed"
            )
        self.note: str | None = None
        self.crc: int | None = None
        if _NOTE in self._entries:
            self.note = str(self._array(_NOTE))
        if _CRC in self._entries:
            self.crc = int(self._array(_CRC))

    def read(self, name: str) -> np.ndarray:
        """The array of a name."""
        # With its ending, or `x` would be found for `x.npy`.
        entry = f"params/{name}.npy"
        if entry not in self._entries:
            raise ValueError("it is missing")
        return self._array(entry)

    def _array(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        with self._zip.open(entry) as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(file)
            else:
                header = np.lib.format.read_array_header_2_0(file)
            shape, _, dtype = header
            promised = file.tell() + math.prod(shape) * dtype.itemsize
            if promised != entry.file_size or dtype.hasobject:
                raise ValueError(
                    f"its header promises {dtype}{list(shape)}, {promised} bytes in "
                    f"all, and its entry in the archive holds {entry.file_size}"
                )
        with self._zip.open(entry) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


class TooLarge(ValueError):
    """An archive that unpacks to more than is allowed."""
