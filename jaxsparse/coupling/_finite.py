"""Where masked entries are not finite, or their derivatives: 0 / 0, log 0, sqrt' 0.

A division of a masked channel by its own norm is 0 / 0, and one NaN in a sum is a NaN
everywhere. In a derivative NaN does harm as well, but where the entries depend on
nothing but masked parameters, whose gradients a mask takes out.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxsparse.coupling._points import Number, is_bad, steep_at, value_at
from jaxsparse.primitives import row_of
from jaxsparse.primitives.axes import Axis

Leaf = Axis


class Point(NamedTuple):
    """What masked entries are.

    Attributes:
      value: a number.
      visit: where it ceased to be finite; None if it is, or if the model writes an
        infinity itself, as masks of attention do.
    """

    value: float
    visit: Any = None


class Finite(NamedTuple):
    """What is known of the masked entries of a value, by leaf.

    Attributes:
      points: what they are, if it is a number other than zero. Those that are lost
        are there also where the leaf's axis is gone: then all entries are.
      moves: whether it has a derivative.
      closed: the leaves along which that of masked entries reaches no more than masked
        entries of parameters.
      steep: the leaves of which masked entries have no finite derivative, and where.
    """

    points: Mapping[Leaf, Point] = {}
    moves: bool = False
    closed: frozenset[Leaf] = frozenset()
    steep: Mapping[Leaf, Any] = {}

    def lost(self) -> dict[Leaf, Any]:
        """The leaves whose masked entries are not finite, and where that began."""
        return {x: p.visit for x, p in self.points.items() if p.visit is not None}


Read = Callable[[int, Leaf], Point | None]
"""What masked entries of an operand are, if it is a number."""


class Around(NamedTuple):
    """Where an equation is.

    Attributes:
      visit: of it.
      here: the leaves of the result's axes and of the scans around it.
      of: the leaves of each operand's axes, of a product without those that it adds up,
        and of the scans.
      twice: those of `here` that several axes of the result have.
      ruled: whether a rule for derivatives is around it.
    """

    visit: Any
    here: frozenset[Leaf]
    of: Sequence[frozenset[Leaf]]
    twice: frozenset[Leaf]
    ruled: bool


def finite(
    eqn: Any,
    ins: Sequence[Finite],
    read: Read,
    special: Collection[Leaf],
    zero: Collection[Leaf],
    around: Around,
) -> Finite:
    """What is known of a result."""
    row, result = row_of(eqn), _derivative(eqn, ins, around)
    steep = dict(result.steep)
    points: dict[Leaf, Point] = {}
    seen: dict[Any, Number] = {}
    for leaf in special:
        at = [read(i, leaf) for i in range(len(ins))]
        lost = next(
            (p.visit for p in at if p is not None and p.visit is not None), None
        )
        if row.entrywise:
            values = tuple(None if p is None else p.value for p in at)
            if values not in seen:
                seen[values] = value_at(eqn, values)
            value = seen[values]
            if (
                lost is not None
                and eqn.primitive.name == "select_n"
                and values[0] is None
            ):
                value = math.nan
            if is_bad(value) and lost is None and not _given(values, value):
                lost = around.visit
            new = lost is None or lost is around.visit
            new = new and result.moves and not around.ruled
            if new and _is_steep(eqn, values, ins, leaf, seen, lost is not None):
                steep.setdefault(leaf, around.visit)
        else:
            if row.part and leaf in around.of[0] - around.here:
                continue  # the masked entries lie in another part
            value = math.nan if lost is not None else _moved(eqn, at, leaf, around)
        if value is None or (value == 0 and leaf in zero):
            continue
        if is_bad(value):
            points[leaf] = Point(value, lost)
        elif leaf in around.here and leaf not in around.twice:
            points[leaf] = Point(value)
    return result._replace(points=points, steep=steep)


def after_rule(
    eqn: Any,
    outs: Sequence[Finite],
    ins: Sequence[Finite],
    read: Read,
    special: Collection[Leaf],
    visit: Any,
) -> list[Finite]:
    """What is known of the results of a function with derivatives of its own."""
    steep: dict[Leaf, Any] = {}
    seen: dict[Any, bool] = {}
    for leaf in special:
        at = [read(i, leaf) for i in range(len(ins))]
        values = tuple(None if p is None else p.value for p in at)
        if not any(map(is_bad, values)) and _is_steep(eqn, values, ins, leaf, seen):
            steep[leaf] = visit
    return [x._replace(steep={**steep, **x.steep}) if x.moves else x for x in outs]


def either(some: Sequence[Finite], read: Callable[[int, Leaf], Point | None]) -> Finite:
    """What holds whichever of some values it is."""
    moving = [x for x in some if x.moves]
    points: dict[Leaf, Point] = {}
    for leaf in {leaf for x in some for leaf in x.points}:
        at = [read(i, leaf) for i in range(len(some))]
        lost = next((p for p in at if p is not None and p.visit is not None), None)
        first = lost or at[0]
        if first is not None and (lost or len({*map(str, at)}) == 1):
            points[leaf] = first
    return Finite(points, bool(moving), _common(moving), _union(moving))


def same(one: Finite, other: Finite) -> bool:
    """Whether as much is known of both."""
    texts = ({x: str(p.value) for x, p in f.points.items()} for f in (one, other))
    first, second = texts
    return (
        first == second
        and (one.moves, one.closed) == (other.moves, other.closed)
        and one.steep.keys() == other.steep.keys()
    )


def _derivative(eqn: Any, ins: Sequence[Finite], around: Around) -> Finite:
    row, product = row_of(eqn), row_of(eqn).contraction(eqn) is not None
    moving = [i for i, x in enumerate(ins) if x.moves]
    inexact = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
    if not moving or not inexact or eqn.primitive.name == "stop_gradient":
        return Finite()
    closed = around.here
    for i in moving:
        own = ins[i].closed & around.of[i] if product else ins[i].closed
        if row.joins:  # what lies in other segments of an axis is of no concern
            own |= around.here - around.of[i]
        closed &= own
    return Finite({}, True, closed, _union([ins[i] for i in moving]))


def _is_steep(
    eqn: Any,
    values: tuple[Number, ...],
    ins: Sequence[Finite],
    leaf: Leaf,
    seen: Any,
    lost: bool = False,
) -> bool:
    if not lost and (row_of(eqn).gentle or all(x is None for x in values)):
        return False
    open_ = (i for i, x in enumerate(ins) if x.moves and leaf not in x.closed)
    which = tuple(open_)
    if not which:
        return False
    if lost:  # where a value is not finite, its derivative is not
        return True
    key = (values, which)
    if key not in seen:
        seen[key] = steep_at(eqn, values, which)
    return bool(seen[key])


def _moved(eqn: Any, at: Sequence[Point | None], leaf: Leaf, around: Around) -> Number:
    """What masked entries are that were only moved or added up."""
    name, row, first = eqn.primitive.name, row_of(eqn), at[0]
    if row.first:
        return None if first is None else first.value
    if row.joins:
        mine = [p for p, own in zip(at, around.of, strict=True) if leaf in own]
        known = {str(p.value): p.value for p in mine if p is not None}
        whole = len(known) == 1 and None not in mine
        return next(iter(known.values())) if whole and name != "pad" else None
    if name == "reduce_sum" and first is not None:
        shape = eqn.invars[0].aval.shape
        return first.value * math.prod(shape[a] for a in eqn.params["axes"])
    return None


def _given(values: Iterable[Number], value: Number) -> bool:
    """Whether a result that is not finite is an infinity that the model wrote."""
    same_kind = lambda x: (
        x is not None and (math.isnan(x) if math.isnan(value or 0.0) else math.isinf(x))
    )
    return any(map(same_kind, values))


def _common(moving: Sequence[Finite]) -> frozenset[Leaf]:
    return (
        frozenset.intersection(*(x.closed for x in moving)) if moving else frozenset()
    )


def _union(some: Iterable[Finite]) -> dict[Leaf, Any]:
    return {leaf: visit for x in some for leaf, visit in x.steep.items()}
