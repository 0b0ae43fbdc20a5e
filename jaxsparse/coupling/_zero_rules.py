"""Where a result is zero if its operands' masked entries are: by primitive."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxsparse.coupling._finite import Entries, Finite, Point
from jaxsparse.primitives import Masking, Primitive
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives.dims import Dims

Leaf = algebra.Axis


class Effect(NamedTuple):
    """What masking the indices of each axis does to a value.

    Attributes:
      zero: the leaves along which masked entries are zero.
      token: the value's identity.
      same: for a scan's own axis, the value that this one equals in a masked turn.
      constant: the one number of which all entries are; None where they differ.
      uniform: the axes along which masked entries are not zero but all the same.
      finite: where they are other numbers, are not finite or have no finite derivative.
    """

    zero: frozenset[Leaf]
    token: object
    same: Mapping[Leaf, object]
    constant: float | None = None
    uniform: frozenset[int] = frozenset()
    finite: Finite = Finite()

    def vanishes(self, leaf: Leaf) -> bool:
        """Whether its entries are zero where the leaf's index is masked."""
        return self.constant == 0 or leaf in self.zero

    @property
    def entries(self) -> Entries:
        """What its masked entries are, if they are numbers."""
        number = self.constant
        if number == 0:
            return Entries(self.finite.points, _ZERO)
        rest = None if number is None else Point(number)
        return Entries((*self.finite.points, (_ZERO, self.zero)), rest)


_ZERO = Point(0.0)


class Leaves:
    """The leaves of axes, by identity; those of size 1 lose nothing.

    Most values have the axes of another one: each tuple of them is looked at once.
    """

    def __init__(self):
        self._of: dict[Leaf, frozenset[Leaf]] = {}
        self._all: dict[Dims, frozenset[Leaf]] = {}
        self._twice: dict[Dims, frozenset[Leaf]] = {}

    def of(self, axis: algebra.Axis) -> frozenset[Leaf]:
        node = algebra.find(axis)
        if node not in self._of:
            leaves = algebra.leaves(node)
            self._of[node] = frozenset(x for x in leaves if x.size > 1)
        return self._of[node]

    def of_all(self, dims: Sequence[algebra.Axis]) -> frozenset[Leaf]:
        dims = tuple(dims)
        if dims not in self._all:
            self._all[dims] = frozenset().union(*map(self.of, dims))
        return self._all[dims]

    def count(self, leaf: Leaf, dims: Dims) -> int:
        """In how many axes a leaf occurs."""
        return sum(leaf in self.of(axis) for axis in dims)

    def twice(self, dims: Dims) -> frozenset[Leaf]:
        """The leaves that occur in several axes; mostly there are none."""
        if dims not in self._twice:
            once, again = frozenset(), frozenset()
            for found in map(self.of, dims):
                again |= once & found
                once |= found
            self._twice[dims] = again
        return self._twice[dims]


def vanishing(
    eqn: Any,
    row: Primitive,
    ins: Sequence[Effect],
    before: Sequence[Dims],
    after: Dims,
    leaves: Leaves,
    layers: frozenset[Leaf],
) -> frozenset[Leaf]:
    """The leaves along which masked entries of a result are zero."""
    if row.zeros is None:
        return frozenset()
    here = layers | leaves.of_all(after) if layers else leaves.of_all(after)
    zeros = [here if e.constant == 0 else here & e.zero for e in ins]
    for x in leaves.twice(after):
        # What is zero along one of both is not enough.
        times = leaves.count(x, after)
        for i, (e, d) in enumerate(zip(ins, before, strict=True)):
            if e.constant != 0 and leaves.count(x, d) < times:
                zeros[i] = zeros[i] - {x}
    return row.zeros(Masking(eqn, ins, zeros, before, here, layers, leaves.of_all))
