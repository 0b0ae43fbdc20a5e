"""CRC-32 of arrays: one number, however an array lies on devices and processes.

It is that of the array's bytes in C order, what `zlib.crc32` makes of
`np.asarray(x).tobytes()`, but no array is gathered or copied. A CRC that starts at 0
and is not inverted is linear: that of a whole is the XOR of those of its parts, each
with zeros in the place of the others. Zeros before a part change nothing, zeros behind
it are one linear map. So each device's part is looked at where it is, and what was
saved from eight devices is checked on two.
"""

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

_ONES = 0xFFFFFFFF
_SHORT = 64  # bytes, below which a call of zlib costs more than its work
_ROWS = 1 << 18
_MANY = 4096

Shape = tuple[int, ...]


def checksums(arrays: Mapping[Any, Any]) -> dict[Any, int]:
    """The CRC-32 of each array's bytes in C order.

    With many processes all of them call it with the same names; of an array that is
    local to each, the one of the first process counts.
    """
    raw = [_of_parts(x) for x in arrays.values()]
    if jax.process_count() > 1 and raw:
        from jax.experimental import multihost_utils

        parts = multihost_utils.process_allgather(np.array(raw, np.uint32))
        raw = np.bitwise_xor.reduce(np.asarray(parts), axis=0).tolist()
    return {
        name: start ^ _after(_ONES, x.nbytes) ^ _ONES
        for (name, x), start in zip(arrays.items(), raw, strict=True)
    }


def checksum(x: np.ndarray) -> int:
    """The CRC-32 of one array on the host."""
    return zlib.crc32(_bytes_of(x).data)


def _of_parts(x: Any) -> int:
    """The XOR of what this process's parts add to the linear CRC of the whole."""
    if not isinstance(x, jax.Array) or (
        x.is_fully_addressable and jax.process_count() > 1
    ):
        counts = jax.process_index() == 0
        return _of_part(np.asarray(x), x.shape, (0,) * x.ndim) if counts else 0
    found = 0
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            starts = tuple(s.start or 0 for s in shard.index)
            found ^= _of_part(np.asarray(shard.data), x.shape, starts)
    return found


def _of_part(part: np.ndarray, shape: Shape, starts: Shape) -> int:
    """The linear CRC of an array that is `part` from `starts` on, and 0 elsewhere."""
    if part.size == 0:
        return 0
    behind = lambda axis: shape[axis] - starts[axis] - part.shape[axis]
    stride = lambda axis: part.itemsize * math.prod(shape[axis + 1 :])
    # The last axis that is not whole is in one piece with what lies within it.
    axis = part.ndim - 1
    while axis > 0 and part.shape[axis] == shape[axis]:
        axis -= 1
    lead = part.shape[: max(axis, 0)]
    state = _of_rows(_bytes_of(part), math.prod(lead)).reshape(lead)
    if axis >= 0:
        state = _shifted(state, behind(axis) * stride(axis))
    for axis in reversed(range(len(lead))):
        state = _shifted(_joined(state, stride(axis)), behind(axis) * stride(axis))
    return int(state)


def _of_rows(data: np.ndarray, count: int) -> np.ndarray:
    """The linear CRC of each of `count` rows."""
    length = data.size // count
    if length >= _SHORT or count == 1:
        begins = range(0, data.size, length)
        view = data.data
        found = [zlib.crc32(view[i : i + length], _ONES) ^ _ONES for i in begins]
        return np.array(found, np.uint32)
    rows, found = data.reshape(count, length), np.zeros(count, np.uint32)
    for begin in range(0, count, _ROWS):
        state = found[begin : begin + _ROWS]
        for column in rows[begin : begin + _ROWS].T:
            state[:] = _of_bytes()[(state ^ column) & 0xFF] ^ (state >> 8)
    return found


def _joined(state: np.ndarray, stride: int) -> np.ndarray:
    """The CRC of pieces of `stride` bytes behind each other, along the last axis."""
    while state.shape[-1] > 1:
        if state.shape[-1] % 2:  # zeros before the first
            state = np.pad(state, [(0, 0)] * (state.ndim - 1) + [(1, 0)])
        state = _shifted(state[..., 0::2], stride) ^ state[..., 1::2]
        stride *= 2
    return state[..., 0]


def _shifted(state: np.ndarray, count: int) -> np.ndarray:
    """What CRCs become when `count` zero bytes follow."""
    return state if count == 0 else _apply(_map_of(count), state)


def _after(state: int, count: int) -> int:
    return int(_shifted(np.array(state, np.uint32), count))


def _apply(columns: np.ndarray, state: np.ndarray) -> np.ndarray:
    if state.size > _MANY:
        out = np.zeros_like(state)
        for begin in np.arange(0, 32, 8, dtype=np.uint32):
            table = _apply(columns, np.arange(256, dtype=np.uint32) << begin)
            out ^= table[state >> begin & np.uint32(0xFF)]
        return out
    out = np.zeros_like(state)
    for bit, column in enumerate(columns):
        out ^= column * (state >> np.uint32(bit) & np.uint32(1))
    return out


@functools.lru_cache(maxsize=1024)
def _map_of(count: int) -> np.ndarray:
    """The map of `count` zero bytes: what it makes of each bit."""
    if count == 1:
        bits = [zlib.crc32(b"\0", 1 << k ^ _ONES) ^ _ONES for k in range(32)]
        return np.array(bits, np.uint32)
    half = _map_of(count // 2)
    whole = _apply(half, half)
    return _apply(_map_of(1), whole) if count % 2 else whole


@functools.cache
def _of_bytes() -> np.ndarray:
    found = [zlib.crc32(bytes([b]), _ONES) ^ _ONES for b in range(256)]
    return np.array(found, np.uint32)


def _bytes_of(x: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order, without a copy where they lie so."""
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    unused = _unused_bits(x.dtype)
    # Of an int4 in a byte only four bits are the number.
    return data & np.uint8(0xFF >> unused) if unused else data


def _unused_bits(dtype: np.dtype) -> int:
    is_int = dtype.isbuiltin == 2 and "int" in dtype.name  # not of NumPy itself
    return 8 - int(ml_dtypes.iinfo(dtype).bits) if is_int else 0
