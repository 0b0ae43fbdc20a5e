"""Sums of products, `(x * a).sum(-1)`: a contraction that takes two equations."""

import dataclasses
import math
from collections.abc import Sequence

from jaxsparse.primitives import Primitive
from jaxsparse.primitives import axes as algebra
from jaxsparse.program import Address
from jaxsparse.tracing.values import Origin, Site, Value, Visit


def passes(eqn: Visit, row: Primitive) -> bool:
    """Whether an equation may lie between the product and the sum."""
    return row.entrywise and row.keeps_entries and len(eqn.invars) == 1


@dataclasses.dataclass(eq=False)
class Product:
    """A product of data and a parameter; what becomes of it is not known yet.

    Attributes:
      eqn: the equation.
      at: which operand comes from the parameter.
      ins: its operands.
      address: where it is.
      times: how often it runs.
      contracted: the axes that it was summed over, once it was.
      ends: whether it went anywhere else: then it is scaled data, no contraction.
    """

    eqn: Visit
    at: int
    ins: Sequence[Value]
    address: Address
    times: int | None
    contracted: tuple[int, ...] | None = None
    ends: bool = False

    @property
    def origin(self) -> Origin:
        """Of the parameter."""
        found = self.ins[self.at].origin
        assert found is not None, "a product has a parameter"
        return found

    @property
    def site(self) -> Site | None:
        """The contraction, once all of the program was seen; None where it is none."""
        if self.ends or self.contracted is None:
            return None
        other, contracted = 1 - self.at, self.contracted
        sizes = self._shape(other)
        batch = tuple(i for i in self._own() if i not in contracted and sizes[i] > 1)
        visit, data = self.eqn, self.ins[other]
        return Site(
            self.address,
            "mul",
            self.at,
            other,
            self.origin,
            contracted,
            batch,
            (contracted, batch),
            data.dims,
            1,
            None,
            (data.token, "mul", other, str((contracted, batch))),
            self.times,
            2 * math.prod(visit.outvars[0].aval.shape) * (self.times or 1),
            visit.source,
        )

    def summed(self, axes: Sequence[int]) -> None:
        """Notes that it was summed over some axes."""
        theirs, own = self._shape(1 - self.at), self._own()
        axes = tuple(a for a in axes if self._shape(self.at)[a] > 1 or theirs[a] > 1)
        # Along an axis that only one of them has, the sum is of that one alone.
        fits = axes and all(a in own and theirs[a] > 1 for a in axes)
        if not fits or self.contracted not in (None, axes):
            self.ends = True
        self.contracted = axes

    def _shape(self, operand: int) -> tuple[int, ...]:
        return tuple(self.eqn.invars[operand].aval.shape)

    def _own(self) -> list[int]:
        """The axes along which the parameter differs."""
        origin = self.origin
        mine = {
            x
            for _, dims in origin.sources
            for axis in dims
            for x in algebra.leaves(axis)
        }
        has = lambda axis: any(x in mine for x in algebra.leaves(axis))
        return [i for i, d in enumerate(origin.dims) if d.size > 1 and has(d)]


def product_of(
    eqn: Visit, ins: Sequence[Value], address: Address, times: int | None
) -> Product | None:
    """The product that an equation is, if it is one of data and a parameter."""
    if eqn.primitive.name != "mul" or not eqn.outvars[0].aval.shape:
        return None
    same = len({len(x.aval.shape) for x in eqn.invars}) == 1
    for at in (0, 1):
        if same and ins[at].origin is not None and ins[1 - at].data:
            return Product(eqn, at, ins, address, times)
    return None
