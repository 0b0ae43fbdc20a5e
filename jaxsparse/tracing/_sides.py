"""How an equation contracts an operand with another one."""

import math
from collections.abc import Sequence
from typing import Any

from jaxsparse.tracing import rules as _rules

Sides = tuple[
    int, tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]
]
"""The other operand, contracted and batch axes of this one, and those of the other."""


def sides_of(eqn: Any, at: int) -> Sides | None:
    """How an equation contracts one of its operands.

    Args:
      eqn: any equation.
      at: which operand.

    Returns:
      See `Sides`; None where it does not.
    """
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        contracted, batch = p["dimension_numbers"]
        theirs = tuple(contracted[1 - at]), tuple(batch[1 - at])
        return 1 - at, tuple(contracted[at]), tuple(batch[at]), theirs
    if name == "conv_general_dilated" and at == 1 and p["batch_group_count"] == 1:
        spec = p["dimension_numbers"]
        return 0, tuple(spec.rhs_spec[1:]), (), ((spec.lhs_spec[1],), ())
    ragged = name in {"ragged_dot", "ragged_dot_general"} and at == 1
    axes = _rules.ragged_axes(eqn) if ragged else None
    if axes is not None:
        contracted, group = axes
        return 0, (contracted,), (group,), ((1,), ())
    return None


def positions_of(eqn: Any) -> tuple[int, int]:
    """Of a convolution the input's axis of samples, and the positions of a sample.

    Args:
      eqn: the convolution.

    Returns:
      The axis, and how many positions the result has.
    """
    spec, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    return spec.lhs_spec[0], math.prod(shape[a] for a in spec.out_spec[2:])


def foreign_sides(equation: str, at: int, data: Sequence[bool]) -> Sides | None:
    """The same of a primitive of which an einsum-like equation was given.

    Args:
      equation: of its operands and results.
      at: which operand.
      data: which of the operands depend on the inputs.

    Returns:
      See `Sides`; None where no such operand shares a letter with it.
    """
    left, right = equation.replace(" ", "").split("->")
    operands = left.split(",")
    mine, result = operands[at], right.split(",")[0]
    for other, letters in enumerate(operands):
        if other == at or not data[other] or not set(mine) & set(letters):
            continue
        contracted = [c for c in mine if c in letters and c not in result]
        batch = [c for c in mine if c in letters and c in result]
        place = lambda word, of: tuple(of.index(c) for c in word)
        theirs = place(contracted, letters), place(batch, letters)
        return other, place(contracted, mine), place(batch, mine), theirs
    return None
