"""Which positions of an array stay when axes of a trace lose indices.

A `Cut` says for each leaf of the algebra of axes which of its indices are kept. From
that follow, for any array whose axes are expressions of those leaves, the new sizes,
the mask of what stays, and the array without the rest; also where each head, expert or
layer keeps indices of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse.tracing import _axes as algebra
from jaxsparse.tracing._unify import Dims

Leaf = int  # the identity of a leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """What is kept of each leaf.

    Attributes:
      kept: by leaf `[*copies, size]`, as many in each copy.
      copies: by leaf the leaves that have copies of it.
    """

    kept: Mapping[Leaf, np.ndarray]
    copies: Mapping[Leaf, tuple[Leaf, ...]]

    @functools.cached_property
    def _sizes(self) -> dict[int, int]:
        return {}

    def size(self, axis: algebra.Axis) -> int:
        """The new size of an axis."""
        node = algebra.find(axis)
        known = self._sizes
        if id(node) not in known:
            if not node.parts:
                kept = self.kept.get(id(node))
                found = node.size if kept is None else int(kept.sum(-1).max())
            elif node.is_sum:
                found = sum(map(self.size, node.parts))
            else:
                found = math.prod(map(self.size, node.parts))
            known[id(node)] = found
        return known[id(node)]

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """The new shape of an array."""
        return tuple(map(self.size, dims))

    def touches(self, dims: Dims) -> bool:
        """Whether an array loses something."""
        return any(self.size(d) != d.size for d in dims)

    def before(self, axis: algebra.Axis, at: int) -> int:
        """How many positions before one of them stay."""
        if self.size(axis) == axis.size:
            return at
        stays = np.ones(axis.size, bool)
        for leaf, index in algebra.coordinates(axis):
            kept = self.kept.get(id(leaf))
            if kept is not None:
                one = kept.reshape(-1, leaf.size)
                one = one[np.argmax(one.sum(-1))]
                stays &= (index < 0) | one[index]
        return int(stays[:at].sum())

    def masks(self, dims: Dims) -> list[tuple[int, np.ndarray]]:
        """For each occurrence of a leaf that loses indices where it stays.

        Args:
          dims: the axes of an array.

        Returns:
          The axis of the occurrence, and a mask that broadcasts to the array: along
          that axis, and along those in which the leaf's copies lie.
        """
        tables = [_table(axis) for axis in dims]
        found = []
        for at, table in enumerate(tables):
            for leaf, index in table:
                if leaf not in self.kept:
                    continue
                own = _along((at, index), len(dims))
                kept = self.kept[leaf][(*self._copies_of(leaf, tables, at), own)]
                found.append((at, kept | (own < 0)))
        return found

    def _copies_of(
        self, leaf: Leaf, tables: Sequence[Any], at: int
    ) -> list[np.ndarray]:
        """Of an occurrence in one axis, at each position which copy it belongs to."""
        rank = len(tables)
        return [_along(_copy(tables, at, b), rank) for b in self.copies[leaf]]

    def _renumbered(self, dims: Dims, at: int) -> np.ndarray:
        """The new positions along an axis of the old ones that stay.

        They rise with the old ones, but where a leaf's copies lie faster than it does:
        of (width * heads) with other widths in each head.
        """
        tables = [_table(axis) for axis in dims]

        def place(axis: algebra.Axis, old: np.ndarray) -> np.ndarray:
            node = algebra.find(axis)
            if self.size(node) == node.size:
                return old
            if not node.parts:
                copies = self._copies_of(id(node), tables, at)
                return (np.cumsum(self.kept[id(node)], -1) - 1)[(*copies, old)]
            new, start, before, inner = np.zeros_like(old), 0, 0, node.size
            for part in node.parts:
                n, left = part.size, self.size(part)
                if node.is_sum:
                    inside = (old >= start) & (old < start + n)
                    moved = before + place(part, np.clip(old - start, 0, n - 1))
                    new = np.where(inside, moved, new)
                    start, before = start + n, before + left
                else:
                    inner //= n
                    new = new * left + place(part, old // inner % n)
            return new

        return place(dims[at], _along((at, np.arange(dims[at].size)), len(dims)))

    def mask(self, dims: Dims) -> np.ndarray:
        """What stays of an array, as a mask that broadcasts to it."""
        whole = np.ones((1,) * len(dims), bool)
        for _, mask in self.masks(dims):
            whole = whole & mask
        return whole

    def positions(self, dims: Dims) -> list[np.ndarray]:
        """For each axis the old positions of what stays.

        Args:
          dims: the axes of an array.

        Returns:
          For each axis an array that broadcasts to the new shape: of one axis if it
          stays the same in all copies, of more where each copy has its own.
        """
        rank = len(dims)
        by_axis: dict[int, list[np.ndarray]] = {i: [] for i in range(rank)}
        for at, mask in self.masks(dims):
            by_axis[at].append(mask)
        found: dict[int, np.ndarray] = {}
        while len(found) < rank:
            for at, masks in by_axis.items():
                needs = {
                    i for m in masks for i in range(rank) if i != at and m.shape[i] > 1
                }
                if at in found or not needs <= found.keys():
                    continue
                whole = np.ones([dims[at].size if i == at else 1 for i in range(rank)])
                whole = whole.astype(bool)
                for m in masks:
                    whole = whole & _cut_others(m, at, needs, found)
                new = _cut_others(self._renumbered(dims, at), at, needs, found)
                found[at] = _in_order(whole, new, at)
        return [found[i] for i in range(rank)]

    def take(self, x: Any, dims: Dims) -> Any:
        """An array without what goes.

        Args:
          x: of any kind; numpy's stay numpy's.
          dims: its axes.

        Returns:
          The smaller array.
        """
        if not self.touches(dims):
            return x
        host = isinstance(x, np.ndarray)
        pick = np.take if host else functools.partial(jnp.take, mode="clip")
        along = np.take_along_axis if host else jnp.take_along_axis
        positions = self.positions(dims)
        order = sorted(range(len(dims)), key=lambda i: positions[i].size)
        alone = [i for i in order if positions[i].size == positions[i].shape[i]]
        for at in alone:
            index = positions[at].reshape(-1)
            if len(index) < x.shape[at]:
                x = pick(x, index, axis=at)
        # Those that differ in copies: an axis after those that it depends on.
        rest = [i for i in range(len(dims)) if i not in alone]
        for at in sorted(rest, key=lambda i: positions[i].size):
            x = along(x, positions[at], axis=at)
        return x

    def take_in_turn(
        self, x: Any, dims: Dims, around: Sequence[tuple[algebra.Axis, Any]]
    ) -> Any:
        """An array of one turn of scans without what goes in this turn.

        Args:
          x: the array.
          dims: its axes.
          around: the axes that the scans around it run over, each with the number of
            the turn among those that are left; it may be traced.

        Returns:
          The smaller array.
        """
        if not self.touches(dims):
            return x
        layers = [axis for axis, _ in around]
        numbers = [number for _, number in around]
        first = len(layers)
        positions = self.positions((*layers, *dims))[first:]
        for at in sorted(range(len(dims)), key=lambda i: positions[i].size):
            index = positions[at]
            if index.shape[first + at] == x.shape[at]:
                continue  # nothing goes
            # What is the same in all turns has one row for them.
            rows = [i if n > 1 else 0 for i, n in zip(numbers, index.shape, strict=False)]
            index = jnp.asarray(index)[tuple(rows)]
            x = jnp.take_along_axis(x, index, axis=at)
        return x

    def put(self, x: Any, dims: Dims) -> Any:
        """The inverse of `take`: zeros where something went."""
        if not self.touches(dims):
            return x
        whole = tuple(d.size for d in dims)
        positions = tuple(self.positions(dims))
        if isinstance(x, np.ndarray):
            out = np.zeros(whole, x.dtype)
            out[positions] = x
            return out
        return jnp.zeros(whole, x.dtype).at[positions].set(x)


def _table(axis: algebra.Axis) -> list[tuple[Leaf, np.ndarray]]:
    return [(id(leaf), index) for leaf, index in algebra.coordinates(axis)]


def _copy(tables: Sequence[Any], at: int, leaf: Leaf) -> tuple[int, np.ndarray]:
    """The axis in which a leaf lies, that one first, and its index there."""
    for axis in (at, *(i for i in range(len(tables)) if i != at)):
        found = [index for x, index in tables[axis] if x == leaf]
        if found:
            return axis, functools.reduce(np.maximum, found)
    # In a scan's turn the layer is not an axis: sizes are the same in all of them.
    return at, np.zeros(len(tables[at][0][1]), int)


def _along(place: tuple[int, np.ndarray], rank: int) -> np.ndarray:
    at, index = place
    return index.reshape([-1 if i == at else 1 for i in range(rank)])


def _cut_others(
    mask: np.ndarray, at: int, needs: set[int], found: Mapping[int, np.ndarray]
) -> np.ndarray:
    """A mask at the kept positions of the other axes that it depends on."""
    rank, mine = mask.ndim, [i for i in needs if mask.shape[i] > 1]
    if not mine:
        return mask
    index = []
    for i in range(rank):
        if i in mine:
            index.append(found[i])
        elif i == at and mask.shape[at] > 1:
            index.append(_along((at, np.arange(mask.shape[at])), rank))
        else:
            index.append(np.zeros((1,) * rank, int))
    return mask[tuple(index)]


def _in_order(mask: np.ndarray, new: np.ndarray, at: int) -> np.ndarray:
    """The positions along one axis at which a mask is true, by their new ones."""
    last = np.iinfo(new.dtype).max
    order = np.argsort(np.where(mask, new, last), axis=at, kind="stable")
    count = int(mask.sum(axis=at).max())
    return np.take(order, np.arange(count), axis=at)
