"""Where the entries that stay of an array have been: new positions to old ones.

A new position along an axis says for each leaf of the axis which of the indices that it
keeps is meant. What that index was is looked up in the copy (head, expert, layer) that
the array's other leaves name.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives.dims import Dims

Leaf = algebra.Axis


class Kept(NamedTuple):
    """What is kept of leaves."""

    size: Callable[[algebra.Axis], int]  # the new size of an axis
    # For each leaf that loses some the indices that it keeps, `[*copies, n]`
    indices: Mapping[Leaf, np.ndarray]
    # For each of them the leaves that have copies of it
    copies: Mapping[Leaf, Sequence[Leaf]]


def old_positions(dims: Dims, kept: Kept) -> list[np.ndarray]:
    """For each axis of an array the old positions of what stays."""
    array = _Array(dims, kept)
    return [array.old(at) for at in range(len(dims))]


class _Array:
    """One array."""

    def __init__(self, dims: Dims, kept: Kept):
        self.dims, self.kept = dims, kept
        self._new: dict[int, list[tuple[Leaf, np.ndarray]]] = {}

    def new(self, at: int) -> list[tuple[Leaf, np.ndarray]]:
        """The new index of each leaf of an axis at each new position."""
        if at not in self._new:
            node = algebra.find(self.dims[at])
            self._new[at] = _coordinates(node, self.kept.size)
        return self._new[at]

    def old(self, at: int) -> np.ndarray:
        every = np.arange(self.kept.size(self.dims[at]))
        return self._composed(self.dims[at], self._along(at, every), at)

    def _along(self, at: int, index: np.ndarray) -> np.ndarray:
        return index.reshape([-1 if i == at else 1 for i in range(len(self.dims))])

    def _composed(self, axis: algebra.Axis, new: np.ndarray, at: int) -> np.ndarray:
        """The old positions within a part of an axis."""
        node, size = algebra.find(axis), self.kept.size
        if size(node) == node.size:
            return new
        if not node.parts:
            return self._index(node, new, at)
        if node.is_sum:
            old, start, before = np.zeros_like(new), 0, 0
            for part in algebra.parts(node):
                inside = (new >= start) & (new < start + size(part))
                within = np.clip(new - start, 0, max(size(part) - 1, 0))
                old = np.where(inside, before + self._composed(part, within, at), old)
                start, before = start + size(part), before + part.size
            return old
        old, inner = np.zeros_like(new), size(node)
        for part in node.parts:
            inner //= size(part)
            within = self._composed(part, new // inner % size(part), at)
            old = old * part.size + within
        return old

    def _index(self, leaf: Leaf, new: np.ndarray, at: int) -> np.ndarray:
        """What the new indices of a leaf in one of the axes were."""
        if leaf not in self.kept.indices:
            return new
        copies = [self._copy(b, at) for b in self.kept.copies[leaf]]
        return self.kept.indices[leaf][(*copies, new)]

    def _copy(self, leaf: Leaf, at: int) -> np.ndarray:
        """The old index of a leaf for what lies in an axis; in that axis if it is."""
        for axis in (at, *(i for i in range(len(self.dims)) if i != at)):
            found = [index for x, index in self.new(axis) if x == leaf]
            if found:
                # In several segments of an axis it is at other positions of it.
                new = np.maximum(functools.reduce(np.maximum, found), 0)
                return self._index(leaf, self._along(axis, new), axis)
        # In a scan's turn the layer is not an axis: sizes are the same in all of them.
        return np.zeros((1,) * len(self.dims), int)


def _coordinates(
    node: algebra.Axis, size: Callable[[algebra.Axis], int]
) -> list[tuple[Leaf, np.ndarray]]:
    """`algebra.coordinates` at the new sizes."""
    if not node.parts:
        return [(node, np.arange(size(node)))]
    found, every = [], np.arange(size(node))
    inner, start = size(node), 0
    for part in map(algebra.find, algebra.parts(node)):
        n = size(part)
        if node.is_sum:
            inside = (every >= start) & (every < start + n)
            at, start = np.clip(every - start, 0, max(n - 1, 0)), start + n
        else:
            inner //= n
            inside, at = np.ones(len(every), bool), every // inner % n
        for leaf, index in _coordinates(part, size):
            found.append((leaf, np.where(inside, index[at], -1)))
    return found
