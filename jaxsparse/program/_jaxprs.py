"""Reading jaxprs: what lies within an equation, where it is, and which line made it."""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core, source_info_util

Address = tuple[int, ...]
"""Where an equation is: its index, then for each jaxpr that it lies in which of its
equation's jaxprs and the index there."""

_CALLED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


def closed(jaxpr: Any) -> Any:
    """A jaxpr with its constants, which most have none of."""
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())


def called(eqn: Any) -> Any:
    """The jaxpr that an equation runs once, with its own operands; or None."""
    key = _CALLED.get(eqn.primitive.name)
    found = eqn.params.get(key) if key else None
    return None if found is None else closed(found)


def inner(eqn: Any) -> list[Any]:
    """All jaxprs of an equation, in the order that addresses count."""
    name, p = eqn.primitive.name, eqn.params
    if name == "scan":
        return [closed(p["jaxpr"])]
    if name == "while":
        return [closed(p["cond_jaxpr"]), closed(p["body_jaxpr"])]
    if name == "cond":
        return [closed(b) for b in p["branches"]]
    one = called(eqn)
    return [] if one is None else [one]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried.

    What is scanned over has an axis more outside than inside. (How a scan's parameters
    say it has changed between versions of JAX.)
    """
    body = inner(eqn)[0].jaxpr
    more = lambda outside, inside: sum(
        a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True)
    )
    carried = len(eqn.outvars) - more(eqn.outvars, body.outvars)
    return len(eqn.invars) - more(eqn.invars, body.invars) - carried, carried


_HERE = str(pathlib.Path(__file__).parents[1]) + os.sep
# NumPy has helpers that JAX calls, such as `flip`.
# A line of `summarize`, outermost first: "model.py:12:8 (apply)".
_FRAME = re.compile(r"(?P<file>.*?):(?P<line>\d+)(:\d+)? \((?P<function>.*)\)")
_LIBRARIES = re.compile(r"[/\\](flax|equinox|haiku|optax|numpy)[/\\]")


def source_of(eqn: Any) -> str:
    """The line of the model that an equation comes from.

    That is the innermost one that does not lie in JAX, or in a library of layers: a
    user knows where a layer is used, not what it consists of.
    """
    text = source_info_util.summarize(eqn.source_info, 1000)
    frames = [m for m in map(_FRAME.fullmatch, reversed(text.splitlines())) if m]
    frames = [m for m in frames if not m["file"].startswith(_HERE)]
    own = [m for m in frames if not _LIBRARIES.search(m["file"])] or frames
    return "{file}:{line} ({function})".format(**own[0].groupdict()) if own else ""


def equations(jaxpr: Any, address: Address = ()) -> Iterator[tuple[Address, Any]]:
    """All equations of a jaxpr and of those in it, with their addresses."""
    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        yield (*address, index), eqn
        for i, sub in enumerate(inner(eqn)):
            yield from equations(sub, (*address, index, i))


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and type of an array, or of what stands for one."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
