"""Where masked entries are not finite, or their derivatives: 0 / 0, log 0, sqrt' 0.

A division of a masked channel by its own norm is 0 / 0, and one NaN in a sum is a NaN
everywhere. In a derivative NaN does harm as well, but where the entries depend on
nothing but masked parameters, whose gradients a mask takes out.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsparse.coupling._points import Number, Numbers, is_bad
from jaxsparse.primitives import Primitive
from jaxsparse.primitives.axes import Axis

Leaf = Axis
Leaves = frozenset[Leaf]


class Point(NamedTuple):
    """What masked entries are.

    Attributes:
      value: a number.
      visit: where it ceased to be finite; None if it is, or if the model writes an
        infinity itself, as masks of attention do.
    """

    value: float
    visit: Any = None


Known = tuple[tuple["Point", Leaves], ...]
"""Numbers, each with the leaves whose masked entries they are."""


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

    points: Known = ()
    moves: bool = False
    closed: Leaves = frozenset()
    steep: Mapping[Leaf, Any] = {}

    def lost(self) -> dict[Leaf, Any]:
        """The leaves whose masked entries are not finite, and where that began."""
        bad = ((p.visit, leaves) for p, leaves in self.points if p.visit is not None)
        return {x: visit for visit, leaves in bad for x in leaves}


class Entries(NamedTuple):
    """What masked entries of an operand are: most leaves share one number.

    Attributes:
      known: numbers with their leaves; of two the first holds.
      rest: what they are for all other leaves, if it is a number.
    """

    known: Known
    rest: Point | None


class Cell(NamedTuple):
    """Leaves whose masked entries are the same in each of some operands.

    Attributes:
      at: what they are, by operand; None if it is no number.
      leaves: all of them.
    """

    at: tuple[Point | None, ...]
    leaves: Leaves

    @property
    def lost(self) -> Any:
        """Where the first operand that is not finite ceased to be."""
        bad = (p.visit for p in self.at if p is not None and p.visit is not None)
        return next(bad, None)

    @property
    def values(self) -> tuple[Number, ...]:
        """The numbers alone."""
        return tuple(None if p is None else p.value for p in self.at)


def cells(leaves: Leaves, operands: Iterable[Entries]) -> list[Cell]:
    """Leaves go together whose masked entries are the same in every operand."""
    found: list[tuple[tuple[Point | None, ...], Leaves]] = [((), leaves)]
    for known, rest in operands:
        split: list[tuple[tuple[Point | None, ...], Leaves]] = []
        for at, left in found:
            for point, those in known:
                both = left & those
                if both:
                    split.append(((*at, point), both))
                    left = left - both
            if left:
                split.append(((*at, rest), left))
        found = split
    return [Cell(at, left) for at, left in found]


class Around(NamedTuple):
    """An equation and where it is.

    Attributes:
      eqn: the equation.
      row: of its primitive.
      visit: of it.
      numbers: what equations give.
      product: whether it multiplies two operands.
      here: the leaves of the result's axes and of the scans around it.
      of: the leaves of each operand's axes, of a product without those that it adds up,
        and of the scans.
      twice: those of `here` that several axes of the result have.
      ruled: whether a rule for derivatives is around it.
    """

    eqn: Any
    row: Primitive
    visit: Any
    numbers: Numbers
    product: bool = False
    here: Leaves = frozenset()
    of: Sequence[Leaves] = ()
    twice: Leaves = frozenset()
    ruled: bool = False


def finite(
    ins: Sequence[Finite], special: Iterable[Cell], zero: Leaves, around: Around
) -> Finite:
    """What is known of a result, from the leaves of which something is known."""
    result = _derivative(ins, around)
    steep = result.steep
    points: dict[Any, tuple[Point, Leaves]] = {}
    for cell in special:
        if around.row.entrywise:
            point = _computed(cell, around)
            found = [(point, cell.leaves)]
            begins = cell.lost is None or cell.lost is around.visit
            if begins and result.moves and not around.ruled:
                lost = cell.lost is not None or bool(point and point.visit)
                here = dict.fromkeys(_steep(cell, ins, around, lost), around.visit)
                steep = {**here, **steep} if here else steep
        else:
            found = _moved(cell, around)
        for point, leaves in found:
            if point is None:
                continue
            if not is_bad(point.value):
                point = Point(point.value)
                leaves = (leaves & around.here) - around.twice
            if point.value == 0:
                leaves = leaves - zero
            if leaves:
                key = str(point.value), id(point.visit)
                before = points[key][1] if key in points else frozenset()
                points[key] = point, leaves | before
    return Finite(tuple(points.values()), result.moves, result.closed, steep)


def after_rule(
    outs: Sequence[Finite],
    ins: Sequence[Finite],
    special: Iterable[Cell],
    around: Around,
) -> list[Finite]:
    """What is known of the results of a function with derivatives of its own."""
    steep: dict[Leaf, Any] = {}
    for cell in special:
        if not any(map(is_bad, cell.values)):
            steep |= dict.fromkeys(_steep(cell, ins, around, False), around.visit)
    return [x._replace(steep={**steep, **x.steep}) if x.moves else x for x in outs]


def either(some: Sequence[Finite], entries: Iterable[Entries]) -> Finite:
    """What holds whichever of some values it is."""
    moving = [x for x in some if x.moves]
    named = frozenset().union(*(leaves for x in some for _, leaves in x.points))
    points = []
    for cell in cells(named, entries) if named else ():
        lost = next((p for p in cell.at if p is not None and p.visit is not None), None)
        first = lost or cell.at[0]
        if first is not None and (lost or len({*map(str, cell.at)}) == 1):
            points.append((first, cell.leaves))
    return Finite(tuple(points), bool(moving), _common(moving), _union(moving))


def same(one: Finite, other: Finite) -> bool:
    """Whether as much is known of both."""
    first, second = (
        {x: str(p.value) for p, leaves in f.points for x in leaves}
        for f in (one, other)
    )
    return (
        first == second
        and (one.moves, one.closed) == (other.moves, other.closed)
        and one.steep.keys() == other.steep.keys()
    )


def _derivative(ins: Sequence[Finite], around: Around) -> Finite:
    """What is known of a result's derivative."""
    moving = [i for i, x in enumerate(ins) if x.moves]
    out = around.eqn.outvars[0].aval.dtype
    still = around.eqn.primitive.name == "stop_gradient"
    if not moving or still or not around.numbers.inexact(out):
        return Finite()
    closed = around.here
    for i in moving:
        own = ins[i].closed
        if around.product:
            own = own & around.of[i]
        if around.row.joins:  # what lies in other segments of an axis is of no concern
            own = own | (around.here - around.of[i])
        closed = closed & own
    return Finite((), True, closed, _union([ins[i] for i in moving]))


