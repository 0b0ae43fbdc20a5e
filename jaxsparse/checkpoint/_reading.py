"""Reads the arrays of a checkpoint and checks them against the stamp."""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxsparse import _bits
from jaxsparse._checksums import checksums
from jaxsparse._text import shown
from jaxsparse.checkpoint import _leaves, _types
from jaxsparse.checkpoint._files import STAMP, Damaged

Tree = dict[str, dict[str, Any]]

_LEAST = 1 << 26  # bytes; what is smaller is not worth a reading of its own
_PARTS = 8


def checkpointer() -> ocp.Checkpointer:
    """Orbax for a checkpoint of several items."""
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def checksums_of(arrays: Tree) -> dict[str, dict[str, int]]:
    """The CRC-32 of each array."""
    flat = {(item, n): x for item, named in arrays.items() for n, x in named.items()}
    found = checksums(flat)
    return {
        item: {name: found[item, name] for name in named}
        for item, named in arrays.items()
    }


def read(
    path: pathlib.Path, stamp: dict[str, Any], templates: Tree, *, alone: bool
) -> Tree:
    """The leaves of each item, in the order of its template and where that lies."""
    _check_axes(stamp)
    records = stamp["leaves"]
    found: Tree = {item: {} for item in templates}
    parts = list(_parts(templates, records))
    for part in parts:
        for item, leaves in _read_part(
            path, stamp, part, alone=alone, partial=len(parts) > 1
        ).items():
            found[item] |= leaves
    return found


def _parts(templates: Tree, records: Tree) -> Iterator[Tree]:
    """Some leaves at a time: what is read lies beside what is made of it."""
    sizes = {
        (item, name): _bytes_of(records[item][name])
        for item, named in templates.items()
        for name in named
    }
    most = max(_LEAST, sum(sizes.values()) // _PARTS)
    part: Tree = {}
    filled = 0
    for (item, name), size in sizes.items():
        if part and filled + size > most:
            yield part
            part, filled = {}, 0
        part.setdefault(item, {})[name] = templates[item][name]
        filled += size
    if part:
        yield part


def _bytes_of(record: _leaves.Record) -> int:
    """How many bytes an array takes on disk, about."""
    if not _leaves.is_written(record):
        return 0
    shape, dtype = _written_as(record) or (record["shape"], np.dtype(np.uint64))
    return math.prod(shape) * dtype.itemsize


def _read_part(
    path: pathlib.Path,
    stamp: dict[str, Any],
    templates: Tree,
    *,
    alone: bool,
    partial: bool,
) -> Tree:
    records = stamp["leaves"]
    places = {
        item: {
            name: _leaves.place_of(shown(f"{item} {name}"), x)
            for name, x in named.items()
        }
        for item, named in templates.items()
    }
    args = {
        item: {
            name: _restore_args(_leaves.written_place(records[item][name], place))
            for name, place in named.items()
            if _leaves.is_written(records[item][name])
        }
        for item, named in places.items()
    }
    args = {item: named for item, named in args.items() if named}
    read = _read_alone if alone else _read_some if partial else _read_together
    written = read(path, args)
    _check(written, stamp)
    return {
        item: {
            name: _leaves.decode(
                shown(f"{item} {name}"),
                written[item].get(name) if item in written else None,
                records[item][name],
                template,
                places[item][name],
            )
            for name, template in named.items()
        }
        for item, named in templates.items()
    }


def check_arrays(path: pathlib.Path, stamp: dict[str, Any]) -> None:
    """Reads every array, one at a time, onto the host."""
    _check_axes(stamp)
    for item, records in stamp["leaves"].items():
        for name in records:
            if _leaves.is_written(records[name]):
                one = {item: {name: _restore_args(None)}}
                _check(_read_alone(path, one), stamp)


def _read_together(path: pathlib.Path, args: Tree) -> Tree:
    """All that was written."""
    wanted = {
        item: ocp.args.PyTreeRestore(restore_args=named) for item, named in args.items()
    }
    return _read(path, args, wanted)


def _read_some(path: pathlib.Path, args: Tree) -> Tree:
    """Some of what was written."""
    wanted = {item: _some(named) for item, named in args.items()}
    return _read(path, args, wanted)


def _some(named: dict[str, ocp.RestoreArgs]) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=dict.fromkeys(named, 0), restore_args=named, partial_restore=True
    )


def _read(path: pathlib.Path, args: Tree, wanted: dict[str, Any]) -> Tree:
    if not args:  # orbax takes nothing for everything
        return {}
    try:
        with checkpointer() as reader:
            return reader.restore(path, args=ocp.args.Composite(**wanted))
    except Exception:
        # Most of its errors name no parameter. Of many processes none reads alone.
        if jax.process_count() == 1:
            _read_alone(path, args)
        raise


def _read_alone(path: pathlib.Path, args: Tree) -> Tree:
    found: Tree = {item: {} for item in args}
    for item, named in args.items():
        for name, how in named.items():
            one = _some({name: how})
            try:
                with checkpointer() as reader:
                    read = reader.restore(path, args=ocp.args.Composite(**{item: one}))
                found[item][name] = read[item][name]
            except Exception as error:
                said = str(error).partition(" [tensorstore_spec")[0]
                raise Damaged(
                    f"{item} {name} cannot be read from {path / item}: "
                    f"{type(error).__name__}: {said}"
                ) from error
    return found


def _restore_args(place: jax.sharding.Sharding | None) -> ocp.RestoreArgs:
    # Without a sharding orbax would look for the devices it was saved from.
    if place is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=place)


def _check(written: Tree, stamp: dict[str, Any]) -> None:
    same: Tree = {item: {} for item in written}
    for item, named in written.items():
        for name, x in named.items():
            record = stamp["leaves"][item][name]
            expected = _written_as(record)
            got = tuple(x.shape), x.dtype
            if expected is None or got == expected:
                same[item][name] = x
            # A wide type on a device, which `decode` refuses in its own words.
            elif got != (expected[0], jax.dtypes.canonicalize_dtype(expected[1])):
                raise Damaged(
                    f"{item} {name} is {x.dtype}{list(x.shape)} on disk, its stamp "
                    f"says {expected[1]}{list(expected[0])}"
                )
    if "checksums" not in stamp:  # of an earlier version
        return
    found, expected = checksums_of(same), stamp["checksums"]
    for item, named in found.items():
        for name, crc in named.items():
            if crc != expected.get(item, {}).get(name):
                raise Damaged(
                    f"{item} {name} is not what was saved: its CRC-32 is {crc}, in the "
                    f"stamp {expected.get(item, {}).get(name)}. Bits of it have "
                    f"changed in the folder {item}"
                )


def _check_axes(stamp: dict[str, Any]) -> None:
    for item, records in stamp["leaves"].items():
        for name, record in records.items():
            axis, axes = record.get("packed_axis"), len(record["shape"])
            if axis is not None and axis >= axes:
                raise Damaged(
                    f"{STAMP}/metadata says that {item} {name} is packed along axis "
                    f"{axis} of {axes}"
                )


def _written_as(record: _leaves.Record) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and type on disk; None for typed keys, whose data JAX defines."""
    if "impl" in record:
        return None
    shape = tuple(record["shape"])
    if "packed_axis" in record:
        return _bits.packed_shape(shape, record["packed_axis"]), np.dtype(np.uint8)
    return shape, _types.type_of(record["dtype"])
