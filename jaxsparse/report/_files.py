"""Files that are either whole or not there."""

import os
import pathlib


def replace_file(path: str | os.PathLike[str], content: bytes) -> pathlib.Path:
    """Writes a file beside `path`, then puts it in its place in one step.

    Who reads `path` meanwhile sees the old file or the new one, never a part; when the
    disk is full, the old one stays.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path}: the folder {str(path.parent)!r} does not exist. Create it first."
        )
    # Not `tempfile`: its files are closed to other users, and so would be the report.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path
