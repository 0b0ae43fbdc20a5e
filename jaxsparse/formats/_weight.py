"""A pruned kernel on its way into a format: its matrices, what is kept, where it lies.

All formats describe matrices `[*batch, d_out, d_in]`. What a mask keeps is known on the
host, so that shapes are static; the weights themselves may be traced.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse import _checks
from jaxsparse._host import on_host
from jaxsparse._sharded import fitting
from jaxsparse._typing import Array
from jaxsparse.tree import MatrixView, to_matrices


class Place(NamedTuple):
    """Where a kernel's layers and outputs lie.

    Attributes:
      pieces: into how many parts its outputs are split over devices.
      mesh: the mesh, or None where a kernel is on one device or traced.
      batch: what a `PartitionSpec` says of each batch axis.
      output: what it says of the outputs.
    """

    pieces: int = 1
    mesh: Any = None
    batch: tuple[Any, ...] = ()
    output: Any = None


class Weight(NamedTuple):
    """A kernel and the mask of its kept weights.

    Attributes:
      path: the parameter's path, for messages.
      matrices: `[*batch, d_out, d_in]`, of NumPy or traced.
      kept: bools of that shape.
      view: how the matrices are found in the parameter.
      place: where the parameter lies.
    """

    path: str
    matrices: Any
    kept: np.ndarray
    view: MatrixView
    place: Place

    @property
    def itemsize(self) -> int:
        """The bytes of a weight."""
        return np.dtype(self.matrices.dtype).itemsize


def weight_of(path: str, w: Array, mask: Any, view: MatrixView) -> Weight:
    """Return a kernel in the form that formats take."""
    kept = np.broadcast_to(on_host(mask), view.shape)
    traced = not _checks.is_concrete(w)
    matrices: Any = to_matrices(w, view) if traced else to_matrices(on_host(w), view)
    place = Place() if traced else _place_of(w, view)
    return Weight(path, matrices, to_matrices(kept, view), view, place)


def _place_of(w: Any, view: MatrixView) -> Place:
    sharding = getattr(w, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return Place()
    axes, spec = view.axes, (*sharding.spec, *[None] * len(view.shape))
    if view.split != view.shape:  # a part of an axis is a batch
        return Place(mesh=sharding.mesh, batch=(None,) * len(axes.batch))
    output = spec[axes.output[0]] if axes.output else None
    names = output if isinstance(output, tuple) else (output,) if output else ()
    pieces = math.prod(sharding.mesh.shape[name] for name in names)
    if pieces == 0 or view.shape[axes.output[0]] % pieces:
        output, pieces = None, 1
    return Place(pieces, sharding.mesh, tuple(spec[a] for a in axes.batch), output)


def placed(x: np.ndarray, place: Place, axis: int | None) -> Array:
    """An array of the host's on the devices; `axis` is that of the outputs, if any."""
    if place.mesh is None:
        return jnp.asarray(x)
    spec = [*place.batch, *[None] * (x.ndim - len(place.batch))]
    if axis is not None:
        spec[axis] = place.output
    sharding = NamedSharding(place.mesh, PartitionSpec(*spec))
    return jax.device_put(x, fitting(sharding, x.shape))


def taken(units: Any, index: np.ndarray) -> Any:
    """`units[index]` along the first axis, bit for bit; 0 where an index is -1."""
    none = (index < 0).reshape(*index.shape, *[1] * (units.ndim - 1))
    zero = np.zeros((), units.dtype)
    if isinstance(units, np.ndarray):
        found = (
            units[index]
            if len(units)
            else np.zeros((*index.shape, *units.shape[1:]), units.dtype)
        )
        return np.where(none, zero, found)
    found = units.at[jnp.asarray(np.maximum(index, 0))].get(mode="clip")
    return jnp.where(none, zero, found)


class Rows(NamedTuple):
    """Kept units row after row, in pieces of equal length.

    Attributes:
      index: `[*batch, pieces, length]`, the place of each among all units; -1 behind
        the last of a piece.
      column: the place in its row, 0 behind the last.
      offsets: `[*batch, pieces, rows / pieces + 1]`, where each row begins.
    """

    index: np.ndarray
    column: np.ndarray
    offsets: np.ndarray


def rows_of(kept: np.ndarray, pieces: int) -> Rows:
    """Where the kept units of `[*batch, rows, columns]` are."""
    *batch, rows, columns = kept.shape
    flat = kept.reshape(math.prod(batch) * pieces, -1)
    counts = flat.sum(1, dtype=np.int64)
    length = int(counts.max(initial=0))
    if length >= 2**31:
        raise ValueError(
            f"A kernel keeps {length:,} weights in one piece; formats count them in 32 "
            "bits. Shard it along its outputs."
        )
    at = np.flatnonzero(flat)
    starts = np.cumsum(counts) - counts
    index = np.full((len(flat), length), -1, np.int64)
    index[
        np.repeat(np.arange(len(flat)), counts),
        np.arange(at.size) - np.repeat(starts, counts),
    ] = at
    in_row = kept.reshape(len(flat), rows // pieces, columns).sum(2, dtype=np.int32)
    offsets = np.zeros((len(flat), rows // pieces + 1), np.int32)
    np.cumsum(in_row, axis=1, out=offsets[:, 1:])
    column = np.where(index < 0, 0, index % max(1, columns))
    shaped = lambda x: x.reshape(*batch, pieces, x.shape[1])
    return Rows(shaped(index), shaped(column), shaped(offsets))


def index_type(count: int) -> np.dtype:
    """The smallest type of an index below `count`: two bytes, else four."""
    return np.dtype(np.uint16 if count <= 2**16 else np.uint32)


def row_of_each(offsets: Array, length: int) -> Array:
    """The row of each slot `[..., length]`; behind the last rows that are not there."""
    *lead, ends = offsets.shape
    rows, slots = ends - 1, jnp.arange(length, dtype=jnp.int32)

    def find(ends: Array) -> Array:
        row = jnp.searchsorted(ends, slots, side="right").astype(jnp.int32)
        return jnp.where(row < rows, row, rows + slots)  # each another one

    flat = offsets[..., 1:].reshape(math.prod(lead), rows)
    return jax.vmap(find)(flat).reshape(*lead, length)


def spread(units: Array, column: Array, offsets: Array, columns: int) -> Array:
    """Kept units where `rows_of` found them, `[*batch, rows, columns, *unit]`; else 0.

    Args:
      units: `[*batch, pieces, length, *unit]`.
      column: the place of each in its row, `[*batch, pieces, length]`.
      offsets: where each row begins, `[*batch, pieces, rows / pieces + 1]`.
      columns: how many a row has.
    """
    *batch, pieces, length = column.shape
    rows, unit = offsets.shape[-1] - 1, units.shape[column.ndim :]
    parts = math.prod(batch) * pieces

    def one(units: Array, row: Array, column: Array) -> Array:
        dense = jnp.zeros((rows, columns, *unit), units.dtype)
        # What is behind the last unit is in no row.
        return dense.at[row, column].set(units, mode="drop", unique_indices=True)

    flat = lambda x: x.reshape(parts, length)
    each = units.reshape(parts, length, *unit)
    row = flat(row_of_each(offsets, length))
    dense = jax.vmap(one)(each, row, flat(column).astype(jnp.int32))
    return dense.reshape(*batch, pieces * rows, columns, *unit)
