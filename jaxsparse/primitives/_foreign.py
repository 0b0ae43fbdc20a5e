"""Rows of primitives that JAX does not know from inside, from einsum-like equations."""

from collections.abc import Sequence
from typing import Any

from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives._row import Primitive, Sides
from jaxsparse.primitives.axes import Axis, leaf
from jaxsparse.primitives.dims import Dims, Rule, freeze, out_shapes, unify


def foreign(equation: str) -> Primitive:
    """The row that an equation of operands and results gives."""
    if not isinstance(equation, str) or equation.count("->") != 1:
        raise ValueError(
            f"rules: {equation!r} is no equation such as 'btd,df->btf', in which equal "
            "letters are the same axis."
        )
    left, right = equation.replace(" ", "").split("->")
    operands, results = left.split(","), right.split(",")
    return Primitive(
        _axes(equation, operands, results), sides=_sides(operands, results[0])
    )


def _axes(equation: str, operands: list[str], results: list[str]) -> Rule:
    def rule(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
        shapes = out_shapes(eqn)
        fits = len(operands) == len(ins) and len(results) == len(shapes)
        for letters, dims in zip((*operands, *results), (*ins, *shapes), strict=False):
            fits &= letters == "?" or len(letters) == len(dims)
        if not fits:
            raise ValueError(
                f"rules: {equation!r} does not fit {eqn.primitive.name} with operands "
                f"of {[len(d) for d in ins]} and results of {list(map(len, shapes))} "
                "axes."
            )
        known: dict[str, Axis] = {}
        for letters, dims in zip(operands, ins, strict=True):
            for letter, axis in zip(letters, dims, strict=False) if dims else ():
                # Its sizes are in its own program, which no one can change from here.
                algebra.flag(axis, f"fixed: {eqn.primitive.name}", eqn=eqn)
                if letters == "?":
                    freeze(axis, eqn.primitive.name, eqn)
                elif letter in known:
                    unify(known[letter], axis, eqn)
                else:
                    known[letter] = axis
        named = lambda letters, shape: tuple(
            known[c] if c in known else leaf(n)
            for c, n in zip(letters.ljust(len(shape), "?"), shape, strict=True)
        )
        return [named(c, s) for c, s in zip(results, shapes, strict=True)]

    return rule


def _sides(operands: list[str], result: str) -> Any:
    """How one operand is contracted with the first other one that shares a letter."""

    def sides(eqn: Any, at: int, data: Sequence[bool]) -> Sides | None:
        mine = operands[at]
        for other, letters in enumerate(operands):
            if other == at or not data[other] or not set(mine) & set(letters):
                continue
            contracted = [c for c in mine if c in letters and c not in result]
            batch = [c for c in mine if c in letters and c in result]
            place = lambda word, of: tuple(of.index(c) for c in word)
            theirs = place(contracted, letters), place(batch, letters)
            return other, place(contracted, mine), place(batch, mine), theirs
        return None

    return sides
