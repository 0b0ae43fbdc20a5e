"""The files of a checkpoint: what tells, without reading arrays, that all are there.

Two things say it. The stamp has a CRC-32 of itself. And once orbax has written a
checkpoint and renamed it, a list of its files is put beside the stamp: their sizes, and
the CRC-32 of those up to a MiB, which orbax's own descriptions are. It has a CRC-32 of
itself too. A checkpoint without the list (killed in between, or of an earlier version)
is whole as far as its stamp and its folders say.

To look costs the stamp, the list and the files up to 64 KiB read, and the size of the
others. Bits that are flipped within larger ones are found when arrays are read, by
their own checksums.
"""

import json
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

from jaxsparse.checkpoint import _schema

STAMP = "stamp"
_TEXT = "metadata"  # as orbax calls it
_LIST = "files.json"
_UNREAD = {_LIST, "commit_success.txt"}
_WITH_CRC = 1 << 20  # bytes
SMALL = 1 << 16
"""Up to how many bytes a file is read to see whether a checkpoint is whole."""


class Damaged(ValueError):
    """Says what of a checkpoint is not as it was written; `restore` says the rest."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Adds a CRC-32 of all the rest."""
    return content | {"crc32": _crc(content)}


def _crc(content: dict[str, Any]) -> int:
    rest = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def list_files(path: pathlib.Path) -> None:
    """Writes the list of the files of a checkpoint that is complete."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name not in _UNREAD:
            size = file.stat().st_size
            crc = zlib.crc32(file.read_bytes()) if size <= _WITH_CRC else None
            files[file.relative_to(path).as_posix()] = [size, crc]
    aside = path / STAMP / f"{_LIST}.tmp"
    aside.write_text(json.dumps(sealed({"files": files})))
    os.replace(aside, path / STAMP / _LIST)


def read_stamp(path: pathlib.Path) -> dict[str, Any]:
    """The stamp of a checkpoint."""
    return _read(path, f"{STAMP}/{_TEXT}")


def check_stamp(stamp: dict[str, Any]) -> None:
    """Raises unless a stamp is as it was written."""
    _check_crc(stamp, f"{STAMP}/{_TEXT}")
    _of_schema(f"{STAMP}/{_TEXT}", lambda: _schema.check_content(stamp))


def check(path: pathlib.Path, stamp: dict[str, Any], *, up_to: int | None) -> None:
    """Raises unless all files are there, as far as one sees without reading arrays."""
    if (path / STAMP / _LIST).exists():
        listed = _read(path, f"{STAMP}/{_LIST}")
        _check_crc(listed, f"{STAMP}/{_LIST}", needed=True)
        _of_schema(f"{STAMP}/{_LIST}", lambda: _schema.check_list(listed))
        for name, (size, crc) in listed["files"].items():
            found = _size(path / name)
            if found != size:
                got = "is missing" if found is None else f"has {found} bytes"
                raise Damaged(f"{name} {got}, {size} bytes were written")
            if crc is not None and (up_to is None or size <= up_to):
                found = zlib.crc32((path / name).read_bytes())
                if found != crc:
                    raise Damaged(f"{name} has the CRC-32 {found}, written was {crc}")
        return
    for item, records in stamp["leaves"].items():
        for name, record in records.items():
            written = "value" not in record and 0 not in record["shape"]
            if written and not (path / item).is_dir():
                raise Damaged(f"the folder {item} is missing, which holds {name}")


def is_whole(path: pathlib.Path, newest_format: int) -> bool:
    """Whether a checkpoint is whole, as far as `check` sees."""
    try:
        stamp = read_stamp(path)
        if not isinstance(stamp.get("format"), int):
            return False
        if stamp["format"] <= newest_format:
            check_stamp(stamp)
            check(path, stamp, up_to=SMALL)
    except Damaged:
        return False
    return True


def _read(path: pathlib.Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((path / name).read_bytes())
    # UnicodeDecodeError is a ValueError; lists may be nested too deeply to read.
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise Damaged(f"{name} holds no dictionary")
    return found


def _of_schema(name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except ValueError as error:
        raise Damaged(f"{name} is none of js.checkpoint.save: {error}") from error


def _check_crc(content: dict[str, Any], name: str, *, needed: bool = False) -> None:
    # A stamp of an earlier version has no checksums at all.
    written, found = content.get("crc32"), _crc(content)
    if written is None and not needed and "checksums" not in content:
        return
    if written != found:
        raise Damaged(f"{name} has the CRC-32 {found}, that written is {written}")


def _size(path: pathlib.Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
