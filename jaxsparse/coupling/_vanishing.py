"""Where a result is zero if its operands' masked entries are: by primitive."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsparse.coupling._finite import Finite
from jaxsparse.tracing import axes as algebra
from jaxsparse.tracing.dims import Dims

Leaf = int  # the identity of a leaf


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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# f(0) = 0, or the entries only move.
_KEEP_ZERO = _names(
    """
    abs asin asinh atan atanh broadcast_in_dim cbrt ceil conj convert_element_type copy
    copy_p cumsum dynamic_slice erf erf_inv expm1 floor gather imag integer_pow log1p
    name neg optimization_barrier pad pcast population_count pvary real
    reduce_precision reduce_window reduce_window_max reduce_window_min
    reduce_window_sum reshape rev round sharding_constraint sign sin sinh slice split
    sqrt square squeeze stop_gradient tan tanh tile transpose unstack
    """
)
_FIRST = _names("div rem gather dynamic_slice pad cumsum reduce_window reduce_sum")
_ANY = _names("mul and")
_ALL = _names(
    """
    add add_any sub or xor max min select_n complex nextafter concatenate stack scatter
    scatter-add scatter_add dynamic_update_slice clamp
    """
)


class Leaves:
    """The leaves of axes, by identity; those of size 1 lose nothing."""

    def __init__(self):
        self._of: dict[int, frozenset[Leaf]] = {}

    def of(self, axis: algebra.Axis) -> frozenset[Leaf]:
        node = algebra.find(axis)
        if id(node) not in self._of:
            leaves = algebra.leaves(node)
            self._of[id(node)] = frozenset(id(x) for x in leaves if x.size > 1)
        return self._of[id(node)]

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
    """The leaves along which masked entries of a result are zero.

    Args:
      eqn: the equation.
      ins: what masking does to its operands.
      before: their axes.
      after: the axes of the result.
      leaves: of axes.
      layers: of the scans around it, which no value in a turn shows.

    Returns:
      Some of the leaves of the result and of the layers.
    """
    name, here = eqn.primitive.name, layers | leaves.of_all(after)
    if name in {"dot_general", "conv_general_dilated"}:
        return frozenset(filter(_contraction(eqn, ins, before, leaves), here))
    zeros = [here if e.constant == 0 else here & e.zero for e in ins]
    for x in leaves.twice(after):
        # What is zero along one of both is not enough.
        times = leaves.count(x, after)
        for i, (e, d) in enumerate(zip(ins, before, strict=True)):
            if e.constant != 0 and leaves.count(x, d) < times:
                zeros[i] = zeros[i] - {x}
    if name in {"max", "min", "clamp"}:
        bounded = [_beyond(name, ins, e) for e in ins]
        within = [z for z, beyond in zip(zeros, bounded, strict=True) if not beyond]
        return here.intersection(*(within or zeros))
    if name in _ANY:
        return frozenset().union(*zeros)
    if name == "pad":
        others = here - layers - leaves.of_all(before[0])
        return zeros[0] | others if ins[1].constant == 0 else zeros[0] & zeros[1]
    if name in {"concatenate", "stack"}:
        # What lies in other segments of an axis is of no concern.
        others = (here - layers - leaves.of_all(d) for d in before)
        pairs = zip(zeros, others, strict=True)
        return here.intersection(*(zero | other for zero, other in pairs))
    if name == "integer_pow" and eqn.params["y"] <= 0:
        return frozenset()
    if name in _ALL:
        return here.intersection(*_summands(name, zeros))
    if name in _KEEP_ZERO or name in _FIRST:
        return zeros[0] if zeros else frozenset()
    return frozenset()


def _summands(name: str, zeros: list[frozenset[Leaf]]) -> list[frozenset[Leaf]]:
    """Those of the operands that a result has entries of."""
    if name == "select_n":
        return zeros[1:]
    if name in {"scatter", "scatter-add", "scatter_add"}:
        return [zeros[0], zeros[2]]
    return zeros[:2] if name == "dynamic_update_slice" else zeros


def _contraction(
    eqn: Any, ins: Sequence[Effect], before: Sequence[Dims], leaves: Leaves
) -> Callable[[Leaf], bool]:
    """Which of a product's results are zero, by the operand that has the axis."""
    p, (left, right) = eqn.params, before
    own = lambda dims, axes: leaves.of_all([dims[a] for a in axes])
    if eqn.primitive.name == "dot_general":
        (lc, rc), (lb, rb) = p["dimension_numbers"]
        free = lambda dims, gone: own(dims, set(range(len(dims))) - {*gone})
        a, b = free(left, (*lc, *lb)), free(right, (*rc, *rb))
    else:
        numbers = p["dimension_numbers"]
        a = own(left, [numbers.lhs_spec[0]])
        b = own(right, [numbers.rhs_spec[0]])
        if p["feature_group_count"] > 1:
            b -= own(left, [numbers.lhs_spec[1]])  # groups are of both
    of_one = lambda x: (
        (x not in a or ins[0].vanishes(x)) and (x not in b or ins[1].vanishes(x))
    )
    return lambda x: of_one(x) and any(e.vanishes(x) for e in ins)


def _beyond(name: str, ins: Sequence[Effect], one: Effect) -> bool:
    """Whether an operand is a bound that zero lies within: max(x, -1), min(x, 6)."""
    if one.constant is None:
        return False
    if name == "clamp":
        return one is not ins[1] and (
            one.constant <= 0 if one is ins[0] else one.constant >= 0
        )
    return one.constant <= 0 if name == "max" else one.constant >= 0
