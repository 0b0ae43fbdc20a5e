"""The algebra of axes: leaves, products (merged axes) and sums (concatenations).

Each dimension of each traced value is an expression. Two dimensions that must be the
same are unified, and where one of them is finer than the other, the other one is
refined: a leaf becomes a product or a sum everywhere at once, since expressions refer
to each other and are looked through lazily. So an order of rules does not matter.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Incompatible(Exception):
    """Two axes that no refinement makes equal."""


class Axis:
    """A node: a leaf, a product or a sum of nodes, or a reference to another node.

    Attributes:
      size: how many indices.
      parts: the factors (slowest first) or segments; empty for a leaf.
      is_sum: whether `parts` are segments.
      same: the node that this one turned out to be.
      notes: what happened to a leaf: why it is not to be touched, where it occurs;
        each with the equation that says so, or None.
    """

    __slots__ = ("is_sum", "notes", "parts", "same", "size")

    def __init__(self, size: int, parts: Sequence["Axis"] = (), is_sum: bool = False):
        self.size, self.parts, self.is_sum = int(size), tuple(parts), is_sum
        self.same: Axis | None = None
        self.notes: dict[str, Any] = {}

    @property
    def flags(self) -> set[str]:
        """The notes without their equations."""
        return set(self.notes)

    def __repr__(self) -> str:
        node = find(self)
        if not node.parts:
            return f"{node.size}"
        return "(" + ("+" if node.is_sum else "*").join(map(repr, node.parts)) + ")"


def leaf(size: int, *flags: str) -> Axis:
    """A new axis of which nothing is known."""
    axis = Axis(size)
    for note in flags:
        axis.notes[note] = None
    return axis


def find(axis: Axis) -> Axis:
    """The node that an axis stands for today."""
    while axis.same is not None:
        if axis.same.same is not None:
            axis.same = axis.same.same
        axis = axis.same
    return axis


def product(parts: Iterable[Axis]) -> Axis:
    """Axes merged to one, the last the fastest."""
    factors = [f for part in parts for f in _factors(part)]
    if len(factors) == 1:
        return factors[0]
    return Axis(math.prod(f.size for f in factors), factors)


def concatenation(parts: Iterable[Axis]) -> Axis:
    """Axes one behind the other."""
    segments = [s for part in parts for s in _segments(part)]
    if len(segments) == 1:
        return segments[0]
    return Axis(sum(s.size for s in segments), segments, is_sum=True)


def leaves(axis: Axis) -> list[Axis]:
    """The leaves of an expression, slowest or first of them first."""
    node = find(axis)
    if not node.parts:
        return [node]
    return [x for part in parts(node) for x in leaves(part)]


def parts(node: Axis) -> list[Axis]:
    """The factors or segments of a node; segments that are no sums themselves."""
    return _segments(node) if node.is_sum else [*node.parts]


def flag(axis: Axis, *flags: str, eqn: Any = None) -> None:
    """Notes something of all leaves of an expression; the first to say it is kept."""
    for x in leaves(axis):
        for note in flags:
            x.notes.setdefault(note, eqn)


def _factors(axis: Axis) -> list[Axis]:
    node = find(axis)
    if node.size == 1 and not node.is_sum:
        return []
    if not node.parts or node.is_sum:
        return [node]
    return [f for part in node.parts for f in _factors(part)]


def _segments(axis: Axis) -> list[Axis]:
    node = find(axis)
    if not node.is_sum:
        return [node]
    found, left = [], [*node.parts[::-1]]
    while left:
        part = find(left.pop())
        if part.is_sum:
            left.extend(part.parts[::-1])
        else:
            found.append(part)
    node.parts = tuple(found)  # or a sum of many cuts would be as deep as it is long
    return found


def _become(axis: Axis, other: Axis) -> None:
    """A leaf is, from now on, another expression."""
    axis, other = find(axis), find(other)
    if axis is other:
        return
    if any(x is axis for x in leaves(other)):
        raise Incompatible(f"an axis of {axis.size} would contain itself")
    axis.same = other
    for note, eqn in axis.notes.items():
        flag(other, note, eqn=eqn)


def unify(a: Axis, b: Axis) -> None:
    """Makes two axes the same."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise Incompatible(f"sizes {a.size} and {b.size}")
    if not a.parts:
        _become(a, b)
    elif not b.parts:
        _become(b, a)
    elif not a.is_sum and not b.is_sum:
        _unify_products(a, b)
    elif a.is_sum and b.is_sum:
        _unify_sums(_segments(a), _segments(b))
    elif a.is_sum:
        _unify_product_with_sum(b, a)
    else:
        _unify_product_with_sum(a, b)


def _unify_products(a: Axis, b: Axis) -> None:
    left, right = _factors(a), _factors(b)
    while left and right:
        x, y = left.pop(), right.pop()
        if x.size == y.size:
            unify(x, y)
            continue
        common = math.gcd(x.size, y.size)
        if common == 1:
            raise Incompatible(f"factors {x.size} and {y.size}")
        major_x, minor_x = split_minor(x, common)
        major_y, minor_y = split_minor(y, common)
        left.extend(_factors(major_x))
        right.extend(_factors(major_y))
        unify(minor_x, minor_y)


