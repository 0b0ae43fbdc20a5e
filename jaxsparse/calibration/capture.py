"""Evaluates a traced program and looks at what meets its kernels on the way.

What is found inside of a loop goes along in the loop: stacked where a scan hands out
the kernel's slices (each layer has statistics of its own), merged where all turns read
the same kernel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxsparse.calibration._stats import merge
from jaxsparse.calibration.rows import zeros_like
from jaxsparse.program import (
    Address,
    bind,
    called,
    cond,
    inner,
    interpret,
    scan,
    while_loop,
)

Look = Callable[[Address, Any, list[Any]], Any]
Found = dict[Address, Any]


def capture(
    program: Any,
    args: Sequence[Any],
    look: Look,
    scans: Mapping[Address, tuple[Address, ...]],
) -> tuple[list[Any], Found]:
    """Runs a program; `look(address, eqn, operands)` is asked at some equations."""
    return _Run(look, scans).run(program, args, ())


def capture_at(
    eqn: Any,
    values: list[Any],
    address: Address,
    look: Look,
    scans: Mapping[Address, tuple[Address, ...]],
) -> tuple[list[Any], Found]:
    """`capture` for one equation: a contraction, or a loop with some inside."""
    return _Run(look, scans).into(eqn, values, address)


class _Run:
    """A look and where to look; no state."""

    def __init__(self, look: Look, scans: Mapping[Address, tuple[Address, ...]]):
        self.look, self.scans = look, scans
        self.prefixes = {a[:i] for a in scans for i in range(1, len(a) + 1)}

    def run(
        self, program: Any, args: Sequence[Any], address: Address
    ) -> tuple[list[Any], Found]:
        found: Found = {}

        def meaning(eqn: Any, values: list[Any], here: Address) -> list[Any]:
            if here not in self.prefixes:
                return bind(eqn, values)
            outs, more = self.into(eqn, values, here)
            found.update(more)
            return outs

        return interpret(program, args, meaning, address), found

    def into(
        self, eqn: Any, values: list[Any], here: Address
    ) -> tuple[list[Any], Found]:
        name = eqn.primitive.name
        if here in self.scans:
            outs = bind(eqn, values)
            return outs, {here: self.look(here, eqn, values)}
        if name == "scan":
            return self._scan(eqn, values, here)
        if name == "while":
            return self._while(eqn, values, here)
        if name == "cond":
            return self._cond(eqn, values, here)
        return self.run(called(eqn), values, (*here, 0))

    def _scan(
        self, eqn: Any, values: list[Any], here: Address
    ) -> tuple[list[Any], Found]:
        body = inner(eqn)[0]
        once = lambda values: self.run(body, values, (*here, 0))
        _, shapes = jax.eval_shape(once, [v.aval for v in body.jaxpr.invars])
        merged = {a: s for a, s in shapes.items() if here not in self.scans[a]}

        def turn(values: list[Any], total: Found, _: Any) -> Any:
            outs, found = once(values)
            total = {a: _merge(total[a], found[a]) for a in total}
            return outs, total, {a: found[a] for a in found if a not in total}

        outs, total, stacked = scan(eqn, values, turn, carry=zeros_like(merged))
        return outs, {**total, **stacked}

    def _while(
        self, eqn: Any, values: list[Any], here: Address
    ) -> tuple[list[Any], Found]:
        test, body = inner(eqn)
        once = lambda values: self.run(body, values, (*here, 1))
        _, shapes = jax.eval_shape(once, [v.aval for v in body.jaxpr.invars])

        def turn(values: list[Any], total: Found) -> Any:
            outs, found = once(values)
            return outs, {a: _merge(total[a], found[a]) for a in total}

        goes_on = core.jaxpr_as_fun(test)
        return while_loop(eqn, values, goes_on, turn, carry=zeros_like(shapes))

    def _cond(
        self, eqn: Any, values: list[Any], here: Address
    ) -> tuple[list[Any], Found]:
        runs = [
            lambda *ops, i=i, b=b: self.run(b, ops, (*here, i))
            for i, b in enumerate(inner(eqn))
        ]
        shapes: Found = {}
        for run in runs:
            shapes.update(jax.eval_shape(run, *values[1:])[1])

        def branch(run: Any) -> Any:
            def full(*ops: Any) -> Any:
                outs, found = run(*ops)
                return outs, {**zeros_like(shapes), **found}

            return full

        return cond(values, [branch(run) for run in runs])


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {name: merge(a[name], b[name]) for name in a}
