"""Which axes have a copy of their own for each index of another one.

An axis F is batched by an axis B if every value that has F also has B, at every entry,
and nothing mixes the copies: then each index of B (a head, an expert, a layer of a
scan, a group of a convolution) may lose its own indices of F, as many as the others.
"""

from collections.abc import Iterator
from typing import Any

from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives import row_of
from jaxsparse.primitives.dims import Dims
from jaxsparse.program import Address
from jaxsparse.tracing import Trace

Leaf = algebra.Axis
_Place = tuple[int, ...]  # the dimension, then the segments of sums that lead to it
_FIXED = frozenset({"iota"})


def batches(trace: Trace) -> dict[Leaf, tuple[Leaf, ...]]:
    """The axes that batch each axis."""
    found = covered(trace)
    # In one direction only: of two axes that always go together the outer is the batch.
    order = {x: i for i, x in enumerate(found)}
    mutual = lambda x, b: x in found.get(b, ()) and order[b] > order[x]
    return {
        x: tuple(sorted((b for b in bs if not mutual(x, b)), key=order.__getitem__))
        for x, bs in found.items()
    }


def covered(trace: Trace) -> dict[Leaf, set[Leaf] | frozenset[Leaf]]:
    """By axis those that keep its copies apart, also where two do so for each other."""
    found: dict[Leaf, set[Leaf] | frozenset[Leaf]] = {}
    places = _Places()
    places.of(tuple(trace.layers.values()))
    # Values of the same axes say the same; most have the axes of another one.
    for dims, layers in dict.fromkeys(_values(trace)):
        occurrences = places.of(dims)
        for x, at in occurrences.items():
            before = found.get(x)  # only fewer than those
            if before is not None and not before:
                continue
            tried = occurrences if before is None else before & occurrences.keys()
            covering = {
                b
                for b in tried
                if b != x and all(_covers(occurrences[b], place) for place in at)
            }
            found[x] = covering | (layers if before is None else layers & before)
        # In a turn all values have the layer, also those that do not show its axis.
        for x in layers:
            covering = (layers | occurrences.keys()) - {x}
            found[x] = found.get(x, covering) & covering
    for gone, left in dict.fromkeys(_summed(trace)):
        summed = places.of(gone).keys()
        for x in places.of(left):
            if found[x]:
                found[x] = found[x] - summed
    usable = {x for x in places.leaves if not _reordered(x)}
    return {x: covering & usable for x, covering in found.items()}


def _reordered(axis: algebra.Axis) -> bool:
    """Whether something may have changed the order of an axis, and so of copies."""
    marks = ("frozen", "gathered", "sorted")
    return any(note.partition(":")[0] in marks for note in axis.notes)


def _values(trace: Trace) -> Iterator[tuple[Dims, frozenset[Leaf]]]:
    """All values, each with the layer axes of the scans whose turns it differs in."""
    none: frozenset[Leaf] = frozenset()
    for dims in trace.dims.values():
        yield dims, none
    for constants in trace.constants.values():
        for dims in constants:
            yield dims, none
    bodies = list(_bodies(trace))
    for address, node in trace.nodes.items():
        layers = frozenset(
            x
            for scan, x in bodies
            if len(scan) < len(address) and address[: len(scan)] == scan
        )
        name = node.visit.primitive.name
        for dims in node.outs:
            # What does not come from a turn's slices has met an operand without them.
            yield dims, none if name in _FIXED or not node.ins else layers
        product = row_of(node.visit).contraction(node.visit)
        if product is not None and product.pairs:
            # Only what both have in common, pair by pair, keeps copies apart.
            paired = (*product.summed[0], *product.batch[0])
            yield tuple(node.ins[0][a] for a in paired), layers
            if product.samples is not None:  # and a kernel of windows its own
                yield node.ins[1], layers
        else:
            for dims in node.ins:
                yield dims, layers
    # What is carried from turn to turn has no copies for each.
    for scan, _ in bodies:
        node = trace.nodes[scan]
        for dims in node.outs:
            yield dims, none


def _summed(trace: Trace) -> Iterator[tuple[Dims, Dims]]:
    """Of all sums the axes that they run over, and those of what has been summed.

    An axis that is summed over, and that the result has nonetheless from elsewhere, has
    no copies of the axes that are left.
    """
    for node in trace.nodes.values():
        row = row_of(node.visit)
        product = row.contraction(node.visit)
        if product is not None:
            yield tuple(node.ins[1][a] for a in product.summed[1]), node.outs[0]
        elif row.reduced is not None:
            axes = row.reduced(node.visit)
            yield tuple(node.ins[0][a] for a in axes), node.outs[0]


def _bodies(trace: Trace) -> Iterator[tuple[Address, Leaf]]:
    for address, layer in trace.layers.items():
        node = algebra.find(layer)
        if not node.parts:
            yield address, node


def _covers(batch: list[_Place], place: _Place) -> bool:
    """Whether all positions of a place have one index along the batch axis."""
    near = [p for p in batch if p == place[: len(p)]]
    far = [p for p in batch if p[0] != place[0]]
    # If it is there twice, no one knows of which the copies are.
    return len(near) + len(far) == 1 and (not far or len(far[0]) == 1)


class _Places:
    """Where the leaves of dimensions are, each expression looked through once.

    Attributes:
      leaves: all that were found.
    """

    def __init__(self):
        self.leaves: set[Leaf] = set()
        self._known: dict[algebra.Axis, Any] = {}

    def of(self, dims: Dims) -> dict[Leaf, list[_Place]]:
        found: dict[Leaf, list[_Place]] = {}
        for at, axis in enumerate(dims):
            for leaf, segments in self._axis(axis):
                found.setdefault(leaf, []).append((at, *segments))
        return found

    def _axis(self, axis: algebra.Axis) -> list[tuple[algebra.Axis, tuple[int, ...]]]:
        node = algebra.find(axis)
        if node not in self._known:
            self._known[node] = list(_segments(node))
            self.leaves.update(x for x, _ in self._known[node])
        return self._known[node]


def _segments(node: algebra.Axis) -> Iterator[tuple[algebra.Axis, tuple[int, ...]]]:
    if not node.parts:
        if node.size > 1:
            yield node, ()
        return
    for i, part in enumerate(algebra.parts(node)):
        for leaf, segments in _segments(algebra.find(part)):
            yield leaf, (i, *segments) if node.is_sum else segments
