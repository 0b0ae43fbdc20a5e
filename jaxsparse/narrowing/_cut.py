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

from jaxsparse.narrowing._positions import Kept, old_positions
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives.dims import Dims

Leaf = algebra.Axis


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """What is kept of each leaf."""

    kept: Mapping[Leaf, np.ndarray]  # by leaf `[*copies, size]`, as many in each copy
    copies: Mapping[Leaf, tuple[Leaf, ...]]  # by leaf the leaves that have copies of it

    @functools.cached_property
    def _sizes(self) -> dict[algebra.Axis, int]:
        return {}

    def size(self, axis: algebra.Axis) -> int:
        """The new size of an axis."""
        node = algebra.find(axis)
        known = self._sizes
        if node not in known:
            if not node.parts:
                kept = self.kept.get(node)
                found = node.size if kept is None else int(kept.sum(-1).max())
            elif node.is_sum:
                found = sum(map(self.size, algebra.parts(node)))
            else:
                found = math.prod(map(self.size, node.parts))
            known[node] = found
        return known[node]

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
            kept = self.kept.get(leaf)
            if kept is not None:
                one = kept.reshape(-1, leaf.size)
                one = one[np.argmax(one.sum(-1))]
                stays &= (index < 0) | one[index]
        return int(stays[:at].sum())

    def mask(self, dims: Dims) -> np.ndarray:
        """What stays of an array, as a mask that broadcasts to it.

        It is as long as the array along axes that lose something, and along those in
        which the copies lie of what loses.
        """
        tables, rank = list(map(algebra.coordinates, dims)), len(dims)
        whole = np.ones((1,) * rank, bool)
        for at, table in enumerate(tables):
            for leaf, index in table:
                if leaf not in self.kept:
                    continue
                copies = [_along(_copy(tables, at, b), rank) for b in self.copies[leaf]]
                own = _along((at, index), rank)
                whole = whole & (self.kept[leaf][(*copies, own)] | (own < 0))
        return whole

    def positions(self, dims: Dims) -> list[np.ndarray]:
        """For each axis of an array the old positions of what stays in it."""
        return old_positions(dims, self._left)

    @functools.cached_property
    def _left(self) -> Kept:
        # Every copy keeps the same number of indices: they fill an array.
        table = lambda kept: np.nonzero(kept)[-1].reshape(*kept.shape[:-1], -1)
        indices = {leaf: table(kept) for leaf, kept in self.kept.items()}
        return Kept(self.size, indices, self.copies)

    def take(self, x: Any, dims: Dims) -> Any:
        """An array without what goes."""
        if not self.touches(dims):
            return x
        return _taken(x, self.positions(dims))

    def take_in_turn(
        self, x: Any, dims: Dims, around: Sequence[tuple[algebra.Axis, Any]]
    ) -> Any:
        """An array of one turn of scans without what goes in this turn."""
        if not self.touches(dims):
            return x
        layers = [axis for axis, _ in around]
        found = self.positions((*layers, *dims))[len(layers) :]
        # What is the same in all turns has one row for them.
        turns = lambda index: tuple(
            number if n > 1 else 0
            for (_, number), n in zip(around, index.shape, strict=False)
        )
        return _taken(x, [jnp.asarray(index)[turns(index)] for index in found])

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


def _taken(x: Any, positions: Sequence[Any]) -> Any:
    """An array at positions that broadcast to the new shape, one array for each axis.

    An axis at a time, the one that leaves least first; after those that its positions
    depend on.
    """
    host = isinstance(x, np.ndarray)
    pick = np.take if host else functools.partial(jnp.take, mode="clip")
    along = np.take_along_axis if host else jnp.take_along_axis
    shape = np.broadcast_shapes(*(index.shape for index in positions))
    left = [at for at, n in enumerate(shape) if n < x.shape[at]]
    left.sort(key=lambda at: (positions[at].size, shape[at] / x.shape[at]))
    waits = lambda at: any(i != at and positions[at].shape[i] > 1 for i in left)
    while left:
        at = next((at for at in left if not waits(at)), None)
        if at is None:  # each depends on another one
            rank = len(shape)
            now = [_along((i, np.arange(n)), rank) for i, n in enumerate(x.shape)]
            return x[tuple(positions[i] if i in left else now[i] for i in range(rank))]
        left.remove(at)
        index = positions[at]
        if index.size == index.shape[at]:
            x = pick(x, index.reshape(-1), axis=at)
        else:
            x = along(x, index, axis=at)
    return x
