"""Where a masked channel does not simply vanish: what is not invariant to zeros.

A channel whose parameters are all zero can be cut out without changing a result if
wherever its values are summed with others' they are zero, or multiplied by zeros. A
second walk follows for each value along which axes masked entries are zero, and along
which they are at least all the same, so that a sum can be told what it lacks. Softmax
and maxima are where it fails.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsparse.coupling._finite import (
    Around,
    Cell,
    Finite,
    after_rule,
    cells,
    either,
    finite,
    same,
)
from jaxsparse.coupling._points import Numbers, number
from jaxsparse.coupling._zero_rules import Effect, Leaf, Leaves, vanishing
from jaxsparse.coupling.uniform import (
    INLINED,
    Operand,
    Uniform,
    places,
    supported,
    uniform,
)
from jaxsparse.primitives import Contraction, Primitive, row_of
from jaxsparse.primitives.axes import Axis
from jaxsparse.primitives.dims import Dims
from jaxsparse.program import Address, called, closed, inner, interpret, scan_counts
from jaxsparse.tracing import Trace


class Masked(NamedTuple):
    """What masked indices of a model do.

    Attributes:
      acting: by axis, where masked indices of it still act: the
        first visit.
      uniform: the equations whose results are uniform where they are masked.
      lost: by axis, where masked indices of it make a number that is
        not finite and that reaches a result.
      steep: likewise where they make a derivative that is not.
    """

    acting: dict[Leaf, Any]
    uniform: dict[Address, Uniform]
    lost: Mapping[Leaf, Any] = {}
    steep: Mapping[Leaf, Any] = {}


def masked_in(trace: Trace) -> Masked:
    """What masked indices of a trace do."""
    walk = _Zeros(trace)
    args = []
    zeros = [walk.leaves.of_all(trace.dims[path]) for path in trace.paths]
    for i, var in enumerate(trace.program.jaxpr.invars):
        zero = zeros[i] if i < len(zeros) else frozenset()
        moves = walk.numbers.inexact(var.aval.dtype)
        args.append(Effect(zero, var, {}, finite=Finite((), moves, zero)))
    outs = walk.run(trace.program, args, ())
    lost = {x: visit for e in outs for x, visit in e.finite.lost().items()}
    steep = {x: visit for e in outs for x, visit in e.finite.steep.items()}
    return Masked(walk.found, walk.uniform, lost, steep)


class _Zeros:
    """One walk."""

    def __init__(self, trace: Trace):
        self.trace, self.leaves, self.numbers = trace, Leaves(), Numbers()
        self.found: dict[Leaf, Any] = {}
        self.uniform: dict[Address, Uniform] = {}
        self.silent = 0
        self.ruled = 0  # within functions with derivatives of their own
        self.layers: frozenset[Leaf] = frozenset()

    def blame(self, leaves: frozenset[Leaf], address: Address) -> None:
        if not self.silent:
            for leaf in leaves:
                self.found.setdefault(leaf, self.trace.nodes[address].visit)

    def run(
        self, program: Any, args: Sequence[Effect], address: Address
    ) -> list[Effect]:
        unknown = lambda number=None: Effect(frozenset(), object(), {}, number)
        return interpret(
            program,
            args,
            self.eqn,
            address,
            literal=lambda x: unknown(number(x.val)),
            constants=[unknown() for _ in program.consts],
        )

    def eqn(self, eqn: Any, ins: list[Effect], address: Address) -> list[Effect]:
        if inner(eqn):
            return self.entered(eqn, ins, address)
        row = row_of(eqn)
        if row.same:
            return [_lone(e) for e in ins[: len(eqn.outvars)]]
        node, product = self.trace.nodes[address], row.contraction(eqn)
        self.reductions(eqn, row, product, ins, node.ins, address)
        zeros = [
            vanishing(eqn, row, ins, node.ins, dims, self.leaves, self.layers)
            for dims in node.outs
        ]
        same = self.same(eqn, ins, address, zeros[0]) if zeros else frozenset()
        known = self.finite(eqn, row, product, ins, node, zeros)
        constant = self.constant(eqn, row, ins)
        unchanged = self.unchanged(eqn.primitive.name, ins) if self.layers else {}
        return [
            Effect(zero, object(), unchanged, constant, same, finite_)
            for zero, finite_ in zip(zeros, known, strict=True)
        ]

    def here(self, dims: Sequence[Axis]) -> frozenset[Leaf]:
        """The leaves of axes and of the scans around."""
        found = self.leaves.of_all(dims)
        return found | self.layers if self.layers else found

    def finite(
        self,
        eqn: Any,
        row: Primitive,
        product: Contraction | None,
        ins: list[Effect],
        node: Any,
        zeros: Sequence[frozenset[Leaf]],
    ) -> list[Finite]:
        """What results' masked entries are, if not zero, and their derivatives."""
        special, every = _special(ins), [e.finite for e in ins]
        if not special and not any(x.moves for x in every):
            return [Finite() for _ in zeros]
        of = list(map(self.here, node.ins))
        if product is not None:  # without what it adds up
            for at, dims in enumerate(node.ins[:2]):
                of[at] = self.here([dims[a] for a in product.kept(at)])
        known = eqn, row, node.visit, self.numbers, product is not None
        found = []
        for zero, dims in zip(zeros, node.outs, strict=True):
            here, twice = self.here(dims), self.leaves.twice(dims)
            around = Around(*known, here, of, twice, self.ruled > 0)
            found.append(finite(every, special, zero, around))
        return found

    def constant(self, eqn: Any, row: Primitive, ins: Sequence[Effect]) -> float | None:
        """The one number of which all entries of a result are."""
        if eqn.primitive.name in {"broadcast_in_dim", "reshape"}:
            return ins[0].constant
        if not ins or not row.entrywise or any(e.constant is None for e in ins):
            return None
        return self.numbers.value(eqn, [e.constant for e in ins])

    def entered(self, eqn: Any, ins: list[Effect], address: Address) -> list[Effect]:
        """An equation with programs of its own."""
        name = eqn.primitive.name
        if name in INLINED:
            return self.run(called(eqn), ins, (*address, 0))
        ins = [_lone(e) for e in ins]
        if name == "scan":
            outs = self.scan(eqn, ins, address)
        elif name == "while":
            outs = self.loop(eqn, ins, address)
        elif name == "cond":
            branches = [
                self.run(branch, ins[1:], (*address, i))
                for i, branch in enumerate(inner(eqn))
            ]
            outs = [_either(effects) for effects in zip(*branches, strict=True)]
        else:
            # The program of a rule for derivatives sums over what it likes.
            self.ruled += name.startswith("custom_")
            outs = self.run(called(eqn), ins, (*address, 0))
            self.ruled -= name.startswith("custom_")
            if name.startswith("custom_") and not self.ruled:
                outs = self.ruled_by(eqn, outs, ins, address)
        return [_lone(e) for e in outs]

    def ruled_by(
        self, eqn: Any, outs: list[Effect], ins: list[Effect], address: Address
    ) -> list[Effect]:
        """What a rule says of derivatives, in the place of the function's program."""
        before, after = ([e.finite for e in some] for some in (ins, outs))
        visit = self.trace.nodes[address].visit
        around = Around(eqn, row_of(eqn), visit, self.numbers)
        found = after_rule(after, before, _special(ins), around)
        return [e._replace(finite=x) for e, x in zip(outs, found, strict=True)]

    def same(
        self, eqn: Any, ins: list[Effect], address: Address, zero: frozenset[Leaf]
    ) -> frozenset[int]:
        """The axes of a result along which masked entries are all the same."""
        if not supported(eqn) or self.ruled:
            return frozenset()
        node = self.trace.nodes[address]
        after = node.outs[0]
        of = self.leaves.of
        acts = [at for at, d in enumerate(after) if d.size > 1 and not of(d) <= zero]
        found = uniform(self.operands(eqn, ins, node.ins, after), frozenset(acts))
        if found.axes:
            self.uniform[address] = found
        else:
            self.uniform.pop(address, None)
        return found.axes

    def operands(
        self, eqn: Any, ins: list[Effect], before: Sequence[Dims], after: Dims
    ) -> Iterator[Operand]:
        """Along which axes of a result the masked entries of operands are alike."""
        for at, (e, dims) in enumerate(zip(ins, before, strict=True)):
            to = places(eqn, at, dims, after)
            of, all_zero = self.leaves.of, e.constant == 0
            none = [j for i, j in to.items() if all_zero or of(dims[i]) <= e.zero]
            alike = [to[i] for i in e.uniform if i in to]
            yield Operand(frozenset(to.values()), frozenset(none), frozenset(alike))

    def unchanged(self, name: str, ins: list[Effect]) -> dict[Leaf, object]:
        if name not in {"add", "add_any", "sub"}:
            return {}
        a, b = ins
        found = {}
        for layer in self.layers:
            if b.vanishes(layer):
                found[layer] = a.same.get(layer, a.token)
            elif a.vanishes(layer) and name != "sub":
                found[layer] = b.same.get(layer, b.token)
        return found

    def reductions(
        self,
        eqn: Any,
        row: Primitive,
        product: Contraction | None,
        ins: list[Effect],
        before: Sequence[Dims],
        address: Address,
    ) -> None:
        """Says which masked indices still act in what is added up or compared."""
        gone = lambda at, axes: self.leaves.of_all([before[at][a] for a in axes])
        if product is not None:
            leaves = gone(1, product.summed[1])
        elif row.ordered is not None:
            return self.blame(gone(0, [row.ordered(eqn)]), address)
        elif row.reduced is None:
            return None
        elif eqn.primitive.name == "reduce_sum":  # it is told what it lacks
            leaves = gone(0, {*row.reduced(eqn)} - ins[0].uniform)
        else:
            return self.blame(gone(0, row.reduced(eqn)), address)
        if any(e.constant == 0 for e in ins[:2]):
            return None
        return self.blame(leaves.difference(*(e.zero for e in ins[:2])), address)

    def scan(self, eqn: Any, ins: list[Effect], address: Address) -> list[Effect]:
        first, carried = scan_counts(eqn)
        last = first + carried
        body, layer = inner(eqn)[0], self.leaves.of(self.trace.layers[address])
        outer, self.layers = self.layers, self.layers | layer
        xs = [e._replace(token=object(), same={}) for e in ins[last:]]
        turn = lambda carry: self.run(body, [*ins[:first], *carry, *xs], (*address, 0))
        # In the first turn a carry has its own masked zeros, in the next its body's.
        carry, outs = self.settle(turn, ins[first:last])
        for before, after in zip(carry, outs, strict=False):
            for leaf in layer:
                if after.same.get(leaf, after.token) is not before.token:
                    self.blame(frozenset([leaf]), address)
        self.layers = outer
        gone = lambda e: e.finite._replace(closed=e.finite.closed - layer)
        carried_out = [e._replace(finite=gone(e)) for e in outs[:carried]]
        outs = [*carried_out, *outs[carried:]]
        return [e._replace(token=object(), same={}, constant=None) for e in outs]

    def loop(self, eqn: Any, ins: list[Effect], address: Address) -> list[Effect]:
        p = eqn.params
        tests, bodies = p["cond_nconsts"], p["body_nconsts"]
        test, body = (closed(x) for x in inner(eqn))
        constants = ins[tests : tests + bodies]
        turn = lambda carry: self.run(body, [*constants, *carry], (*address, 1))
        carry, outs = self.settle(turn, ins[tests + bodies :])
        self.run(test, [*ins[:tests], *carry], (*address, 0))
        return [e._replace(token=object(), same={}, constant=None) for e in outs]

    def settle(
        self, turn: Callable[[list[Effect]], list[Effect]], start: Sequence[Effect]
    ) -> tuple[list[Effect], list[Effect]]:
        """Runs a body until what is known of its carries no longer shrinks."""
        fresh = lambda e: Effect(e.zero, object(), {}, e.constant, finite=e.finite)
        carry = [fresh(e) for e in start]
        while True:
            self.silent += 1
            outs = turn(carry)[: len(carry)]
            self.silent -= 1
            both = [_either(pair) for pair in zip(carry, outs, strict=True)]
            if all(
                (a.zero, str(a.constant)) == (b.zero, str(b.constant))  # NaN != NaN
                and same(a.finite, b.finite)
                for a, b in zip(both, carry, strict=True)
            ):
                return carry, turn(carry)
            carry = [fresh(e) for e in both]


def _lone(effect: Effect) -> Effect:
    """What is known of a value where its masked entries are not computed any more."""
    return effect._replace(uniform=frozenset()) if effect.uniform else effect


def _either(effects: Sequence[Effect]) -> Effect:
    """What holds whichever of some values it is."""
    constants = {str(e.constant): e.constant for e in effects}
    constant = effects[0].constant if len(constants) == 1 else None
    every = frozenset().union(*(e.zero for e in effects))
    zero = every.intersection(*(e.zero for e in effects if e.constant != 0))
    known = either([e.finite for e in effects], [e.entries for e in effects])
    return Effect(zero, object(), {}, constant, finite=known)


def _special(ins: Sequence[Effect]) -> list[Cell]:
    """The leaves of which something is known in some operand."""
    some = [e.zero for e in ins]
    some += [leaves for e in ins for _, leaves in e.finite.points]
    every = frozenset().union(*some)
    return cells(every, [e.entries for e in ins]) if every else []
