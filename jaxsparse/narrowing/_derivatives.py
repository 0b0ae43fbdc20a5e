"""Functions with derivatives of their own (`custom_jvp`, `custom_vjp`) at other sizes.

Their rules are programs too, which JAX gives for the old sizes. Their axes are followed
like those of the model, on copies of the axes of the function's operands, and they run
at the new sizes. All of that happens only where something is differentiated.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.coupling.copies import covered
from jaxsparse.narrowing._cut import Cut
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives import row_of
from jaxsparse.primitives.dims import Dims
from jaxsparse.program import bind
from jaxsparse.tracing import Trace
from jaxsparse.tracing.values import Node, Value
from jaxsparse.tracing.walk import Walk

Plain = Callable[..., list[Any]]
"""A function of flat values."""
Runner = Callable[[Trace, Cut], Plain]
"""Makes of a traced program the function at the sizes of a cut."""

_STAYS = frozenset({"frozen", "fixed", "gathered"})  # notes on axes that keep theirs


def with_derivative(
    eqn: Any, plain: Plain, trace: Trace, cut: Cut, node: Node, runner: Runner
) -> Plain:
    """A function of the new sizes with the rule that the traced one has."""
    make = _with_jvp if eqn.primitive.name == "custom_jvp_call" else _with_vjp
    function = make(eqn, plain, _Rule(eqn, trace, cut, node), runner)
    constants = eqn.params.get("num_consts", 0)
    return lambda *values: function(
        *map(_constant, values[:constants]), *values[constants:]
    )


def _with_jvp(eqn: Any, plain: Plain, rule: "_Rule", runner: Runner) -> Plain:
    function = jax.custom_jvp(plain)
    ins, outs = _differentiated(eqn), _moving(eqn.outvars)

    def derivative(primals: list[Any], tangents: list[Any]) -> Any:
        whole = lambda *moved: bind(eqn, _put(primals, ins, moved))
        found, moved = jax.jvp(whole, tuple(_some(primals, ins)), tuple(tangents))
        return [*found, *_some(moved, outs)]

    @functools.cache
    def program() -> Plain:
        dims = (*rule.ins, *_some(rule.ins, ins))
        found = rule.follow(derivative, _shapes(eqn.invars, ins), dims)
        rule.agree(found.outs, (*rule.outs, *_some(rule.outs, outs)))
        return runner(found.trace, rule.cut(found.trace))

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        found = program()(*primals, *_some(tangents, ins))
        values, moved = found[: len(outs)], found[len(outs) :]
        none = [np.zeros(np.shape(x), jax.dtypes.float0) for x in values]
        return values, _put(none, outs, moved)

    return function


def _with_vjp(eqn: Any, plain: Plain, rule: "_Rule", runner: Runner) -> Plain:
    function = jax.custom_vjp(plain)
    ins, outs = _differentiated(eqn), _moving(eqn.outvars)
    kept: list[Any] = []  # the structure of what the forward pass keeps

    def forward(primals: list[Any]) -> Any:
        whole = lambda *moved: bind(eqn, _put(primals, ins, moved))
        found, pullback = jax.vjp(whole, *_some(primals, ins))
        leaves, structure = jax.tree.flatten(pullback)
        kept[:] = [structure]
        return [*found, *leaves]

    def backward(leaves: list[Any], moved: list[Any]) -> Any:
        none = [np.zeros(v.aval.shape, jax.dtypes.float0) for v in eqn.outvars]
        return jax.tree.unflatten(kept[0], leaves)(_put(none, outs, moved))

    @functools.cache
    def programs() -> tuple[Plain, Plain]:
        there = rule.follow(forward, (_shapes(eqn.invars),), rule.ins)
        rule.agree(there.outs[: len(outs)], rule.outs)
        residuals = there.trace.program.jaxpr.outvars[len(outs) :]
        shapes = _shapes(residuals), _some(_shapes(eqn.outvars), outs)
        dims = (*there.outs[len(outs) :], *_some(rule.outs, outs))
        back = rule.follow(backward, shapes, dims)
        rule.agree(back.outs, _some(rule.ins, ins))
        cut = rule.cut(there.trace, back.trace)
        return runner(there.trace, cut), runner(back.trace, cut)

    def run_forward(*values: Any) -> Any:
        found = programs()[0](*values)
        return found[: len(outs)], found[len(outs) :]

    def run_backward(residuals: Any, moved: Any) -> Any:
        found = programs()[1](*residuals, *_some(moved, outs))
        return tuple(_put([None] * len(ins), ins, found))

    function.defvjp(run_forward, run_backward)
    return function


class _Rule:
    """The axes of a rule: copies, so that what is found leaves the originals alone."""

    def __init__(self, eqn: Any, trace: Trace, cut: Cut, node: Node):
        self.eqn, self.trace, self.whole, self.node = eqn, trace, cut, node
        self.copies = _Copies()
        self.ins = tuple(map(self.copies.of, node.ins))
        self.outs = tuple(map(self.copies.of, node.outs))

    def follow(self, function: Any, shapes: Any, dims: Sequence[Dims]) -> "_Followed":
        program = jax.make_jaxpr(function)(*shapes)
        walk = Walk(self.trace.rules)
        args = [Value(d, True, object()) for d in dims]
        outs = walk.run(program, args, (), None)
        inside = dataclasses.replace(
            self.trace,
            program=program,
            nodes=walk.nodes,
            constants=walk.constants,
            layers=walk.layers,
        )
        return _Followed(inside, tuple(v.dims for v in outs))

    def agree(self, found: Sequence[Dims], expected: Sequence[Dims]) -> None:
        """What has the axes of an operand or result by what it is."""
        try:
            for some, others in zip(found, expected, strict=True):
                for a, b in zip(some, others, strict=True):
                    algebra.unify(a, b)
        except algebra.Incompatible:
            self.fail()

    def cut(self, *programs: Trace) -> Cut:
        """The cut of the copies, which all programs of the rule have to allow."""
        found = self.copies.cut(self.whole)
        if found is None or any(self.copies.mixed(self.whole, t) for t in programs):
            return self.fail()
        return found

    def fail(self) -> NoReturn:
        raise NotImplementedError(
            f"The derivative of the function at {self.node_source()} has a rule of its "
            "own (jax.custom_jvp or jax.custom_vjp), in which the channels that were "
            "dropped could not be followed. Run the masked model, or narrow a model "
            "without that rule."
        )

    def node_source(self) -> str:
        return self.node.visit.source


@dataclasses.dataclass(frozen=True)
class _Followed:
    """A program of a rule, in the place of the model's, and the axes of its results."""

    trace: Trace
    outs: tuple[Dims, ...]


