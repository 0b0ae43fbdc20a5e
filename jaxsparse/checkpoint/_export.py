"""`export`: parameters as one plain file that other programs read."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxsparse._typing import PyTree
from jaxsparse.checkpoint._leaves import named_leaves
from jaxsparse.structured import Drop

_NOTE = "jaxsparse"


class Exported(NamedTuple):
    """What is read back.

    Attributes:
      params: arrays by path.
      drop: what had been dropped to make them; None where nothing was said.
    """

    params: dict[str, Any]
    drop: Drop | None


def export(
    path: str | os.PathLike[str], params: PyTree, *, drop: Drop | None = None
) -> None:
    """Writes parameters to one `.npz` or `.safetensors` file, by path.

    The file holds plain arrays under names such as `"block_0/conv/kernel"`, and as text
    what was dropped: that, the original model's code and this file are all that a
    narrowed model needs. The file is written aside and then put in place. bfloat16 and
    float8 are kept: in `.npz`, which has no such types, as their bits, with their type
    in the file's text.

    Args:
      path: ends with `.npz` or `.safetensors` (which needs the package safetensors,
        `pip install jaxsparse[safetensors]`).
      params: any pytree of arrays.
      drop: what was dropped, of `js.structured.select`.

    Raises:
      ValueError: another ending.

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
    arrays = {name: np.asarray(x) for name, x in named_leaves(params).items()}
    note: dict[str, Any] = {"types": {n: x.dtype.name for n, x in arrays.items()}}
    if drop is not None:
        indices = {n: np.asarray(i).tolist() for n, i in drop.indices.items()}
        note["drop"] = {"indices": indices, "sizes": dict(drop.sizes)}
    write = _write_npz if path.suffix == ".npz" else _write_safetensors
    _aside(path, lambda aside: write(aside, arrays, json.dumps(note)))


def load_export(path: str | os.PathLike[str]) -> Exported:
    """Reads what `export` wrote.

    Args:
      path: of the file.

    Returns:
      The arrays by path, and what was dropped. `js.tree` helps to put them into the
      structure of a model: `jax.tree.unflatten(treedef, read.params.values())` keeps
      the order of the leaves.

    Raises:
      ValueError: another ending than `.npz` or `.safetensors`, or a file that `export`
        did not write.

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
    read = _read_npz if path.suffix == ".npz" else _read_safetensors
    arrays, text = read(path)
    if text is None:
        raise ValueError(f"{path}: not a file of js.checkpoint.export.")
    note = json.loads(text)
    # In the order of the leaves, which files do not keep.
    params = {name: arrays[name] for name in note["types"]}
    dropped = note.get("drop")
    if dropped is None:
        return Exported(params, None)
    indices = {n: np.asarray(i, np.int64) for n, i in dropped["indices"].items()}
    return Exported(params, Drop(indices, dropped["sizes"]))


def _checked(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix not in {".npz", ".safetensors"}:
        raise ValueError(f"{path}: expected a name ending with .npz or .safetensors.")
    return path


def _aside(path: pathlib.Path, write: Callable[[str], None]) -> None:
    """Writes beside a file, then takes its place: it is whole or as it was."""
    handle, aside = tempfile.mkstemp(path.suffix, f".{path.stem}-", path.parent)
    os.close(handle)
    try:
        write(aside)
        os.replace(aside, path)
    except BaseException:
        pathlib.Path(aside).unlink(missing_ok=True)
        raise


def _write_npz(path: str, arrays: Mapping[str, np.ndarray], note: str) -> None:
    named: Any = {f"params/{name}": _bits(x) for name, x in arrays.items()}
    np.savez(path, note=np.array(note), **named)


def _read_npz(path: pathlib.Path) -> tuple[dict[str, Any], str | None]:
    with np.load(path) as file:
        if "note" not in file:
            return {}, None
        text = str(file["note"])
        types = json.loads(text)["types"]
        return {n: _typed(file[f"params/{n}"], t) for n, t in types.items()}, text


def _bits(x: np.ndarray) -> np.ndarray:
    """Numpy's own types as they are, others as unsigned integers of their size."""
    return x if x.dtype.kind != "V" else x.view(f"u{x.dtype.itemsize}")


def _typed(x: np.ndarray, name: str) -> np.ndarray:
    if x.dtype.name == name:
        return x
    return x.view(np.dtype(getattr(ml_dtypes, name)))


def _write_safetensors(path: str, arrays: Mapping[str, np.ndarray], note: str) -> None:
    from safetensors.flax import save_file

    save_file({n: jnp.asarray(x) for n, x in arrays.items()}, path, {_NOTE: note})


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, Any], str | None]:
    from safetensors import safe_open

    with safe_open(path, framework="flax") as file:
        note = (file.metadata() or {}).get(_NOTE)
        return {name: file.get_tensor(name) for name in file.keys()}, note  # noqa: SIM118
