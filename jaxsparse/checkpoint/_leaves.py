"""One leaf of a tree: what is said of it in the stamp, what is written, how it returns.

A record in the stamp has `shape` and `dtype`, and where it needs them

- `value`: a Python number or text, which is in the stamp itself;
- `impl`: the generator of typed random keys, written as their raw data;
- `packed_axis`: the axis along which bools are packed into bits;
- `weak`: a weakly typed array. What it meets decides the type of the result, so a
  training that is to end with the same bits needs that back too.

Arrays without elements are in the stamp alone: orbax does not write them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _bits, _checks
from jaxsparse._text import path_text, shown
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import leaves_with_paths

Record = dict[str, Any]
Sharding = jax.sharding.Sharding
Items = dict[str, dict[str, Any]]
"""By item of a checkpoint (params, opt_state, masks) and by name of a leaf."""


def map_items(f: Callable[[str, str, Any], Any], items: Items) -> Items:
    """`f(item, name, x)` for all."""
    return {
        item: {name: f(item, name, x) for name, x in named.items()}
        for item, named in items.items()
    }


def where_written(items: Items, records: Items) -> Items:
    """What of some items is on disk."""
    return {
        item: {n: x for n, x in named.items() if is_written(records[item][n])}
        for item, named in items.items()
    }


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    named: dict[str, Any] = {}
    keys, _ = jax.tree_util.tree_flatten_with_path(tree)
    for (path, leaf), (key_path, _) in zip(leaves_with_paths(tree), keys, strict=True):
        plain = path_text(key_path)
        name = (plain if shown(plain) == path else path) or "value"
        while name in named:
            name += "'"
        named[name] = leaf
    return named


def describe(name: str, leaf: Any) -> Record:
    """The shape and type of a leaf, of a template or of what is to be saved."""
    if type(leaf) in {bool, int, float, str}:  # np.float64 is a float too
        return {"shape": [], "dtype": type(leaf).__name__, "value": leaf}
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(
            f"{name}: a checkpoint holds arrays, typed random keys, Python numbers and "
            f"text; got {leaf!r} of type {type(leaf).__name__}. Keep it outside of the "
            "tree, or turn it into an array."
        )
    record: Record = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if getattr(leaf, "weak_type", False):
        record["weak"] = True
    return record


def encode(name: str, leaf: Any) -> tuple[Record, Any]:
    """What is said and what is written of a leaf."""
    record = describe(name, leaf)
    if "value" in record:
        return record, None
    if not _checks.is_concrete(leaf):
        raise TypeError(
            f"{name}: got {leaf!r}, which has no value to save. Call save outside of "
            "jit, with arrays."
        )
    if isinstance(leaf, _bits.Packed) and 0 not in leaf.shape:
        record["packed_axis"] = leaf.axis
        return record, leaf.bits
    if isinstance(leaf, np.generic):
        leaf = np.asarray(leaf)
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":
        raise TypeError(
            f"{name}: an array of {leaf.dtype} cannot be saved, only numbers and bools."
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        record["impl"] = str(jax.random.key_impl(leaf))
        leaf = jax.random.key_data(leaf)
    if 0 in leaf.shape:
        return record, None
    if isinstance(leaf, jax.Array) and _is_local(leaf.sharding):
        leaf = np.asarray(leaf)
    if leaf.dtype == np.bool_ and leaf.ndim:
        record["packed_axis"] = axis = _bits.choose_axis(leaf)
        return record, _bits.pack(leaf, axis)
    return record, leaf


def _is_local(place: Sharding) -> bool:
    # Of many processes each has its own, such as a counter that `tx.init` made. They
    # are equal; orbax writes the one of the first process if it is on the host.
    return jax.process_count() > 1 and place.is_fully_addressable


def is_written(record: Record) -> bool:
    """Whether there is an array on disk besides the record."""
    return "value" not in record and 0 not in record["shape"]


def place_of(name: str, template: Any) -> Sharding | None:
    """Where a leaf is to be put."""
    sharding = getattr(template, "sharding", None)
    if sharding is None:
        return None
    if isinstance(template, jax.Array) and not template.committed:
        return sharding if len(sharding.device_set) > 1 else None
    mesh = getattr(sharding, "mesh", None)
    if isinstance(mesh, jax.sharding.AbstractMesh):
        current = jax.sharding.get_mesh()
        if current.empty or current.abstract_mesh.shape != mesh.shape:
            raise ValueError(
                f"{name}: the template's sharding is over an abstract mesh, which "
                f"names no devices: {sharding}. Call restore inside "
                "jax.set_mesh(mesh), or give shapes with "
                "sharding=NamedSharding(mesh, spec)."
            )
        return jax.sharding.NamedSharding(
            current, sharding.spec, memory_kind=sharding.memory_kind
        )
    return sharding


def written_place(record: Record, place: Sharding | None) -> Sharding | None:
    """Where the array on disk is read to, before it becomes the leaf."""
    if place is None or _is_local(place):
        return None
    if "packed_axis" not in record:
        return place
    return _bits.whole_bytes(place, tuple(record["shape"]), record["packed_axis"])


def decode(
    name: str, written: Any, record: Record, template: Any, place: Sharding | None
) -> Any:
    """The leaf as it was saved."""
    shape = tuple(record["shape"])
    if "value" in record:
        if not hasattr(template, "dtype"):
            return record["value"]
        written = np.asarray(record["value"], template.dtype)
    elif written is None:
        written = _without_elements(shape, record, template)
    elif "packed_axis" in record:
        written = _bits.unpack(written, shape, record["packed_axis"])
    if isinstance(template, np.generic):
        return written[()]
    if isinstance(template, np.ndarray):
        return written
    leaf = jnp.asarray(written) if place is None else jax.device_put(written, place)
    if "impl" in record:
        leaf = jax.random.wrap_key_data(leaf, impl=record["impl"])
    if leaf.dtype != template.dtype:
        raise ValueError(
            f"{name}: the checkpoint holds {template.dtype}, of which JAX now makes "
            f"{leaf.dtype}. Set jax_enable_x64, or give a numpy array as template."
        )
    return _weakly_typed(leaf) if record.get("weak") else leaf


def _without_elements(shape: tuple[int, ...], record: Record, template: Any):
    if "impl" not in record:
        return np.zeros(shape, template.dtype)
    one = jax.random.key_data(jax.random.key(0, impl=record["impl"]))
    return np.zeros((*shape, *one.shape), one.dtype)


def _weakly_typed(x: Array) -> Array:
    # Only Python numbers are weakly typed, and an update keeps the type of what it
    # changes.
    zero = jnp.asarray({"f": 0.0, "c": 0j}.get(x.dtype.kind, 0))
    if zero.dtype != x.dtype:  # weak under other settings of jax_enable_x64
        return x
    zeros = jnp.broadcast_to(zero, x.shape)
    if not x.committed:
        return zeros.at[...].set(x)
    zeros = jax.device_put(zeros, x.sharding)
    return jax.device_put(zeros.at[...].set(x), x.sharding)
