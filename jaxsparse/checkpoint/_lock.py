"""One run writes into a directory of checkpoints: a file in it says which.

`.lock` holds the host, the process and when that began, so that a number which another
process has got since is not taken for it. It is made with the first save and goes when
the process ends; of one that was killed it stays, and the next run on the same machine
takes it over. Whether a process of another host is alive cannot be seen: there the
user decides.
"""

import atexit
import contextlib
import errno
import json
import os
import pathlib
import platform
import secrets
import threading
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

NAME = ".lock"
_KEYS = {"host", "boot", "processes", "process", "began", "directory"}
_TRIES = 100
SAVING = threading.Lock()
"""Of two threads that save at once one waits."""

_kept: dict[pathlib.Path, "_Kept"] = {}


class _Kept(NamedTuple):
    """What this process holds: what the file says, which it is, and it opened."""

    own: dict[str, Any]
    identity: tuple[int, ...] | None
    handle: int


def take(directory: pathlib.Path) -> None:
    """Lets this process be the one that writes into a directory, until it ends."""
    file = directory / NAME
    if file in _kept and _kept[file].identity == _identity(file):
        return
    own = _here() | {
        "process": os.getpid(),
        "began": _began(os.getpid()),
        "directory": directory.stat().st_ino,
    }
    for _ in range(_TRIES):
        if _made(file, json.dumps(own)):
            break
        text = _read(file)
        if text is None:  # gone just now
            continue
        owner = _parsed(text)
        if owner == own:
            break
        if owner is not None and _is_alive(owner, own, file) is False:
            _clear(file, text)
            continue
        raise _taken(directory, owner)
    else:
        raise _taken(directory, None)
    _keep(file, own)
    for left in directory.glob(f"{NAME}.*"):  # by a process that was killed
        left.unlink(missing_ok=True)


def _made(file: pathlib.Path, text: str) -> bool:
    """Makes the file, whole from the beginning, unless it is there."""
    aside = _beside(file)
    try:
        aside.write_text(text)
        try:
            os.link(aside, file)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if file.exists():
                return False
            os.rename(aside, file)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: no file can be written into this directory, so no "
            "checkpoint. Make room, or save into another directory",
            os.fspath(file.parent),
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return True


def _beside(file: pathlib.Path) -> pathlib.Path:
    return file.with_name(f"{NAME}.{os.getpid()}.{secrets.token_hex(4)}")


def _keep(file: pathlib.Path, own: dict[str, Any]) -> None:
    # Also locked, for processes of other containers, which do not see this one. To read
    # the file would end that, so it is known by its inode from now on.
    with contextlib.suppress(OSError):
        if file in _kept:
            os.close(_kept[file].handle)
    handle = -1
    if fcntl is not None:
        with contextlib.suppress(OSError):
            handle = os.open(file, os.O_RDWR)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _kept[file] = _Kept(own, _identity(file), handle)


def _identity(file: pathlib.Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, os.getpid()


@atexit.register
def _leave() -> None:
    for file, kept in _kept.items():
        with contextlib.suppress(OSError):
            mine = kept.own["process"] == os.getpid()
            if mine and _parsed(_read(file) or "") == kept.own:
                file.unlink()


def _clear(file: pathlib.Path, text: str) -> None:
    """Takes a dead process's file away; not that which another has just made."""
    aside = _beside(file)
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return
    if _read(aside) != text:
        with contextlib.suppress(OSError):
            os.link(aside, file)
    aside.unlink(missing_ok=True)


def _is_alive(
    owner: dict[str, Any], own: dict[str, Any], file: pathlib.Path
) -> bool | None:
    """Whether the process that a file names is there; None where it cannot be seen."""
    if owner["host"] != own["host"]:
        return None
    if owner["boot"] != own["boot"]:  # the machine was started anew
        return False
    if owner["directory"] != own["directory"]:  # the directory was copied
        return False
    if owner["processes"] == own["processes"]:
        return owner["began"] is not None and _began(owner["process"]) == owner["began"]
    return _is_locked(file)


def _is_locked(file: pathlib.Path) -> bool | None:
    if fcntl is None:
        return None
    try:
        with open(file, "r+") as handle:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    return False


def _here() -> dict[str, Any]:
    """This machine, since when it runs, and whose processes are seen from here."""
    boot = _read(pathlib.Path("/proc/sys/kernel/random/boot_id"))
    processes = None
    with contextlib.suppress(OSError):
        processes = os.readlink("/proc/self/ns/pid")
    return {"host": platform.node(), "boot": boot, "processes": processes}


def _began(process: int) -> str | None:
    """When a process began, as far as the system tells; None if there is none."""
    stat = _read(pathlib.Path(f"/proc/{process}/stat"))
    if stat is not None:  # the name, in brackets, may hold anything
        state, *rest = stat.rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    if os.path.exists("/proc/self/stat"):
        return None
    if os.name == "posix":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
    return "unknown"


def _read(file: pathlib.Path) -> str | None:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return None


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    known = isinstance(owner, dict) and owner.keys() == _KEYS
    return owner if known and type(owner["process"]) is int else None


def _taken(directory: pathlib.Path, owner: dict[str, Any] | None) -> OSError:
    who = "which its lock does not name"
    if owner is not None:
        who = f"process {owner['process']} on host {owner['host']!r}"
    return OSError(
        errno.EBUSY,
        f"another run saves its checkpoints into this directory ({who}), and two would "
        "delete each other's. Save into another directory. If that run has ended, "
        f"delete the file {NAME} in it and save again",
        os.fspath(directory),
    )