def _computed(cell: Cell, around: Around) -> Point | None:
    """What an equation makes, entry by entry, of masked entries."""
    values, lost = cell.values, cell.lost
    value = around.numbers.value(around.eqn, values)
    chosen = around.eqn.primitive.name == "select_n" and values[0] is None
    if lost is not None and chosen:
        value = math.nan
    if lost is None and is_bad(value) and not _given(values, value):
        lost = around.visit
    return None if value is None else Point(value, lost)


def _steep(
    cell: Cell, ins: Sequence[Finite], around: Around, lost: bool
) -> Iterator[Leaf]:
    """The leaves of which masked entries have no finite derivative here."""
    values = cell.values
    if not lost and (around.row.gentle or all(x is None for x in values)):
        return
    moving = [(i, x.closed) for i, x in enumerate(ins) if x.moves]
    if all(cell.leaves <= closed for _, closed in moving):
        return
    for leaf in cell.leaves:
        which = tuple(i for i, closed in moving if leaf not in closed)
        # Where a value is not finite, its derivative is not.
        if which and (lost or around.numbers.steep(around.eqn, values, which)):
            yield leaf


def _moved(cell: Cell, around: Around) -> list[tuple[Point | None, Leaves]]:
    """What masked entries are that were only moved or added up."""
    eqn, row, leaves, first = around.eqn, around.row, cell.leaves, cell.at[0]
    if row.part:  # other masked entries lie in another part
        leaves = leaves - (around.of[0] - around.here)
    if cell.lost is not None:
        return [(Point(math.nan, cell.lost), leaves)]
    if row.first:
        return [(first, leaves)]
    if row.joins and eqn.primitive.name != "pad":
        return _joined(cell, around)
    if eqn.primitive.name == "reduce_sum" and first is not None:
        shape = eqn.invars[0].aval.shape
        many = math.prod(shape[a] for a in eqn.params["axes"])
        return [(Point(first.value * many), leaves)]
    return []


def _joined(cell: Cell, around: Around) -> list[tuple[Point | None, Leaves]]:
    """Masked entries of a leaf where those of all operands that have it are alike."""
    split: list[tuple[tuple[Point | None, ...], Leaves]] = [((), cell.leaves)]
    for point, own in zip(cell.at, around.of, strict=True):
        having = [((*mine, point), left & own) for mine, left in split]
        split = [x for x in (*having, *((m, left - own) for m, left in split)) if x[1]]
    alike = lambda mine: None not in mine and len({str(p.value) for p in mine}) == 1
    return [(mine[0], leaves) for mine, leaves in split if alike(mine)]


def _given(values: Iterable[Number], value: Number) -> bool:
    """Whether a result that is not finite is an infinity that the model wrote."""
    same_kind = lambda x: (
        x is not None and (math.isnan(x) if math.isnan(value or 0.0) else math.isinf(x))
    )
    return any(map(same_kind, values))


def _common(moving: Sequence[Finite]) -> Leaves:
    closed = [x.closed for x in moving]
    return frozenset.intersection(*closed) if closed else frozenset()


def _union(some: Iterable[Finite]) -> dict[Leaf, Any]:
    return {leaf: visit for x in some for leaf, visit in x.steep.items()}
