"""The traced program at other sizes: no module is built anew.

The jaxpr is evaluated equation by equation, with the sizes in its static parameters
(shapes of reshapes and broadcasts, limits of slices, groups of a convolution, the
length of a scan) replaced by what the axes have left. Constants that the model captured
are cut like parameters. What does not touch a changed axis runs as it was traced.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxsparse.coupling.known import Known
from jaxsparse.coupling.uniform import completed, masked_entries
from jaxsparse.coupling.zeros import Masked, masked_in
from jaxsparse.narrowing._cut import Cut
from jaxsparse.narrowing._derivatives import with_derivative
from jaxsparse.narrowing._means import MEANS, resized_mean
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives import row_of
from jaxsparse.program import (
    Address,
    bind,
    call,
    called,
    cond,
    inner,
    interpret,
    scan,
    while_loop,
)
from jaxsparse.tracing import Trace
from jaxsparse.tracing.values import Node

Norms = Literal["masked", "resized"]
Positions = Literal["slice", "renumber"]


@dataclasses.dataclass(frozen=True, eq=False)
class Resized:
    """A traced program at the sizes that a cut leaves."""

    trace: Trace  # the program and the axes of all its values
    cut: Cut  # what is kept
    # "masked" keeps the number that a mean divides by; "resized" takes the new
    norms: Norms
    # "slice" keeps the old numbers of positions; "renumber" counts anew
    positions: Positions
    # The equations in which an axis changes, or in whose inner programs
    touched: frozenset[Address]
    masked: Masked  # what masked indices do, so that sums are those of the masked model
    # Of the scans around where it runs, the number of the turn
    turns: Mapping[Address, Any]

    def __call__(self, params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The flat results from flat parameters of the new sizes and flat inputs."""
        args = [Known(x) for x in (*params, *inputs)]
        return [x.value for x in self.run(self.trace.program, args, ())]

    def run(self, program: Any, args: Sequence[Known], address: Address) -> list[Known]:
        dims = self.trace.constants.get(address, ())
        cut = lambda x, axes: (
            self.cut.take(np.asarray(x), axes) if self.cut.touches(axes) else x
        )
        return interpret(
            program,
            args,
            self.eqn,
            address,
            literal=lambda x: Known(x.val, number=_number(x.val)),
            constants=[Known(cut(*x)) for x in zip(program.consts, dims, strict=True)],
        )

    def eqn(self, eqn: Any, ins: list[Known], address: Address) -> list[Known]:
        if address not in self.touched and not any(x.summed for x in ins):
            return self.as_it_was(eqn, ins)
        if eqn.primitive.name in _LOOPS or called(eqn) is not None:
            return self.entered(eqn, ins, address)
        return self.at_new_sizes(eqn, ins, address)

    def as_it_was(self, eqn: Any, ins: list[Known]) -> list[Known]:
        values = [x.value for x in ins]
        if any(x.number is None for x in ins) or not ins or called(eqn):
            return [Known(x) for x in bind(eqn, values)]
        with jax.ensure_compile_time_eval():  # numbers stay known
            return [Known(x, number=_number(x)) for x in bind(eqn, values)]

    def entered(self, eqn: Any, ins: list[Known], address: Address) -> list[Known]:
        """An equation with programs of its own."""
        name, values = eqn.primitive.name, [x.value for x in ins]
        if name == "scan":
            return [Known(x) for x in self.scan(eqn, values, address)]
        inside = [
            self.plain(program, (*address, i)) for i, program in enumerate(inner(eqn))
        ]
        if name == "while":
            test, body = inside
            outs, _ = while_loop(eqn, values, test, lambda x, _: (body(*x), ()))
        elif name == "cond":
            outs = cond(values, inside)
        elif name in {"checkpoint", "remat", "remat2"}:
            outs = call(eqn, inside[0])(*values)
        elif name in _WITH_DERIVATIVE:
            node, whole = self.trace.nodes[address], (self.trace, self.cut)
            outs = with_derivative(eqn, inside[0], *whole, node, self.other)(*values)
        else:  # what is known of values goes in and comes out
            return self.run(called(eqn), ins, (*address, 0))
        return [Known(x) for x in outs]

    def at_new_sizes(self, eqn: Any, ins: list[Known], address: Address) -> list[Known]:
        """One operation, with the sizes in its parameters replaced."""
        name, row, node = eqn.primitive.name, row_of(eqn), self.trace.nodes[address]
        if name == "iota" and self.positions == "slice":
            with jax.ensure_compile_time_eval():
                whole = np.asarray(bind(eqn, [])[0])
            return [Known(jnp.asarray(self.cut.take(whole, node.outs[0])))]
        if name == "random_split" or (row.draws and self.positions == "slice"):
            wholes = zip(bind(eqn, [x.value for x in ins]), node.outs, strict=True)
            around = [(self.trace.layers[at], i) for at, i in self.turns.items()]
            return [Known(self.cut.take_in_turn(x, d, around)) for x, d in wholes]
        if self.norms == "resized" and name in MEANS:
            ins = resized_mean(name, ins)
        new = row.resize(eqn, self.cut, node.ins, node.outs) if row.resize else {}
        patched = _Patched(eqn, {**eqn.params, **new})
        outs = bind(patched, [x.value for x in ins])
        if name == "reduce_sum":
            return [self.sum(eqn, ins[0], outs[0], node)]
        carried = row.keeps_entries and len(ins) == 1
        summed = ins[0].summed if carried else None
        if address in self.masked.uniform:
            shape = self.cut.shape(node.outs[0])
            masked = masked_entries(eqn, ins, self.masked.uniform[address], shape)
            return [Known(outs[0], summed=summed, masked=masked)]
        return [Known(x, summed=summed) for x in outs]

    def sum(self, eqn: Any, x: Known, total: Any, node: Node) -> Known:
        """A sum: that of all entries, and how many of them are left."""
        axes, (dims, *_), size = eqn.params["axes"], node.ins, self.cut.size
        if x.masked is not None:
            # Where masked indices act, the user has taken them out with what they do.
            told = [a for a in axes if not self.acts(dims[a])]
            total = completed(total, x.masked, axes, told, dims, size)
        old = math.prod(dims[a].size for a in axes)
        new = math.prod(size(dims[a]) for a in axes)
        return Known(total, summed=(old, new) if old != new else None)

    def acts(self, axis: algebra.Axis) -> bool:
        """Whether an axis loses indices that are not invariant to zeros."""
        acting, kept = self.masked.acting, self.cut.kept
        leaves = algebra.leaves(algebra.find(axis))
        return any(x in acting and x in kept for x in leaves)

    def plain(self, program: Any, address: Address) -> Callable[..., list[Any]]:
        """An inner program as a function of values."""

        def run(*values: Any) -> list[Any]:
            outs = self.run(program, [Known(x) for x in values], address)
            return [jnp.asarray(x.value) for x in outs]

        return run

    def other(self, trace: Trace, cut: Cut) -> Callable[..., list[Any]]:
        """Another program, with a cut of its own, as a function of values."""
        return resized(trace, cut, self.norms, self.positions).plain(trace.program, ())

    def scan(self, eqn: Any, values: list[Any], address: Address) -> list[Any]:
        length, body = self.cut.size(self.trace.layers[address]), inner(eqn)[0]

        def turn(values: list[Any], _: Any, number: Any) -> Any:
            within = dataclasses.replace(self, turns={**self.turns, address: number})
            return within.plain(body, (*address, 0))(*values), (), ()

        numbers = jnp.arange(length, dtype=jnp.int32)
        return scan(eqn, values, turn, length=length, over=numbers)[0]


_LOOPS = frozenset({"scan", "while", "cond"})
_WITH_DERIVATIVE = frozenset((
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
))


class _Patched:
    """An equation with other parameters."""

    def __init__(self, eqn: Any, params: Any):
        self.primitive, self.params = eqn.primitive, params


def resized(trace: Trace, cut: Cut, norms: Norms, positions: Positions) -> Resized:
    """The program at the sizes of a cut."""
    touched: set[Address] = set()
    for address, node in trace.nodes.items():
        if any(map(cut.touches, (*node.ins, *node.outs))) or _within(
            cut, trace, address
        ):
            touched.update(address[: n + 1] for n in range(0, len(address), 2))
    # A module that is built anew sums over its own channels alone.
    masked = trace.once(masked_in) if norms == "masked" else Masked({}, {})
    return Resized(trace, cut, norms, positions, frozenset(touched), masked, {})


def _within(cut: Cut, trace: Trace, address: Address) -> bool:
    """Whether a scan's length changes."""
    layer = trace.layers.get(address)
    return layer is not None and cut.size(layer) != layer.size


def _number(x: Any) -> float | None:
    if np.ndim(x) or isinstance(x, Tracer):
        return None
    try:
        return float(x)
    except (TypeError, ValueError):
        return None
