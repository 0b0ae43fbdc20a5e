"""`export`: parameters as one plain file that other programs read."""

import json
import os
import pathlib
import tempfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse import _checks
from jaxsparse._checksums import checksum
from jaxsparse._host import on_host, spans_processes
from jaxsparse._text import shown
from jaxsparse._typing import PyTree
from jaxsparse.checkpoint import _note, _plain, _types
from jaxsparse.checkpoint._leaves import named_leaves
from jaxsparse.checkpoint._many import by_the_first
from jaxsparse.checkpoint._npz import Npz, TooLarge, write_npz
from jaxsparse.checkpoint._safetensors import Safetensors, write_safetensors
from jaxsparse.coupling import Drop


class Exported(NamedTuple):
    """The result of `load_export`.

    Attributes:
      params: NumPy arrays by path.
      drop: the channels dropped to make them, or None if the file does not say.
    """

    params: dict[str, Any]
    drop: Drop | None


def export(
    path: str | os.PathLike[str], params: PyTree, *, drop: Drop | None = None
) -> None:
    """Write parameters to one `.npz` or `.safetensors` file, by path.

    The file holds plain arrays under names such as `"block_0/conv/kernel"`, and the
    dropped channels as text. A narrowed model needs this file and the original model's
    code, nothing else. The file is written aside and then put in place.

    Every value and type comes back as it was, whether JAX knows it or not: nothing
    passes through JAX, which would cut int64 and float64 to 32 bits. A type that the
    format lacks (bfloat16, float8 and int4 in `.npz`; int4, float4 and the rarer float8
    in `.safetensors`) is written as unsigned integers of its size, with its name in the
    file's text. A type that cannot be kept is an error.

    The CRC-32 of each array is stored too, and `load_export` checks it.

    Args:
      path: ends with `.npz` or `.safetensors`.
      params: any pytree of arrays or Python numbers; numbers become arrays. Arrays that
        lie on several processes are gathered: then all of them call it, and the first
        one writes.
      drop: the dropped channels, from `js.channels.drop_lowest`.

    Raises:
      ValueError: another ending; a mask (in `masks` of a tree that has `params`) that
        does not fit its parameter; indices in `drop` that are not of their groups.
      OSError: the file cannot be written, for its folder or a full disk.
      TypeError: a leaf that is not an array of numbers or bools, or has a type that the
        format cannot keep (complex128 and longdouble in `.safetensors`), with its path.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxsparse as js
      >>> params = {"a": {"kernel": jnp.ones((2, 3))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     js.checkpoint.export(f"{folder}/m.npz", params)
      ...     read = js.checkpoint.load_export(f"{folder}/m.npz")
      >>> read.params["a/kernel"].shape
      (2, 3)
    """
    path = _checked(path)
    npz = path.suffix == ".npz"
    leaves = named_leaves(params)
    arrays = {name: _on_host(shown(name), x) for name, x in leaves.items()}
    stored = {
        name: _plain.stored(shown(name), x, npz=npz) for name, x in arrays.items()
    }
    note: dict[str, Any] = {
        "types": {name: _types.type_name(x.dtype) for name, x in arrays.items()},
        "shapes": {name: x.shape for name, x in arrays.items()},
        "crc32": {name: checksum(x) for name, x in stored.items()},
    }
    note |= _note.of_drop(drop)
    _note.check_masks({name: (x.shape, x.dtype) for name, x in arrays.items()})
    write = write_npz if npz else write_safetensors
    text = json.dumps(note)
    put = lambda aside: write(aside, stored, text, zlib.crc32(text.encode()))
    if any(map(spans_processes, leaves.values())):
        by_the_first(lambda: _aside(path, put), "export")
    else:
        _aside(path, put)


