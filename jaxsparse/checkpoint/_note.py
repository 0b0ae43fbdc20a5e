"""The text in an export: what each array is, and what was dropped."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsparse import _checks
from jaxsparse.checkpoint._schema import is_size
from jaxsparse.checkpoint._types import type_of
from jaxsparse.coupling import Drop


def of_drop(drop: Drop | None) -> dict[str, Any]:
    """What the text says of what was dropped."""
    if drop is None:
        return {}
    if not isinstance(drop, Drop):
        raise TypeError(
            f"drop: expected a js.coupling.Drop, as js.channels.drop_lowest returns, "
            f"got {type(drop).__name__}."
        )
    indices = {n: np.asarray(i).tolist() for n, i in drop.indices.items()}
    sizes = {n: int(size) for n, size in drop.sizes.items()}
    said = {"indices": indices, "sizes": sizes}
    try:
        _check_drop(said)
    except ValueError as error:
        raise ValueError(f"drop: {error}.") from None
    return {"drop": said}


def parsed(text: str, crc: int | None) -> dict[str, Any]:
    """The text of a file, checked."""
    note = json.loads(text)
    found = zlib.crc32(text.encode())
    if not isinstance(note, dict):
        raise ValueError(f"it holds {type(note).__name__}, no dictionary")
    # A file from before there were checksums has neither.
    if ("crc32" in note or crc is not None) and found != crc:
        raise ValueError(f"its CRC-32 is {found}, that written with it {crc}")
    types = _of(note, "types", str)
    for name, kind in types.items():
        try:
            type_of(kind)
        except ValueError as error:
            raise ValueError(f"of {name}, {error}") from None
    if "crc32" in note:
        shapes, crcs = _of(note, "shapes", list), _of(note, "crc32", int)
        for name in types:
            shape = shapes.get(name)
            if name not in crcs or shape is None or not all(map(is_size, shape)):
                raise ValueError(f"of {name} it says no shape or no CRC-32")
    if note.get("drop") is not None:
        drop = note["drop"]
        if not isinstance(drop, dict):
            raise ValueError("its drop is no dictionary")
        _of(drop, "sizes", int)
        _of(drop, "indices", list)
        _check_drop(drop)
    return note


def check_masks(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raises for a mask that fits no parameter beside it.

    Of a tree with `params` and `masks`, such as a `Pruned`.
    """
    if not any(name.startswith("params/") for name in arrays):
        return
    for name, (shape, dtype) in arrays.items():
        head, _, rest = name.partition("/")
        if head != "masks" or dtype != np.bool_:
            continue
        owner = arrays.get(f"params/{rest}")
        if owner is None:
            raise ValueError(f"{name} is a mask without a parameter params/{rest}")
        full = owner[0]
        if not _checks.broadcasts(shape, full):
            raise ValueError(
                f"{name} is a mask of shape {list(shape)}, and its parameter has the "
                f"shape {list(full)}"
            )


def _of(note: dict[str, Any], key: str, kind: type) -> dict[str, Any]:
    found = note.get(key)
    if not isinstance(found, dict):
        raise ValueError(f"it has no dictionary {key!r}")
    for name, x in found.items():
        if type(x) is not kind:
            raise ValueError(f"{key} of {name} is {x!r}, no {kind.__name__}")
    return found


def _check_drop(drop: dict[str, Any]) -> None:
    indices, sizes = drop["indices"], drop["sizes"]
    if indices.keys() != sizes.keys():
        raise ValueError("indices and sizes are of different groups")
    for name, found in indices.items():
        try:
            rows = np.array(found, np.int64 if found == [] else None)
        except ValueError:
            rows = np.array(None)
        if rows.dtype.kind not in "iu" or rows.ndim == 0:
            raise ValueError(f"what is dropped of {name} is not integers in rows")
        inside = np.all((rows >= 0) & (rows < sizes[name]))
        twice = np.any(np.diff(np.sort(rows, axis=-1), axis=-1) == 0)
        if not inside or twice:
            raise ValueError(
                f"what is dropped of {name} is not different indices below "
                f"{sizes[name]}"
            )
