"""Evaluates a traced program and looks at what meets its kernels on the way.

What is found inside of a loop goes along in the loop: stacked where a scan hands out
the kernel's slices (each layer has statistics of its own), merged where all turns read
the same kernel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxsparse.calibration._stats import merge
from jaxsparse.calibration.rows import zeros_like
from jaxsparse.program import bind, called, inner, scan_counts

Address = tuple[int, ...]
Look = Callable[[Address, Any, list[Any]], Any]
Found = dict[Address, Any]


def capture(
    program: Any,
    args: Sequence[Any],
    look: Look,
    scans: Mapping[Address, tuple[Address, ...]],
) -> tuple[list[Any], Found]:
    """Runs a program; `look(address, eqn, operands)` is asked at some equations.

    Args:
      program: a closed jaxpr.
      args: its arguments.
      look: returns statistics by name.
      scans: at which equations to look, and which scans hand out slices there.

    Returns:
      The results, and what was found by address, with a leading axis for each scan
      that hands out slices.
    """
    return _Run(look, scans).run(program, args, ())


def capture_at(
    eqn: Any,
    values: list[Any],
    address: Address,
    look: Look,
    scans: Mapping[Address, tuple[Address, ...]],
) -> tuple[list[Any], Found]:
    """`capture` for one equation: a contraction, or a loop with some inside.

    Args:
      eqn: the equation.
      values: its operands.
      address: where it is.
      look: see `capture`.
      scans: see `capture`.

    Returns:
      Its results and what was found.
    """
    return _Run(look, scans).into(eqn, values, address)


class _Run:
    """A look and where to look; no state."""

    def __init__(self, look: Look, scans: Mapping[Address, tuple[Address, ...]]):
        self.look, self.scans = look, scans
        self.prefixes = {a[:i] for a in scans for i in range(1, len(a) + 1)}

    def run(
        self, program: Any, args: Sequence[Any], address: Address
    ) -> tuple[list[Any], Found]:
        jaxpr = program.jaxpr
        env = dict(zip(jaxpr.constvars, program.consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
        found: Found = {}
        for index, eqn in enumerate(jaxpr.eqns):
            here, values = (*address, index), [read(x) for x in eqn.invars]
            if here in self.prefixes:
                outs, more = self.into(eqn, values, here)
                found.update(more)
            else:
                outs = bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(x) for x in jaxpr.outvars], found

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
        p, body = eqn.params, inner(eqn)[0]
        first, carried = scan_counts(eqn)
        last = first + carried
        consts, init, xs = values[:first], values[first:last], values[last:]

        def once(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any], Found]:
            outs, found = self.run(body, [*consts, *carry, *x], (*here, 0))
            return outs[: last - first], outs[last - first :], found

        at = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        _, _, shapes = jax.eval_shape(once, init, [at(jnp.asarray(x)) for x in xs])
        merged = {a: s for a, s in shapes.items() if here not in self.scans[a]}

        def turn(carry: Any, x: list[Any]) -> Any:
            state, total = carry
            state, ys, found = once(state, x)
            total = {a: _merge(total[a], found[a]) for a in total}
            return (state, total), (ys, {a: found[a] for a in found if a not in total})

        (state, total), (ys, stacked) = lax.scan(
            turn,
            (init, zeros_like(merged)),
            xs,
            length=p["length"],
            reverse=p["reverse"],
        )
        return [*state, *ys], {**total, **stacked}

    def _while(
        self, eqn: Any, values: list[Any], here: Address
    ) -> tuple[list[Any], Found]:
        p = eqn.params
        tests, bodies = p["cond_nconsts"], p["body_nconsts"]
        test, body = inner(eqn)
        consts, init = values[tests : tests + bodies], values[tests + bodies :]
        once = lambda state: self.run(body, [*consts, *state], (*here, 1))
        goes_on = core.jaxpr_as_fun(test)
        _, shapes = jax.eval_shape(once, init)

        def turn(carry: Any) -> Any:
            state, total = carry
            state, found = once(state)
            return state, {a: _merge(total[a], found[a]) for a in total}

        return lax.while_loop(
            lambda carry: goes_on(*values[:tests], *carry[0])[0],
            turn,
            (list(init), zeros_like(shapes)),
        )

    def _cond(
        self, eqn: Any, values: list[Any], here: Address
    ) -> tuple[list[Any], Found]:
        index, operands = values[0], values[1:]
        runs = [
            lambda *ops, i=i, b=b: self.run(b, ops, (*here, i))
            for i, b in enumerate(inner(eqn))
        ]
        shapes: Found = {}
        for run in runs:
            shapes.update(jax.eval_shape(run, *operands)[1])

        def branch(run: Any) -> Any:
            def full(*ops: Any) -> Any:
                outs, found = run(*ops)
                return outs, {**zeros_like(shapes), **found}

            return full

        return lax.switch(index, [branch(run) for run in runs], *operands)


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {name: merge(a[name], b[name]) for name in a}
