"""The table of primitives: what is known of each stands in one row."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse.primitives import (
    _contractions,
    _elementwise,
    _indexing,
    _moves,
    _random,
    _reductions,
)
from jaxsparse.primitives._foreign import foreign as foreign
from jaxsparse.primitives._general import opaque
from jaxsparse.primitives._row import Contraction as Contraction
from jaxsparse.primitives._row import Masking as Masking
from jaxsparse.primitives._row import Primitive as Primitive
from jaxsparse.primitives._row import Sides as Sides

PRIMITIVES: Mapping[str, Primitive] = {
    **_elementwise.ROWS,
    **_moves.ROWS,
    **_indexing.ROWS,
    **_contractions.ROWS,
    **_reductions.ROWS,
    **_random.ROWS,
}
"""The rows by the names of primitives."""
UNKNOWN = Primitive(opaque)
"""The row of all others: the axes of their operands and results stay as they are."""


def row_of(eqn: Any) -> Primitive:
    """What is known of an equation's primitive."""
    return PRIMITIVES.get(eqn.primitive.name, UNKNOWN)


def sides_of(row: Primitive, eqn: Any, at: int, data: Sequence[bool]) -> Sides | None:
    """How an equation contracts one of its operands.

    Args:
      row: of its primitive.
      eqn: the equation.
      at: which operand.
      data: which operands depend on the model's inputs.

    Returns:
      See `Sides`; None where it does not.
    """
    if row.sides is not None:
        return row.sides(eqn, at, data)
    found = row.contraction(eqn)
    if found is None or at not in found.kernels:
        return None
    other = 1 - at
    contracted = (*found.summed[at], *found.window[at])
    theirs = found.summed[other], found.batch[other]
    return other, contracted, found.batch[at], theirs
