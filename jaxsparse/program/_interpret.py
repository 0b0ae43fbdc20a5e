"""One interpreter of jaxprs, for values of any kind.

A walk over a program differs from others in what an equation means to it: numbers, axes
of values, steps of a flat program. `interpret` goes from equation to equation and asks
for that. `scan`, `while_loop`, `cond` and `call` are what equations with programs of
their own mean to JAX, with bodies that may carry and return more than the model's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jaxsparse.program._jaxprs import Address, scan_counts

Meaning = Callable[[Any, list[Any], Address], Sequence[Any]]
"""Of an equation, its operands and its address the results."""


def interpret(
    program: Any,
    args: Sequence[Any],
    meaning: Meaning,
    address: Address = (),
    *,
    literal: Callable[[Any], Any] = lambda x: x.val,
    constants: Sequence[Any] | None = None,
) -> list[Any]:
    """Goes through a closed jaxpr."""
    jaxpr = program.jaxpr
    constants = program.consts if constants is None else constants
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    read = lambda x: literal(x) if isinstance(x, core.Literal) else known[x]
    for index, eqn in enumerate(jaxpr.eqns):
        results = meaning(eqn, [read(x) for x in eqn.invars], (*address, index))
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of one equation, evaluated as JAX would."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    outs = eqn.primitive.bind(*functions, *values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def scan(
    eqn: Any,
    values: Sequence[Any],
    body: Callable[[list[Any], Any, Any], tuple[list[Any], Any, Any]],
    *,
    length: int | None = None,
    carry: Any = (),
    over: Any = (),
) -> tuple[list[Any], Any, Any]:
    """The scan of an equation, with a body of one's own."""
    p = eqn.params
    first, carried = scan_counts(eqn)
    last = first + carried

    def turn(before: Any, now: Any) -> Any:
        state, beside = before
        slices, more = now
        outs, beside, stacked = body([*values[:first], *state, *slices], beside, more)
        return (list(outs[:carried]), beside), (list(outs[carried:]), stacked)

    (state, beside), (ys, stacked) = lax.scan(
        turn,
        (list(values[first:last]), carry),
        (list(values[last:]), over),
        length=p["length"] if length is None else length,
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*state, *ys], beside, stacked


def while_loop(
    eqn: Any,
    values: Sequence[Any],
    test: Callable[..., list[Any]],
    body: Callable[[list[Any], Any], tuple[list[Any], Any]],
    *,
    carry: Any = (),
) -> tuple[list[Any], Any]:
    """The loop of an equation, with a test and a body of one's own."""
    tests, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_test, of_body = values[:tests], values[tests : tests + bodies]

    def turn(before: Any) -> Any:
        outs, beside = body([*of_body, *before[0]], before[1])
        return list(outs), beside

    goes_on = lambda before: test(*of_test, *before[0])[0]
    return lax.while_loop(goes_on, turn, (list(values[tests + bodies :]), carry))


def cond(values: Sequence[Any], branches: Sequence[Callable[..., Any]]) -> Any:
    """The choice of an equation among functions in the place of its branches."""
    return lax.switch(values[0], branches, *values[1:])


def call(eqn: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function in the place of a called program: recomputed where that one is."""
    if "policy" not in eqn.params:
        return run
    again = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(run, **again)
