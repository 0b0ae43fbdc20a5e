"""The library of native kernels: compiled at first use, kept in the user's cache.

The sources in `native/` are compiled for each instruction set, linked into one library
and kept as `<key>-<digest>.so`: the key is that of the sources, the flags and jaxlib,
the digest that of the file itself. So an outdated library has another name and a
damaged one shows; both are built anew. A file is written aside and then renamed:
processes that build at the same time do not disturb each other. As a rule one builds
and the others wait.
"""

import concurrent.futures
import contextlib
import ctypes
import hashlib
import importlib.resources
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax
import jaxlib.version

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fwrapv", "-ffp-contract=fast")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
)
# Where vectors are written out, the compiler makes no more of them from what is left.
_AS_WRITTEN = ("-fno-tree-vectorize", "-fno-tree-slp-vectorize")
# What is quantized is the same on every processor.
_ROUNDED = ("-ffp-contract=off",)
_COMPILERS = ("c++", "g++", "clang++")
_HANDLERS = ("matmul", "transposed", "sampled", "int8_matmul")
_SECONDS = 300
_INSTALL = (
    "install g++ or clang++ (Debian: apt install g++; macOS: xcode-select --install), "
    "or set CXX to a C++17 compiler"
)


_log = logging.getLogger("jaxsparse")


class Loaded(NamedTuple):
    """The library of this process.

    Attributes:
      variants: the instruction sets that the processor runs, the best first; empty
        where there is no library.
      problem: why there is none, in one line; "" where there is one.
    """

    variants: tuple[str, ...]
    problem: str


class BuildError(RuntimeError):
    """Why no library could be built, in one line."""


_lock = threading.Lock()
_loaded: list[Loaded] = []


def load() -> Loaded:
    """The library, which the first call of a process opens, and builds if need be."""
    with _lock:
        if not _loaded:
            _loaded.append(_load())
        return _loaded[0]


def _load() -> Loaded:
    try:
        folder = cache_folder()
        with _alone(folder):
            path = find(folder)
            library = None if path is None else _open(path)
            if library is None:
                command = compiler()
                # A warning, since it is seen without a setting: it explains a wait.
                _log.warning(
                    "Compiling kernels for this processor with %s, once, into %s: 10 "
                    "to 60 seconds. JAXSPARSE_NATIVE=off does without.",
                    shlex.join(command),
                    folder,
                )
                path = build(folder, command)
                library = ctypes.CDLL(str(path))
    except BuildError as e:
        return Loaded((), str(e))
    except OSError as e:
        return Loaded((), f"the native kernels cannot be built or opened: {e}")
    for name in _HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, f"jaxsparse_{name}"))
        jax.ffi.register_ffi_target(f"jaxsparse_{name}", handler, platform="cpu")
    library.jaxsparse_variants.restype = ctypes.c_char_p
    return Loaded(tuple(library.jaxsparse_variants().decode().split(",")), "")


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Generator[None]:
    """Lets one process build and others wait, where the system can lock files."""
    with open(folder / "lock", "a") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: pathlib.Path) -> ctypes.CDLL | None:
    """A library, or None where this system cannot use it: as that of another."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def cache_folder() -> pathlib.Path:
    """`$JAXSPARSE_CACHE`, else `jaxsparse` in the user's cache; made if need be."""
    given = os.environ.get("JAXSPARSE_CACHE")
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(given or os.path.join(users, "jaxsparse")) / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise BuildError(
            f"the native kernels have no place: {e}; set JAXSPARSE_CACHE to a folder "
            "that can be written to"
        ) from e
    return folder


def find(folder: pathlib.Path) -> pathlib.Path | None:
    """The library of these sources, flags and jaxlib; damaged ones are removed."""
    for path in sorted(folder.glob(f"{_key()}-*.so")):
        if path.stem == f"{_key()}-{_digest(path.read_bytes())}":
            return path
        path.unlink(missing_ok=True)
    return None


def compiler() -> list[str]:
    """The command of a C++ compiler: `$CXX`, or the first that is there."""
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in _COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"the native kernels need a C++ compiler: {_INSTALL}")


def build(folder: pathlib.Path, command: Sequence[str]) -> pathlib.Path:
    """Compiles the sources into a library in `folder` and returns its path."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as name:
        aside = pathlib.Path(name)
        for file, content in _sources().items():
            (aside / file).write_bytes(content)
        include = ["-isystem", jax.ffi.include_dir()]
        objects, steps = [], []
        for i, (source, flags) in enumerate(_units()):
            objects.append(f"{i}.o")
            parts = [*flags, *include, "-c", source, "-o", objects[-1]]
            steps.append([*command, *_FLAGS, *parts])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda step: _run(step, aside), steps))
        _run([*command, "-shared", "-o", "all.so", *objects], aside)
        digest = _digest((aside / "all.so").read_bytes())
        target = folder / f"{_key()}-{digest}.so"
        os.replace(aside / "all.so", target)
    return target


def _run(command: Sequence[str], folder: pathlib.Path) -> None:
    """Runs a step of a build; its first error is the message."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BuildError(
            f"the native kernels could not be compiled by {command[0]}: {e}; {_INSTALL}"
        ) from e
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if x.strip()] or ["no message"]
        errors = [x for x in lines if "error" in x.lower()] or lines
        raise BuildError(
            f"the native kernels could not be compiled by {command[0]}: "
            f"{errors[0].strip()}; {_INSTALL}"
        )


def _units() -> list[tuple[str, tuple[str, ...]]]:
    """The source files with the flags of each instruction set they are compiled for."""
    sets: dict[str, tuple[str, ...]] = {"portable": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        vnni = (*_AVX512, "-mavx512vnni")
        sets |= {"avx2": _AVX2, "avx512": _AVX512, "avx512vnni": vnni}
    # Handlers compute nothing themselves.
    units: list[tuple[str, tuple[str, ...]]] = [("handlers.cc", ("-O1",))]
    for name, flags in sets.items():
        flags = (*flags, f"-DNAMESPACE={name}")
        if name != "avx512vnni":
            units += [("structure.cc", flags), ("float32.cc", (*flags, *_AS_WRITTEN))]
        if name != "avx512":
            units.append(("int8.cc", (*flags, *_AS_WRITTEN, *_ROUNDED)))
    return units


def _sources() -> dict[str, bytes]:
    folder = importlib.resources.files("jaxsparse.kernels") / "native"
    files = {x.name: x for x in folder.iterdir() if x.name.endswith((".cc", ".h"))}
    return {name: files[name].read_bytes() for name in sorted(files)}


def _key() -> str:
    """What the library depends on, as text for a file's name."""
    built_for = jaxlib.version.__version__, sys.platform, platform.machine()
    about = repr((_sources(), _FLAGS, _units(), built_for))
    return _digest(about.encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
