"""A traced program with packed kernels among its values."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxsparse._typing import Array
from jaxsparse.kernels._operand import (
    Multiply,
    Operand,
    contraction,
    convolution,
    dense_of,
    has_layers,
    layer_of,
    moved,
)
from jaxsparse.program import (
    Address,
    bind,
    call,
    called,
    cond,
    inner,
    interpret,
    scan,
    scan_counts,
    while_loop,
)

MadeDense = Callable[[Operand, Any], None]
"""Told of a kernel that an equation needs as a dense array."""


def evaluate(
    program: Any, args: Sequence[Any], multiply: Multiply, made_dense: MadeDense
) -> list[Array]:
    """The results of a closed jaxpr, some of whose arguments are `Operand`s."""
    run = _Run(multiply, made_dense)
    return [run.plain(x, None) for x in run.run(program, args, ())]


class _Run:
    """What is done with products, and who is told of the rest; no state."""

    def __init__(self, multiply: Multiply, made_dense: MadeDense):
        self.multiply, self.made_dense = multiply, made_dense

    def plain(self, x: Any, eqn: Any) -> Any:
        """A value as an array."""
        if not isinstance(x, Operand):
            return x
        self.made_dense(x, eqn)
        return dense_of(x)

    def run(self, program: Any, args: Sequence[Any], address: Address) -> list[Any]:
        return interpret(program, args, self.meaning, address)

    def meaning(self, eqn: Any, values: list[Any], here: Address) -> Sequence[Any]:
        if not any(isinstance(x, Operand) for x in values):
            return bind(eqn, values)
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, values, here)
        if name == "while":
            return self._while(eqn, values, here)
        if name == "cond":
            return self._cond(eqn, values, here)
        if called(eqn) is not None:
            if "policy" not in eqn.params:  # what it returns may be a kernel still
                return self.run(called(eqn), values, (*here, 0))
            arrays, wrap = _apart(values)
            body = lambda *xs: self._dense_run(called(eqn), wrap(xs), (*here, 0), eqn)
            return call(eqn, body)(*arrays)
        found = self._one(eqn, values)
        if found is None:
            return bind(eqn, [self.plain(x, eqn) for x in values])
        return found

    def _dense_run(
        self, program: Any, args: Sequence[Any], here: Address, eqn: Any
    ) -> list[Array]:
        """Runs a program whose results JAX has to see."""
        return [self.plain(y, eqn) for y in self.run(program, args, here)]

    def _one(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        """The results of a plain equation; None if it needs the dense kernel."""
        name, first = eqn.primitive.name, values[0]
        if len(values) == 1:
            one = moved(eqn, first)
            return None if one is None else [one]
        which = [isinstance(x, Operand) for x in values]
        if sum(which) != 1 or len(values) != 2:
            return None
        side = which.index(True)
        if name == "dot_general":
            y = contraction(eqn, values[side], values[1 - side], side, self.multiply)
        elif name == "conv_general_dilated" and side == 1:
            y = convolution(eqn, values[1], first, self.multiply)
        else:
            return None
        return None if y is None else [y]

    def _scan(self, eqn: Any, values: list[Any], here: Address) -> list[Any]:
        first, carried = scan_counts(eqn)
        last = first + carried
        # Layers are handed out; what is carried along changes, so it is dense.
        over = [
            x if not isinstance(x, Operand) or has_layers(x) else self.plain(x, eqn)
            for x in values[last:]
        ]
        carry = [self.plain(x, eqn) for x in values[first:last]]
        slices = [x.value if isinstance(x, Operand) else x for x in over]

        def turn(own: list[Any], beside: Any, more: Any) -> Any:
            del more
            got = [
                layer_of(x, y) if isinstance(x, Operand) else y
                for x, y in zip(over, own[last:], strict=True)
            ]
            args = [*own[:last], *got]
            return self._dense_run(inner(eqn)[0], args, (*here, 0), eqn), beside, ()

        return scan(eqn, [*values[:first], *carry, *slices], turn)[0]

    def _while(self, eqn: Any, values: list[Any], here: Address) -> list[Any]:
        tests, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        held = tests + bodies
        test, body = inner(eqn)
        carry = [self.plain(x, eqn) for x in values[held:]]
        goes_on = lambda *xs: self.run(test, xs, (*here, 0))

        def turn(own: list[Any], beside: Any) -> Any:
            return self._dense_run(body, own, (*here, 1), eqn), beside

        return while_loop(eqn, [*values[:held], *carry], goes_on, turn)[0]

    def _cond(self, eqn: Any, values: list[Any], here: Address) -> list[Any]:
        arrays, wrap = _apart(values[1:])

        def branch(i: int, program: Any) -> Callable[..., list[Any]]:
            return lambda *xs: self._dense_run(program, wrap(xs), (*here, i), eqn)

        branches = [branch(i, b) for i, b in enumerate(inner(eqn))]
        return cond([self.plain(values[0], eqn), *arrays], branches)


def _apart(
    values: Sequence[Any],
) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """Values as pytrees of arrays, and a function that makes operands of such again."""
    arrays = [x.value if isinstance(x, Operand) else x for x in values]

    def wrap(own: Sequence[Any]) -> list[Any]:
        return [
            dataclasses.replace(x, value=y) if isinstance(x, Operand) else y
            for x, y in zip(values, own, strict=True)
        ]

    return arrays, wrap
