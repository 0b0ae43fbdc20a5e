"""Where a result is zero if its operands' masked entries are: by primitive."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsparse.coupling._finite import Finite
from jaxsparse.primitives import Masking, row_of
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


class Leaves:
    """The leaves of axes, by identity; those of size 1 lose nothing."""

    def __init__(self):
        self._of: dict[Leaf, frozenset[Leaf]] = {}

    def of(self, axis: algebra.Axis) -> frozenset[Leaf]:
        node = algebra.find(axis)
        if node not in self._of:
            leaves = algebra.leaves(node)
            self._of[node] = frozenset(x for x in leaves if x.size > 1)
        return self._of[node]

    def of_all(self, dims: Iterable[algebra.Axis]) -> frozenset[Leaf]:
        return frozenset().union(*map(self.of, dims))

    def count(self, leaf: Leaf, dims: Dims) -> int:
        """In how many axes a leaf occurs."""
        return sum(leaf in self.of(axis) for axis in dims)

    def twice(self, dims: Dims) -> frozenset[Leaf]:
        """The leaves that occur in several axes; mostly there are none."""
        once, again = frozenset(), frozenset()
        for found in map(self.of, dims):
            again |= once & found
            once |= found
        return again


def vanishing(
    eqn: Any,
    ins: Sequence[Effect],
    before: Sequence[Dims],
    after: Dims,
    leaves: Leaves,
    layers: frozenset[Leaf],
) -> frozenset[Leaf]:
    """The leaves along which masked entries of a result are zero."""
    row, here = row_of(eqn), layers | leaves.of_all(after)
    if row.zeros is None:
        return frozenset()
    zeros = [here if e.constant == 0 else here & e.zero for e in ins]
    for x in leaves.twice(after):
        # What is zero along one of both is not enough.
        times = leaves.count(x, after)
        for i, (e, d) in enumerate(zip(ins, before, strict=True)):
            if e.constant != 0 and leaves.count(x, d) < times:
                zeros[i] = zeros[i] - {x}
    return row.zeros(Masking(eqn, ins, zeros, before, here, layers, leaves.of_all))