def load_export(
    path: str | os.PathLike[str], *, max_bytes: int | None = None
) -> Exported:
    """Read what `export` wrote.

    A file may come from anyone: no code in it is run, and its headers are compared with
    the file before anything is read.

    Args:
      path: the file's path.
      max_bytes: the largest size that the file may unpack to. None allows 16 times its
        size, which a file of `export` never needs; another program may have compressed
        it further.

    Returns:
      NumPy arrays by path, from both formats and with any setting of `jax_enable_x64`,
      and the dropped channels. `js.tree` helps to put them into the structure of a
      model: `jax.tree.unflatten(treedef, read.params.values())` keeps the order of the
      leaves. `jax.tree.map(jnp.asarray, ...)` makes JAX arrays of them; it cuts
      64-bit arrays unless `jax_enable_x64` is set.

    Raises:
      ValueError: another ending than `.npz` or `.safetensors`, a file that `export` did
        not write, one that unpacks to more than `max_bytes`, one with a mask that fits
        no parameter, or one that is damaged: each array is checked against the CRC-32
        that was written with it. (Older files without checksums are read unchecked.)

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     js.checkpoint.export(f"{folder}/m.npz", params)
      ...     read = js.checkpoint.load_export(f"{folder}/m.npz")
      >>> list(read.params)
      ['a/bias', 'a/kernel']
      >>> again = jax.tree.unflatten(jax.tree.structure(params), read.params.values())
      >>> again["a"]["kernel"].shape
      (2, 3)
    """
    path = _checked(path)
    if max_bytes is not None:
        _checks.check_positive_int(max_bytes, name="max_bytes")
    reader = Npz if path.suffix == ".npz" else Safetensors
    with open(path, "rb") as file:
        opened = _read(path, "the file", lambda: reader(file, max_bytes))
        text = opened.note
        if text is None:
            raise ValueError(
                f"{path}: not a file of js.checkpoint.export. Other files have no note "
                "of shapes and checksums; open them with NumPy or safetensors."
            )
        note = _read(path, "its text", lambda: _note.parsed(text, opened.crc))
        # In the order of the leaves, which files do not keep.
        params = {
            name: _read(path, name, lambda n=name: _parameter(opened, note, n))
            for name in note["types"]
        }
    kinds = {name: (x.shape, x.dtype) for name, x in params.items()}
    _read(path, "what it holds", lambda: _note.check_masks(kinds))
    dropped = note.get("drop")
    if dropped is None:
        return Exported(params, None)
    indices = {n: np.asarray(i, np.int64) for n, i in dropped["indices"].items()}
    return Exported(params, Drop(indices, dropped["sizes"]))


def _checked(path: str | os.PathLike[str]) -> pathlib.Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path must be the name of a file, got {_checks.shown(path)}. The order is "
            "export(path, params)."
        )
    path = pathlib.Path(path)
    if path.suffix not in {".npz", ".safetensors"}:
        raise ValueError(f"{path}: expected a name ending with .npz or .safetensors.")
    return path


def _on_host(name: str, x: Any) -> np.ndarray:
    if not _checks.is_concrete(x):
        raise TypeError(
            f"{name}: got {x!r}, which has no value to write. Call export outside of "
            "jit, with arrays."
        )
    kind = getattr(x, "dtype", None)
    if jax.dtypes.issubdtype(kind, jax.dtypes.prng_key):
        raise TypeError(
            f"{name}: a typed random key, which other programs do not know. Leave it "
            "out, or export jax.random.key_data of it."
        )
    array = on_host(x)
    if not _types.is_known(array.dtype):
        raise TypeError(
            f"{name}: only numbers and bools are exported, got {array.dtype} "
            f"({type(x).__name__}). Leave it out, or turn it into an array of numbers."
        )
    return array


def _parameter(opened: Any, note: dict[str, Any], name: str) -> np.ndarray:
    dtype = _types.type_of(note["types"][name])
    stored = opened.read(name)
    if "crc32" in note:
        shape = tuple(note["shapes"][name])
        expected = _plain.stored(name, np.empty(0, dtype), npz=opened.npz).dtype
        if stored.shape != shape or stored.dtype != expected:
            raise ValueError(
                f"it is {stored.dtype}{list(stored.shape)}, what was written is "
                f"{expected}{list(shape)}"
            )
        found = checksum(stored)
        if found != note["crc32"][name]:
            raise ValueError(
                f"its CRC-32 is {found}, that written with it {note['crc32'][name]}"
            )
    elif not _types.is_foreign(dtype):
        # JAX had cut it to 32 bits before it was written.
        return stored
    return stored if stored.dtype == dtype else _plain.retyped(stored, dtype)


def _read(path: pathlib.Path, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    # Of what is damaged, readers make errors of every kind.
    except Exception as error:
        said = shown(str(error) or type(error).__name__)
        if isinstance(error, TooLarge):
            raise ValueError(
                f"{path}: {said}. If you know who made it and expect that much, call "
                "load_export with a larger max_bytes."
            ) from None
        raise ValueError(
            f"{path}: {shown(what)} cannot be read as it was written: {said}. The file "
            "is damaged, or was changed by another program. Take a copy of it, or "
            "export the parameters again."
        ) from error


def _aside(path: pathlib.Path, write: Callable[[str], None]) -> None:
    """Writes beside a file, then takes its place: it is whole or as it was."""
    aside: str | None = None
    try:
        handle, aside = tempfile.mkstemp(path.suffix, f".{path.stem}-", path.parent)
        os.close(handle)
        write(aside)
        os.replace(aside, path)
    except BaseException as error:
        if aside is not None:
            pathlib.Path(aside).unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: the parameters could not be exported to this file. "
            "What was there is as it was. Make room, change the permissions of its "
            "folder, or export to another one",
            os.fspath(path),
        ) from error
