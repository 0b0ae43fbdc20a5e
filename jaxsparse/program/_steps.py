"""A program as a flat list of steps: calls inlined, chosen scans unrolled.

The layer-wise recipe stops at every kernel, also at one inside of a scan over layers:
there each turn of the scan becomes steps of its own. Variables are numbers.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxsparse.program._counters import carried_counters, number
from jaxsparse.program._interpret import bind, interpret
from jaxsparse.program._jaxprs import Address, called, inner, scan_counts


class Step(NamedTuple):
    """One equation, or a slice or a stack that takes the place of a scan's.

    Attributes:
      name: the primitive.
      run: computes the results from the operands.
      text: what tells its parameters from those of other steps.
      ins: the operands: numbers of variables, or literals.
      outs: the numbers of the results.
      data: whether it depends on the model's inputs.
      address: of the equation.
      turns: of the unrolled scans around it.
      eqn: the equation; None for a slice or a stack.
    """

    name: str
    run: Callable[..., Sequence[Any]]
    text: str
    ins: tuple[Any, ...]
    outs: tuple[int, ...]
    data: bool
    address: Address
    turns: tuple[int, ...]
    eqn: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """A flat program.

    Attributes:
      steps: in order.
      arguments: the numbers of the program's arguments, parameters first.
      results: the numbers of its results, or literals.
      constants: arrays by number.
      data: the numbers of variables that depend on the model's inputs.
      unrolled: the scans whose turns became steps of their own.
    """

    steps: tuple[Step, ...]
    arguments: tuple[int, ...]
    results: tuple[Any, ...]
    constants: dict[int, Any]
    data: frozenset[int]
    unrolled: frozenset[Address]


def flatten(
    program: Any,
    parameters: int,
    unroll: Collection[Address],
    enter: Collection[Address],
) -> Steps:
    """Flattens a program."""
    return _Flattening(set(unroll), set(enter)).whole(program, parameters)


def text_of(eqn: Any) -> str:
    """A text of an equation's parameters, equal for equations that compute the same."""
    # Constants within inner jaxprs do not show in their text, and functions show as
    # addresses that say nothing.
    parts = []
    for key, value in sorted(eqn.params.items()):
        if key in {"jvp_jaxpr_fun", "jvp", "fwd", "bwd", "fwd_jaxpr_thunk"}:
            continue
        parts.append(f"{key}={value}")
        parts.extend(str(id(const)) for const in _constants(value))
    return " ".join(parts)


def _constants(value: Any) -> Iterator[Any]:
    """The constants of all jaxprs in an equation's parameter, at any depth."""
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, core.ClosedJaxpr):
            yield from part.consts
        jaxpr = part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
        if isinstance(jaxpr, core.Jaxpr):
            for eqn in jaxpr.eqns:
                for inside in eqn.params.values():
                    yield from _constants(inside)


def key_of(
    steps: Sequence[Step], arguments: Sequence[int], wanted: Sequence[Any]
) -> Any:
    """What tells pieces of programs from those that compute something else."""
    numbers: dict[int, int] = {}
    number = lambda x: numbers.setdefault(x, len(numbers))
    name = lambda x: f"{x.val!r}:{x.aval}" if isinstance(x, core.Literal) else number(x)
    head = tuple(map(number, arguments))
    body = tuple(
        (s.name, s.text, tuple(map(name, s.ins)), tuple(map(number, s.outs)))
        for s in steps
    )
    return head, body, tuple(map(name, wanted))


class _Flattening:
    """The steps found so far."""

    def __init__(self, unroll: set[Address], enter: set[Address]):
        self.unroll, self.enter = unroll, enter
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.data: set[int] = set()
        self.indices: dict[Any, int] = {}
        self.texts: dict[int, str] = {}
        self.next = 0

    def new(self) -> int:
        self.next += 1
        return self.next

    def whole(self, program: Any, parameters: int) -> Steps:
        arguments = [self.new() for _ in program.jaxpr.invars]
        self.data.update(arguments[parameters:])
        results = self.run(program, arguments, (), ())
        return Steps(
            tuple(self.steps),
            tuple(arguments),
            tuple(results),
            self.constants,
            frozenset(self.data),
            frozenset(self.unroll),
        )

    def index(self, value: int, dtype: Any = np.int32) -> int:
        key = int(value), np.dtype(dtype)
        if key not in self.indices:
            self.indices[key] = self.constant(np.asarray(value, dtype))
        return self.indices[key]

    def constant(self, value: Any) -> int:
        number = self.new()
        self.constants[number] = value
        return number

    def run(
        self, program: Any, args: Sequence[Any], address: Address, turns: tuple
    ) -> list[Any]:
        def meaning(eqn: Any, ins: list[Any], here: Address) -> list[Any]:
            if here in self.unroll:
                return self.scan(eqn, ins, here, turns)
            if here in self.enter and called(eqn) is not None:
                return self.run(called(eqn), ins, (*here, 0), turns)
            return self.equation(eqn, ins, here, turns)

        constants = [self.constant(c) for c in program.consts]
        return interpret(
            program, args, meaning, address, literal=lambda x: x, constants=constants
        )

    def add(self, name, run, text, ins, count, here, turns, eqn=None) -> list[int]:
        outs = tuple(self.new() for _ in range(count))
        data = any(x in self.data for x in ins if isinstance(x, int))
        if data:
            self.data.update(outs)
        step = Step(name, run, text, tuple(ins), outs, data, here, turns, eqn)
        self.steps.append(step)
        return list(outs)

    def equation(self, eqn: Any, ins: list[Any], here: Address, turns) -> list[int]:
        if id(eqn) not in self.texts:
            self.texts[id(eqn)] = text_of(eqn)
        return self.add(
            eqn.primitive.name,
            lambda *values: bind(eqn, list(values)),
            self.texts[id(eqn)],
            ins,
            len(eqn.outvars),
            here,
            turns,
            eqn,
        )

    def scan(self, eqn: Any, ins: list[Any], here: Address, turns) -> list[Any]:
        p = eqn.params
        first, carried = scan_counts(eqn)
        last = first + carried
        consts, carry, xs = ins[:first], ins[first:last], ins[last:]
        stacks: list[list[Any]] = [[] for _ in eqn.outvars[last - first :]]
        order = range(p["length"])
        first_known = [
            number(x.val) if isinstance(x, core.Literal) else None for x in carry
        ]
        counters = carried_counters(eqn, first_known, here)
        for turn in reversed(order) if p["reverse"] else order:
            # The turn is a number that is handed in: all turns compile to one program.
            at = self.index(turn)
            # What the loop itself counts too.
            carry = [
                x if c is None else self.index(c.values[turn], v.aval.dtype)
                for x, c, v in zip(carry, counters, eqn.invars[first:last], strict=True)
            ]
            slices = [
                self.add("turn", _turn, "", [x, at], 1, here, turns)[0] for x in xs
            ]
            outs = self.run(
                inner(eqn)[0], [*consts, *carry, *slices], (*here, 0), (*turns, turn)
            )
            carry = outs[: last - first]
            for stack, y in zip(stacks, outs[last - first :], strict=True):
                stack.append(y)
        whole = []
        for stack in stacks:
            stack = stack[::-1] if p["reverse"] else stack
            whole += self.add("turns", _turns, "", stack, 1, here, turns)
        return [*carry, *whole]


def _turn(x: Any, at: Any) -> list[Any]:
    return [lax.dynamic_index_in_dim(x, at, keepdims=False)]


def _turns(*values: Any) -> list[Any]:
    return [jnp.stack([jnp.asarray(v) for v in values])]