def _unify_sums(left: list[Axis], right: list[Axis]) -> None:
    left, right = left[::-1], right[::-1]
    while left and right:
        x, y = left.pop(), right.pop()
        if x.size == y.size:
            unify(x, y)
            continue
        if x.size > y.size:
            x, rest = cut(x, y.size)
            left.append(rest)
        else:
            y, rest = cut(y, x.size)
            right.append(rest)
        unify(x, y)


def _unify_product_with_sum(a: Axis, b: Axis) -> None:
    segments = _segments(b)
    minor = math.prod(f.size for f in _factors(a)[1:])
    if any(s.size % minor for s in segments):
        raise Incompatible(f"a product of minor size {minor} with segments")
    rest = a
    for segment in segments[:-1]:
        part, rest = cut(rest, segment.size)
        unify(part, segment)
    unify(rest, segments[-1])


def split_minor(axis: Axis, size: int) -> tuple[Axis, Axis]:
    """Sees an axis as `major * minor` with a minor part of the given size."""
    node = find(axis)
    if node.size % size:
        raise Incompatible(f"{node.size} is no multiple of {size}")
    if size == 1:
        return node, leaf(1)
    if size == node.size:
        return leaf(1), node
    if node.is_sum:
        if any(s.size % size for s in _segments(node)):
            raise Incompatible(f"segments that are no multiples of {size}")
        pairs = [split_minor(s, size) for s in _segments(node)]
        for _, minor in pairs[1:]:
            unify(pairs[0][1], minor)
        return concatenation(major for major, _ in pairs), pairs[0][1]
    if not node.parts:
        major, minor = leaf(node.size // size), leaf(size)
        _become(node, product([major, minor]))
        return major, minor
    factors = _factors(node)
    taken: list[Axis] = []
    while size > 1:
        last = factors.pop()
        common = math.gcd(last.size, size)
        if common < last.size:
            if common != size:
                raise Incompatible(f"a factor of {last.size} within {size}")
            major, last = split_minor(last, common)
            factors.extend(_factors(major))
        taken.append(last)
        size //= last.size
    return product(factors), product(taken[::-1])


def cut(axis: Axis, at: int) -> tuple[Axis, Axis]:
    """Sees an axis as a first part and the rest."""
    node = find(axis)
    if node.is_sum:
        first, rest = [], _segments(node)[::-1]
        while rest and rest[-1].size <= at:
            first.append(rest.pop())
            at -= first[-1].size
        if at:
            last, next_ = cut(rest.pop(), at)
            first.append(last)
            rest.append(next_)
        return concatenation(first), concatenation(rest[::-1])
    if not node.parts:
        first, rest = leaf(at), leaf(node.size - at)
        _become(node, concatenation([first, rest]))
        return first, rest
    major, *minor = _factors(node)
    inner = math.prod(f.size for f in minor)
    if at % inner:
        raise Incompatible(f"a cut at {at} through a factor of {inner}")
    first, rest = cut(major, at // inner)
    return product([first, *minor]), product([rest, *minor])


def taken(axis: Axis, places: Iterable[int]) -> Axis:
    """Sees some indices of an axis, in any order, as an axis."""
    wanted = [int(x) for x in places]
    if wanted == list(range(axis.size)):
        return axis
    first, last = wanted[0], wanted[-1]
    if wanted == list(range(first, last + 1)):
        rest = cut(axis, first)[1] if first else axis
        return cut(rest, len(wanted))[0] if len(wanted) < rest.size else rest
    if axis.size > _MOST_PIECES:
        raise Incompatible(f"{axis.size} indices in another order")
    pieces, rest = [], axis
    while rest.size > 1:
        piece, rest = cut(rest, 1)
        pieces.append(piece)
    pieces.append(rest)
    return concatenation(pieces[i] for i in wanted)


_MOST_PIECES = 1024  # each has an array of the axis's size when places are looked up


def coordinates(axis: Axis) -> list[tuple[Axis, np.ndarray]]:
    """Where the indices of each leaf lie along an axis."""
    node = find(axis)
    if not node.parts:
        return [(node, np.arange(node.size))]
    if node.is_sum:
        pieces, start = [], 0
        for segment in _segments(node):
            pieces += [(start, x, index) for x, index in coordinates(segment)]
            start += segment.size
        whole = np.full((len(pieces), node.size), -1)
        for row, (start, _, index) in zip(whole, pieces, strict=True):
            row[start : start + len(index)] = index
        return [(x, row) for row, (_, x, _) in zip(whole, pieces, strict=True)]
    found, inner = [], node.size
    for factor in _factors(node):
        inner //= factor.size
        at = np.arange(node.size) // inner % factor.size
        found.extend((x, index[at]) for x, index in coordinates(factor))
    return found