class _Copies:
    """Copies of axes."""

    def __init__(self):
        self.leaves: dict[algebra.Axis, algebra.Axis] = {}

    def of(self, dims: Dims) -> Dims:
        return tuple(map(self.one, dims))

    def one(self, axis: algebra.Axis) -> algebra.Axis:
        node = algebra.find(axis)
        if node.parts:
            parts = [self.one(part) for part in algebra.parts(node)]
            joined = algebra.concatenation if node.is_sum else algebra.product
            return joined(parts)
        if node not in self.leaves:
            self.leaves[node] = algebra.leaf(node.size)
        return self.leaves[node]

    def cut(self, cut: Cut) -> Cut | None:
        """The same cut of the copies; None where the rule does not allow it."""
        kept, copies, whole = {}, {}, set()
        for old, copy in self.leaves.items():
            node = algebra.find(copy)
            if old not in cut.kept:
                whole.update(algebra.leaves(node))
                continue
            stays = any(n.partition(":")[0] in _STAYS for n in node.notes)
            if node.parts or node in kept or stays:
                return None
            kept[node] = cut.kept[old]
            copies[node] = tuple(
                algebra.find(self.leaves[b]) if b in self.leaves else b
                for b in cut.copies[old]
            )
        return None if whole & kept.keys() else Cut(kept, copies)

    def mixed(self, cut: Cut, rule: Trace) -> bool:
        """Whether a rule mixes copies that keep different indices."""
        keeps_apart, made = covered(rule), _made(rule)
        for old, copy in self.leaves.items():
            kept, leaf = cut.kept.get(old), algebra.find(copy)
            if kept is None or (kept == kept[(0,) * (kept.ndim - 1)]).all():
                continue
            for b in cut.copies[old]:
                if b in self.leaves:
                    batch = algebra.find(self.leaves[b])
                    if batch not in keeps_apart.get(leaf, {batch}):
                        return True
                elif leaf in made:  # for any turn of the scan around it
                    return True
        return False


def _made(rule: Trace) -> set[algebra.Axis]:
    """The leaves of arrays that a program has of its own, or draws."""
    dims = [d for constants in rule.constants.values() for d in constants]
    for node in rule.nodes.values():
        if row_of(node.visit).draws or node.visit.primitive.name == "iota":
            dims.extend(node.outs)
    return {x for d in dims for axis in d for x in algebra.leaves(algebra.find(axis))}


def _differentiated(eqn: Any) -> list[bool]:
    """Which operands a rule is for: not what the function closes over."""
    constants = eqn.params.get("num_consts", 0)
    return [False] * constants + _moving(eqn.invars[constants:])


@jax.custom_jvp
def _constant(x: Any) -> Any:
    """What a function with a rule closes over: the rule has no derivative for it."""
    return x


@_constant.defjvp
def _(primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(
        "A function with a rule of its own (jax.custom_jvp or jax.custom_vjp) closes "
        f"over an array of shape {jnp.shape(primals[0])} that is differentiated. Its "
        "rule says nothing of it, here as in the model that was narrowed: make the "
        "array an argument."
    )


def _moving(variables: Sequence[Any]) -> list[bool]:
    """Which of them have tangents."""
    return [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in variables]


def _shapes(variables: Sequence[Any], moving: Sequence[bool] = ()) -> Any:
    of = lambda v: jax.ShapeDtypeStruct(
        v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type
    )
    shapes = [of(v) for v in variables]
    return (shapes, _some(shapes, moving)) if moving else shapes


def _some(values: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    return [x for x, one in zip(values, which, strict=True) if one]


def _put(whole: Sequence[Any], which: Sequence[bool], some: Sequence[Any]) -> list[Any]:
    """A list with others in some places."""
    rest = iter(some)
    return [next(rest) if one else x for x, one in zip(whole, which, strict=True)]
