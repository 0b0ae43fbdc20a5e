"""Finding the residual branches of a traced model, in its flat program."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxsparse.depth._flat_program import Addition, Flat, Held, Unit, used
from jaxsparse.program import Address, Step, Steps, called, equations, flatten
from jaxsparse.tracing import Trace


def flat_of(trace: Trace) -> Flat:
    """The flat program of a trace with its branches."""
    found = _flattened(trace)
    if not found.additions:
        raise ValueError(
            "This model has no residual branches. The search looks for a sum x + y of "
            "two values of one shape, with y computed from x by at least one "
            "contraction (a matrix product, a convolution) of a parameter; in the "
            "model itself or in a scan that hands out slices of stacked parameters."
        )
    return found


def _flattened(trace: Trace) -> Flat:
    # Functions with derivatives of their own stay whole: they would lose them.
    custom = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
    calls, checkpoints = set(), {}
    for address, eqn in equations(trace.program):
        if called(eqn) is not None and eqn.primitive.name not in custom:
            calls.add(address)
            if "policy" in eqn.params:
                checkpoints[address] = eqn
    scans = {scan for site in trace.sites for scan, _ in site.origin.loops}
    unroll: set[Address] = set()
    for scan in sorted(scans, key=len):
        around = [scan[:i] for i in range(1, len(scan), 2)]
        if all(a in unroll or a in calls for a in around):
            unroll.add(scan)
    steps = flatten(trace.program, len(trace.paths), unroll, calls)
    held = _holding(steps, trace)
    additions, before = _additions(trace, steps)
    return Flat(
        steps,
        held,
        frozenset(unroll),
        frozenset(calls),
        checkpoints,
        additions,
        before,
    )


def flat_for(trace: Trace, additions: Collection[Addition]) -> Flat:
    """The flat program in which only those scans are unrolled that have to be."""
    whole = trace.once(flat_of)
    within = lambda scan: any(a.address[: len(scan)] == scan for a in additions)
    scans = frozenset(filter(within, whole.unrolled))
    if scans == whole.unrolled:
        return whole
    steps = flatten(trace.program, len(trace.paths), scans, whole.calls)
    places = {(s.address, s.turns): i for i, s in enumerate(steps.steps) if s.eqn}
    return dataclasses.replace(
        whole,
        steps=steps,
        held=_holding(steps, trace),
        unrolled=scans,
        additions={a: places[a.address, a.turns] for a in additions},
        before={},
    )


def _holding(flat: Steps, trace: Trace) -> dict[int, Held]:
    """The variables that hold a parameter, so that its unread slices can go."""
    held = {}
    for x, (path, dims) in zip(flat.arguments, trace.dims.items(), strict=False):
        held[x] = Held(Unit(path, ()), tuple(range(len(dims))))
    for step in flat.steps:
        first = step.ins[0] if step.ins else None
        source = held.get(first) if isinstance(first, int) else None
        if source is None:
            continue
        (path, at), axes = source
        if step.name == "turn":
            turn = int(flat.constants[step.ins[1]])
            held[step.outs[0]] = Held(Unit(path, (*at, (axes[0], turn))), axes[1:])
        elif step.name in {"convert_element_type", "copy"}:
            held[step.outs[0]] = source
        elif step.name == "transpose":
            order = step.eqn.params["permutation"]
            held[step.outs[0]] = Held(source.unit, tuple(axes[i] for i in order))
    return held


# What leaves x recognisable in x + y.
_CARRIES = frozenset({"convert_element_type", "copy", "sharding_constraint", "name",
                      "mul", "div", "optimization_barrier"})  # fmt: skip


def _additions(trace: Trace, flat: Steps) -> tuple[dict[Addition, int], dict[int, int]]:
    """The additions of residual branches, and what values of the stream were before."""
    live = used(flat, {})[0]
    carried: dict[int, int] = {}
    for step in (flat.steps[i] for i in live):
        data = [x for x in step.ins if isinstance(x, int) and x in flat.data]
        if step.name in _CARRIES and len(data) == len(step.outs) == 1:
            first = step.ins.index(data[0])
            if step.name == "div" and first:
                continue  # a quotient by x is no multiple of it
            if _shape(step.eqn.invars[first]) == _shape(step.eqn.outvars[0]):
                carried[step.outs[0]] = data[0]
    bits: dict[int, int] = {}  # for each value that may be an x
    for step in (flat.steps[i] for i in live):
        for x in step.ins if _adds(step, flat) else ():
            while x is not None and x not in bits:
                bits[x] = 1 << len(bits)
                x = carried.get(x)
    contractions = {
        site.address[:i]
        for site in trace.sites
        for i in range(1, len(site.address) + 1, 2)
    }
    found: dict[Addition, int] = {}
    # Of which of those values a variable is computed; and of which by a contraction.
    above: dict[int, int] = {}
    through: dict[int, int] = {}
    for i in live:
        step = flat.steps[i]
        if not step.data:
            continue
        ins = [x for x in step.ins if isinstance(x, int) and x in flat.data]
        if _adds(step, flat):
            for stream in (0, 1):
                a, b = ins[stream], ins[1 - stream]
                if _is_branch(line(a, carried), b, bits, above, through):
                    found[Addition(step.address, step.turns, stream)] = i
                    carried[step.outs[0]] = a
                    break
        one, two = 0, 0
        for x in ins:
            one |= above.get(x, 0) | bits.get(x, 0)
            two |= through.get(x, 0)
        if step.eqn is not None and step.address in contractions:
            two = one
        for x in step.outs:
            above[x], through[x] = one, two
    return found, carried


def _is_branch(
    line: Iterator[int],
    y: int,
    bits: Mapping[int, int],
    above: Mapping[int, int],
    through: Mapping[int, int],
) -> bool:
    # The first of the stream's values that y is computed from decides: y may see one
    # before (branches side by side), but x + x^3 is no branch for what lies before x.
    for x in line:
        if above.get(y, 0) & bits.get(x, 0):
            return bool(through.get(y, 0) & bits[x])
    return False


def line(x: int | None, carried: Mapping[int, int]) -> Iterator[int]:
    """A value of the stream, then those that it was before."""
    while x is not None:
        yield x
        x = carried.get(x)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _adds(step: Step, flat: Steps) -> bool:
    """Whether a step adds two arrays of one shape that depend on the inputs."""
    if step.name not in {"add", "add_any"} or not all(
        isinstance(x, int) and x in flat.data for x in step.ins
    ):
        return False
    shapes = {_shape(x) for x in (*step.eqn.invars, *step.eqn.outvars)}
    result = step.eqn.outvars[0].aval
    return (
        len(shapes) == 1
        and result.ndim > 0
        and jnp.issubdtype(result.dtype, jnp.floating)
    )
