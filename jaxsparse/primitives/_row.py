"""One row for each JAX primitive: all that the library knows of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxsparse.primitives.axes import Axis
from jaxsparse.primitives.dims import Dims, Rule

Leaf = Axis  # one without parts
Leaves = frozenset[Leaf]
Shapes = Callable[[Any, Any, Sequence[Dims], Sequence[Dims]], dict[str, Any]]
"""Of an equation, the new sizes of axes, and the axes of its operands and results, the
static parameters that hold sizes, as they must be at the new ones."""
Sides = tuple[
    int, tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]
]
"""The other operand, contracted and batch axes of this one, and those of the other."""


class Contraction(NamedTuple):
    """What a product of two operands does with the axes of each.

    Attributes:
      summed: the axes that are paired and added up.
      batch: the axes that are paired and kept.
      free: the axes that the result has of one operand alone.
      window: the axes of positions that are added up within a window.
      kernels: which operands may be parameters that are solved for.
      pairs: whether nothing but paired axes keeps copies apart.
      groups: in how many groups the summed axis of the first operand falls.
      samples: of a convolution the first operand's axis of samples, and the number of
        positions that the result has for each.
    """

    summed: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]
    window: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    kernels: tuple[int, ...] = (0, 1)
    pairs: bool = True
    groups: int = 1
    samples: tuple[int, int] | None = None

    def kept(self, operand: int) -> tuple[int, ...]:
        """The axes of an operand that are not added up."""
        grouped = self.summed[0] if operand == 0 and self.groups > 1 else ()
        return (*self.free[operand], *self.batch[operand], *grouped)


class Masking(NamedTuple):
    """What is known of an equation's operands where channels are masked.

    Attributes:
      eqn: the equation.
      ins: by operand `constant`, the one number of which all entries are, or None, and
        `zero`, all leaves along which masked entries are zero.
      zeros: by operand the leaves of `here` along which masked entries are zero.
      before: the axes of the operands.
      here: the leaves of the result's axes, and of the scans around.
      layers: the leaves of the scans around.
      leaves: those of some axes.
    """

    eqn: Any
    ins: Sequence[Any]
    zeros: Sequence[Leaves]
    before: Sequence[Dims]
    here: Leaves
    layers: Leaves
    leaves: Callable[[Sequence[Axis]], Leaves]


@dataclasses.dataclass(frozen=True)
class Primitive:
    """What is known of a primitive. What a row does not state is not relied on.

    Attributes:
      axes: what it does to the axes of its operands.
      entrywise: an entry of a result follows from the operands' entries at its place.
      keeps_entries: results consist of entries of operands, unchanged: a kernel is
        still that kernel.
      same: each result is the operand at its place.
      contraction: how an equation multiplies its two operands; None where it does not.
      sides: how it contracts an operand, given which operands depend on the inputs, if
        that does not follow from `contraction`.
      reduced: the axes of the first operand that an equation's results do not have.
      ordered: the axis whose order its results depend on.
      zeros: along which leaves the masked entries of a result are zero.
      first: masked entries of a result are those of the first operand.
      part: results have some of the first operand's entries.
      joins: results have the entries of all operands.
      value: of numbers the number that it gives.
      gentle: its derivatives are finite wherever its operands are.
      draws: its results are random.
      resize: see `Shapes`; None where no parameter holds a size.
    """

    axes: Rule
    entrywise: bool = False
    keeps_entries: bool = False
    same: bool = False
    contraction: Callable[[Any], Contraction | None] = lambda eqn: None
    sides: Callable[[Any, int, Sequence[bool]], Sides | None] | None = None
    reduced: Callable[[Any], tuple[int, ...]] | None = None
    ordered: Callable[[Any], int] | None = None
    zeros: Callable[[Masking], Leaves] | None = None
    first: bool = False
    part: bool = False
    joins: bool = False
    value: Callable[..., Any] | None = None
    gentle: bool = False
    draws: bool = False
    resize: Shapes | None = None


def names(text: str) -> tuple[str, ...]:
    """The names in a text."""
    return tuple(text.split())
