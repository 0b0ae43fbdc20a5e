"""Reads the arrays of a checkpoint and checks them against the stamp."""

import math
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxsparse import _bits
from jaxsparse._checksums import checksums
from jaxsparse._host import give_back_memory
from jaxsparse._parts import parts_of
from jaxsparse._text import shown
from jaxsparse.checkpoint import _leaves, _types
from jaxsparse.checkpoint._files import STAMP, Damaged
from jaxsparse.checkpoint._leaves import Items

_LEAST = 1 << 24  # bytes; what is smaller is not worth a reading of its own


def checkpointer() -> ocp.Checkpointer:
    """Orbax for a checkpoint of several items."""
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def checksums_of(arrays: Items) -> dict[str, dict[str, int]]:
    """The CRC-32 of each array."""
    flat = {(item, n): x for item, named in arrays.items() for n, x in named.items()}
    crcs = checksums(flat)
    return _leaves.map_items(lambda item, name, _: crcs[item, name], arrays)


def read(
    path: pathlib.Path, stamp: dict[str, Any], templates: Items, *, alone: bool
) -> Items:
    """The leaves of each item, in the order of its template and where that lies."""
    _check_axes(stamp)
    records = stamp["leaves"]
    leaves: Items = {item: {} for item in templates}
    sizes = {
        (item, name): _bytes_of(records[item][name])
        for item, named in templates.items()
        for name in named
    }
    # Some at a time: what is read lies beside what is made of it.
    parts = parts_of(sizes, _LEAST)
    for keys in parts:
        part: Items = {}
        for item, name in keys:
            part.setdefault(item, {})[name] = templates[item][name]
        read_now = _read_part(path, stamp, part, alone=alone, partial=len(parts) > 1)
        for item, named in read_now.items():
            leaves[item] |= named
        del read_now
        if len(parts) > 1:
            give_back_memory()
    return leaves


def _bytes_of(record: _leaves.Record) -> int:
    """How many bytes an array takes on disk, about."""
    if not _leaves.is_written(record):
        return 0
    shape, dtype = _written_as(record) or (record["shape"], np.dtype(np.uint64))
    return math.prod(shape) * dtype.itemsize


def _read_part(
    path: pathlib.Path,
    stamp: dict[str, Any],
    templates: Items,
    *,
    alone: bool,
    partial: bool,
) -> Items:
    records = stamp["leaves"]
    said = lambda item, name: shown(f"{item} {name}")
    place_of = lambda item, name, x: _leaves.place_of(said(item, name), x)
    places = _leaves.map_items(place_of, templates)

    def args_of(item: str, name: str, place: Any) -> ocp.RestoreArgs:
        return _restore_args(_leaves.written_place(records[item][name], place))

    args = _leaves.map_items(args_of, _leaves.where_written(places, records))
    args = {item: named for item, named in args.items() if named}
    together = lambda: _read_together(path, args, partial)
    written = _read_alone(path, args) if alone else together()
    _check(written, stamp)

    def decode(item: str, name: str, template: Any) -> Any:
        x = written.get(item, {}).get(name)
        given = records[item][name], template, places[item][name]
        return _leaves.decode(said(item, name), x, *given)

    return _leaves.map_items(decode, templates)


def check_arrays(path: pathlib.Path, stamp: dict[str, Any]) -> None:
    """Reads every array, one at a time, onto the host."""
    _check_axes(stamp)
    for item, records in stamp["leaves"].items():
        for name in records:
            if _leaves.is_written(records[name]):
                one = {item: {name: _restore_args(None)}}
                _check(_read_alone(path, one), stamp)


def _all(named: dict[str, ocp.RestoreArgs]) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(restore_args=named)


def _some(named: dict[str, ocp.RestoreArgs]) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=dict.fromkeys(named, 0), restore_args=named, partial_restore=True
    )


def _read_together(path: pathlib.Path, args: Items, partial: bool) -> Items:
    if not args:  # orbax takes nothing for everything
        return {}
    wanted = {item: (_some if partial else _all)(named) for item, named in args.items()}
    try:
        with checkpointer() as reader:
            return reader.restore(path, args=ocp.args.Composite(**wanted))
    except Exception:
        # Most of its errors name no parameter. Of many processes none reads alone.
        if jax.process_count() == 1:
            _read_alone(path, args)
        raise


def _read_alone(path: pathlib.Path, args: Items) -> Items:
    found: Items = {item: {} for item in args}
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


def _check(written: Items, stamp: dict[str, Any]) -> None:
    same: Items = {item: {} for item in written}
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
