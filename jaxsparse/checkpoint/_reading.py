"""Reads the arrays of a checkpoint and checks them against the stamp."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxsparse._checksums import checksums
from jaxsparse._text import shown
from jaxsparse.checkpoint import _leaves, _packing, _types
from jaxsparse.checkpoint._files import STAMP, Damaged

Tree = dict[str, dict[str, Any]]


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
    written = _read_alone(path, args) if alone else _read_together(path, args)
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
    if not args:  # orbax takes nothing for everything
        return {}
    wanted = {
        item: ocp.args.PyTreeRestore(restore_args=named) for item, named in args.items()
    }
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
            one = ocp.args.PyTreeRestore(
                item={name: 0}, restore_args={name: how}, partial_restore=True
            )
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
        return _packing.packed_shape(shape, record["packed_axis"]), np.dtype(np.uint8)
    return shape, _types.type_of(record["dtype"])
