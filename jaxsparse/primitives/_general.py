"""Rules for axes that primitives of several kinds share."""

from collections.abc import Sequence
from typing import Any

from jaxsparse.primitives.axes import leaf
from jaxsparse.primitives.dims import Dims, freeze, frozen, out_shapes, unify


def elementwise(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes of equal size at the same place are the same; those of size 1 broadcast."""
    results = []
    for shape in out_shapes(eqn):
        dims, whole = [], [d for d in ins if len(d) == len(shape)]
        for at, size in enumerate(shape):
            same = [d[at] for d in whole if d[at].size == size]
            first = same[0] if same else leaf(size)
            for other in same[1:] if size > 1 else ():
                unify(first, other, eqn)
            dims.append(first)
        results.append(tuple(dims))
    return results


def opaque(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Nothing is known: everything stays as it is."""
    why = eqn.primitive.name
    for dims in ins:
        for axis in dims:
            freeze(axis, why, eqn)
    return [tuple(frozen(n, why, eqn) for n in s) for s in out_shapes(eqn)]


def fresh(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Results that depend on no operand's axes."""
    return [tuple(leaf(n) for n in shape) for shape in out_shapes(eqn)]


def each(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Each operand as it is; they have nothing to do with each other."""
    return list(ins)
