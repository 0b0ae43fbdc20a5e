"""The directories of the steps: which are whole, which are left from a kill.

In a directory of checkpoints there are

- `7`: step 7, whole. Orbax writes aside and renames, so it is whole once it is there;
- `7.orbax-checkpoint-tmp`: being written, or left by a process killed in mid-save;
- `7.replacement`: step 7 saved once more, whole, and not yet in the place of `7`. It
  counts before `7`, which may be gone already;
- `7.removed`: being deleted. It is renamed first, so that no half-deleted `7` is seen;
- `.lock`: which run saves here (see `_lock`).

Anything else belongs to others and is neither read nor touched. A checkpoint of which
files are missing, cut off or changed (see `_files`) is not listed; it is still ours, to
be named by `restore`, replaced by `save`, and deleted when it is old.
"""

import contextlib
import errno
import operator
import os
import pathlib
import re
import shutil
from typing import Any

from jaxsparse import _checks
from jaxsparse.checkpoint import _files, _lock
from jaxsparse.checkpoint._stamp import FORMAT

_REPLACEMENT = ".replacement"
_REMOVED = ".removed"
_LEFTOVER = re.compile(r"\d+(\.replacement)?(\.removed|\.orbax-checkpoint-tmp.*)")
_WHOLE = re.compile(r"(0|[1-9]\d*)(\.replacement)?")

Directory = str | os.PathLike[str]


def steps(directory: Directory) -> list[int]:
    """List the steps that have a complete checkpoint.

    Args:
      directory: where `save` puts them. It need not exist.

    Returns:
      The steps, ascending. It leaves out half-written checkpoints, other files, and
      checkpoints with a missing file, a file of another size, or a changed file (of up
      to 64 KiB, or the stamp). For each step that costs the small files read, and one
      look at the size of the others. Flipped bits within large files are found by
      `restore`, which checks the CRC-32 of every array.

    Raises:
      ValueError: an address such as `gs://...`, which is not a directory.
      NotADirectoryError: a file.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxsparse as js
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     for step in (10, 20):
      ...         path = js.checkpoint.save(
      ...             directory, step=step, params={"w": jnp.ones(2)})
      ...     js.checkpoint.steps(directory)
      [10, 20]
    """
    return sorted(whole(as_directory(directory)))


def latest_step(directory: Directory) -> int | None:
    """Return the newest step that has a complete checkpoint.

    Args:
      directory: where `save` puts them. It need not exist.

    Returns:
      The step, or None if there is none. `steps` says what counts as complete.

    Raises:
      ValueError: an address such as `gs://...`, which is not a directory.
      NotADirectoryError: a file.

    Example:
      >>> import jaxsparse as js
      >>> js.checkpoint.latest_step("not/yet/there") is None
      True
    """
    found = present(as_directory(directory))
    newest_first = sorted(found, reverse=True)
    return next((s for s in newest_first if _files.is_whole(found[s], FORMAT)), None)


def as_directory(directory: Directory) -> pathlib.Path:
    """An absolute path."""
    text = os.fspath(directory)
    if "://" in text:
        raise ValueError(
            f"directory: expected a directory, local or mounted, got {text!r}. An "
            "object store cannot rename, and a checkpoint becomes whole by being "
            "renamed."
        )
    return pathlib.Path(text).absolute()


def as_step(step: Any) -> int:
    """A step as a Python integer."""
    if not isinstance(step, bool):
        with contextlib.suppress(TypeError):  # said below
            step = operator.index(step)
    _checks.check_positive_int(step, name="step", least=0)
    return step


def present(directory: pathlib.Path) -> dict[int, pathlib.Path]:
    """The checkpoints in a directory, also those that are damaged."""
    found: dict[int, pathlib.Path] = {}
    try:
        entries = sorted(directory.iterdir())  # `7.replacement` comes after `7`
    except FileNotFoundError:
        return found
    for path in entries:
        match = _WHOLE.fullmatch(path.name)
        # A directory of that name that others made has no stamp.
        if match and (path / _files.STAMP).is_dir():
            step = int(match[1])
            if step not in found or _files.is_whole(path, FORMAT):
                found[step] = path
    return found


def whole(directory: pathlib.Path) -> dict[int, pathlib.Path]:
    """The whole checkpoints in a directory."""
    found = present(directory)
    return {s: path for s, path in found.items() if _files.is_whole(path, FORMAT)}


def open_for_writing(directory: pathlib.Path) -> None:
    """Makes the directory, takes it, and tidies up what a killed process left in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot make this directory for checkpoints ({error.strerror})",
            os.fspath(error.filename or directory),
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OSError(
            errno.EACCES,
            "cannot write checkpoints into this directory. Save into another one, or "
            "change its permissions",
            os.fspath(directory),
        )
    _lock.take(directory)
    for path in sorted(directory.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
        elif path.name.endswith(_REPLACEMENT) and _WHOLE.fullmatch(path.name):
            if path in present(directory).values():
                put_in_place(path)
            else:  # damaged, and what it was to replace is there
                remove(path)


def clear(path: pathlib.Path) -> None:
    """Deletes what a save that failed has written of a step."""
    for left in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    if path.exists():
        remove(path)


def path_to_write(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Where to write a step: nothing may be there yet."""
    path = directory / str(step)
    if not path.exists():
        return path
    if step not in present(directory):
        raise FileExistsError(
            errno.EEXIST,
            "this is in the way and is not a checkpoint of jaxsparse, so it is not "
            "replaced. Move it, or save into another directory",
            os.fspath(path),
        )
    return directory / f"{step}{_REPLACEMENT}"


def put_in_place(path: pathlib.Path) -> pathlib.Path:
    """Lets a whole replacement take the place of what it replaces."""
    if not path.name.endswith(_REPLACEMENT):
        return path
    target = path.with_suffix("")
    if target.exists():
        remove(target)
    return path.rename(target)


def remove_older(directory: pathlib.Path, step: int, keep: int) -> None:
    """Deletes old checkpoints, after a new one is whole."""
    found = {s: path for s, path in present(directory).items() if s < step}
    kept = sorted(s for s in found if _files.is_whole(found[s], FORMAT))
    for old in set(found) - set(kept[max(0, len(kept) - (keep - 1)) :]):
        remove(found[old])


def remove(path: pathlib.Path) -> None:
    """Deletes a checkpoint so that it is never seen half-deleted."""
    aside = path.with_name(path.name + _REMOVED)
    path.rename(aside)
    shutil.rmtree(aside)
