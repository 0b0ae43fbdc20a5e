"""Functions with derivatives of their own (`jax.custom_jvp`) at other sizes.

Their rule is a program too, traced for the old sizes. Its axes are followed like those
of the model, on copies of the axes of its arguments, and it runs at the new sizes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from jaxsparse.structured._cut import Cut
from jaxsparse.tracing import Trace
from jaxsparse.tracing import _axes as algebra
from jaxsparse.tracing._unify import Dims
from jaxsparse.tracing._walk import Node, Value, Walk


class Rule(NamedTuple):
    """The rule of a derivative.

    Attributes:
      trace: the model's, with the rule in place of its program.
      cut: what is kept of the rule's axes.
      zeros: which arguments have no tangent.
      out_zeros: which results have none.
    """

    trace: Trace
    cut: Cut
    zeros: Sequence[bool]
    out_zeros: Sequence[bool]


def rule_at(eqn: Any, trace: Trace, cut: Cut, node: Node) -> Rule | None:
    """The rule of a call with a derivative of its own.

    Args:
      eqn: a `custom_jvp_call`.
      trace: of the model.
      cut: what is kept.
      node: the axes at the equation.

    Returns:
      The rule; None if it has constants of its own or its axes do not follow from
      those of its arguments.
    """
    if eqn.params["num_consts"]:
        return None
    zeros = [not jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in eqn.invars]
    jaxpr, consts, out_zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*zeros)
    copies = _Copies()
    primals = [copies.of(dims) for dims in node.ins]
    tangents = [d for d, zero in zip(primals, zeros, strict=True) if not zero]
    walk = Walk(trace.rules)
    args = [Value(dims, True, object()) for dims in (*primals, *tangents)]
    program = core.ClosedJaxpr(jaxpr, consts)
    outs = walk.run(program, args, (), None)
    new = copies.cut(cut)
    if new is None:
        return None
    expected = [cut.shape(dims) for dims in node.outs]
    expected += [s for s, zero in zip(expected, out_zeros, strict=True) if not zero]
    if [new.shape(v.dims) for v in outs] != expected:
        return None
    inside = dataclasses.replace(
        trace,
        program=program,
        nodes=walk.nodes,
        constants=walk.constants,
        layers=walk.layers,
    )
    return Rule(inside, new, zeros, out_zeros)


class _Copies:
    """Copies of axes: what is found of them leaves the originals as they are."""

    def __init__(self):
        self.leaves: dict[int, algebra.Axis] = {}
        self.keep: list[algebra.Axis] = []

    def of(self, dims: Dims) -> Dims:
        return tuple(map(self.one, dims))

    def one(self, axis: algebra.Axis) -> algebra.Axis:
        node = algebra.find(axis)
        if node.parts:
            parts = [self.one(part) for part in node.parts]
            joined = algebra.concatenation if node.is_sum else algebra.product
            return joined(parts)
        if id(node) not in self.leaves:
            self.leaves[id(node)] = algebra.leaf(node.size)
            self.keep.append(node)
        return self.leaves[id(node)]

    def cut(self, cut: Cut) -> Cut | None:
        """The same cut of the copies; None where they are no longer leaves."""
        kept, copies = {}, {}
        for old, copy in self.leaves.items():
            node = algebra.find(copy)
            if old not in cut.kept:
                continue
            if node.parts or id(node) in kept:
                return None
            kept[id(node)] = cut.kept[old]
            copies[id(node)] = tuple(
                id(algebra.find(self.leaves[b])) if b in self.leaves else b
                for b in cut.copies[old]
            )
        return Cut(kept, copies)
