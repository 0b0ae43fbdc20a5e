"""`Nm`: the kept values of each group in planes, and their positions in a few bits."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array
from jaxsparse.formats._weight import Weight, placed, taken
from jaxsparse.patterns import NM
from jaxsparse.tree import MatrixView


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "positions"],
    meta_fields=["pattern", "view"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Nm:
    """A kernel with N:M sparsity as planes of values, and their positions.

    Plane `j` has the `j`-th kept weight of every group, so that programs select values
    instead of gathering them. A position takes two bits for groups of four: with values
    of `b` bytes 2:4 takes `b / 2 + 1/8` bytes a weight, 0.531 of a dense float32 and
    0.5625 of a dense bfloat16 array.

    A group that keeps fewer than `keep` has positions that do not ascend: the first
    such position ends the group, and nothing reads the values behind it.

    Attributes:
      values: `[*batch, keep, groups, d_out]`.
      positions: `[*batch, keep, ceil(groups * bits / 8), d_out]`, uint8: the positions
        within their groups, in 1, 2, 4 or 8 bits each, the first in the lowest.
      pattern: the `NM` whose structure the mask has.
      view: the kernel's shape and axes.
    """

    values: Array
    positions: Array
    pattern: NM
    view: MatrixView


def nm_of(weight: Weight, pattern: NM) -> Nm:
    """Packs a kernel."""
    groups = _groups(weight, pattern)
    order = np.argsort(~groups.kept, axis=-1, kind="stable")[..., : pattern.keep]
    there = np.arange(pattern.keep) < groups.count[..., None]
    position = np.where(there, order, _ends(order, groups.count, pattern))
    # From [*batch, d_out, groups, keep] to [*batch, keep, groups, d_out].
    planes = lambda x: np.moveaxis(np.moveaxis(x, -1, -3), -2, -1)
    group = np.arange(groups.count.size).reshape(groups.count.shape)[..., None]
    index = np.where(there, group * pattern.of + order, -1)
    values = taken(weight.matrices.reshape(-1), planes(index))
    positions = _packed(planes(position).astype(np.uint8), _bits(pattern))
    at = values.ndim - 1
    if isinstance(values, np.ndarray):
        values = placed(values, weight.place, at)
    return Nm(values, placed(positions, weight.place, at), pattern, weight.view)


class _Groups(NamedTuple):
    kept: np.ndarray  # [*batch, d_out, groups, of]
    count: np.ndarray  # [*batch, d_out, groups]


def _groups(weight: Weight, pattern: NM) -> _Groups:
    *lead, d_in = weight.kept.shape
    if d_in % pattern.of:
        raise ValueError(
            f"{weight.path}: {pattern} needs a number of inputs that {pattern.of} "
            f"divides, but this kernel of shape {weight.view.shape} has {d_in}."
        )
    kept = weight.kept.reshape(*lead, d_in // pattern.of, pattern.of)
    count = kept.sum(-1)
    wrong = count > pattern.keep
    if pattern.keep == 1:  # one position cannot say that there is none
        wrong |= count == 0
    if wrong.any():
        *_, output, group = at = np.unravel_index(np.argmax(wrong), wrong.shape)
        layer = f" of layer {tuple(map(int, at[:-2]))}" if at[:-2] else ""
        raise ValueError(
            f"{weight.path}: group {group} of output {output}{layer} keeps "
            f"{count[at]} of {pattern.of}, against {pattern}. Choose the masks with "
            "this pattern, or another format: formats.Bitmap has any mask."
        )
    return _Groups(kept, count)


def _ends(order: np.ndarray, count: np.ndarray, pattern: NM) -> np.ndarray:
    """What stands at the places of groups that keep fewer: positions that descend."""
    last = np.take_along_axis(order, np.maximum(count - 1, 0)[..., None], axis=-1)
    ends = np.repeat(last, pattern.keep, axis=-1)
    # None at all: the last position, then the first.
    first = np.arange(pattern.keep) == 0
    none = np.where(first, pattern.of - 1, 0)
    return np.where(count[..., None] == 0, none, ends)


def _bits(pattern: NM) -> int:
    """Of a position: as many as divide a byte."""
    if pattern.of > 256:
        raise ValueError(f"{pattern}: a position takes one byte, so of <= 256.")
    need = max(1, math.ceil(math.log2(pattern.of)))
    return next(bits for bits in (1, 2, 4, 8) if bits >= need)


def _packed(position: np.ndarray, bits: int) -> np.ndarray:
    """Packs along the groups, the axis before the last."""
    each = 8 // bits
    *lead, groups, d_out = position.shape
    padded = np.zeros((*lead, -(-groups // each) * each, d_out), np.uint8)
    padded[..., :groups, :] = position
    parts = padded.reshape(*lead, -1, each, d_out)
    shifts = bits * np.arange(each, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=-2).astype(np.uint8)


def nm_bytes(weight: Weight, pattern: NM) -> int:
    """What it takes; an error where the mask has another structure."""
    count = _groups(weight, pattern).count
    *lead, groups = count.shape
    outputs, each = math.prod(lead), 8 // _bits(pattern)
    values = groups * weight.itemsize
    return outputs * pattern.keep * (values + -(-groups // each))


def nm_positions(packed: Nm) -> tuple[Array, Array]:
    """`[*batch, keep, groups, d_out]`: positions, and whether a value is there."""
    bits, keep = _bits(packed.pattern), packed.pattern.keep
    each, groups = 8 // bits, packed.values.shape[-2]
    *lead, length, d_out = packed.positions.shape
    packs = packed.positions
    low = jnp.full(packs.shape, 2**bits - 1, jnp.uint8)
    parts = [packs >> jnp.full_like(packs, bits * i) & low for i in range(each)]
    position = jnp.stack(parts, axis=-2).reshape(*lead, length * each, d_out)
    position = position[..., :groups, :]
    planes = [position[..., j, :, :] for j in range(keep)]
    there = [planes[0] <= planes[1] if keep > 1 else jnp.ones(planes[0].shape, bool)]
    for before, own in itertools.pairwise(planes):
        there.append(there[-1] & (own > before))
    return position, jnp.stack(there, axis=-3)


def nm_planes(packed: Nm) -> list[Array]:
    """For each position within groups what is there, `[*batch, groups, d_out]`."""
    position, there = nm_positions(packed)
    values = packed.values
    *batch, keep, groups, d_out = values.shape
    planes = []
    for place in range(packed.pattern.of):
        plane = jnp.zeros((*batch, groups, d_out), values.dtype)
        for j in range(keep):
            at = lambda x, j=j: x[..., j, :, :]
            here = at(there) & (at(position) == place)
            plane = jnp.where(here, at(values), plane)
        planes.append(plane)
    return planes


def nm_matrices(packed: Nm) -> Array:
    """The dense matrices `[*batch, d_out, d_in]`."""
    planes = nm_planes(packed)
    *batch, groups, d_out = planes[0].shape
    dense = jnp.swapaxes(jnp.stack(planes, axis=-1), -3, -2)
    return dense.reshape(*batch, d_out, groups * packed.pattern.of)
