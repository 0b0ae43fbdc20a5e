"""Where a masked channel does not simply vanish: what is not invariant to zeros.

A channel whose parameters are all zero can be cut out without changing a result if
wherever its values are summed with others' they are zero, or multiplied by zeros. A
second walk follows for each value along which axes masked entries are zero. Softmax,
maxima and variances of centred values are where it fails.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from jaxsparse.tracing import Trace
from jaxsparse.tracing import _axes as algebra
from jaxsparse.tracing._jaxprs import Address, called, closed, inner, scan_counts
from jaxsparse.tracing._rules import REDUCTIONS
from jaxsparse.tracing._unify import Dims


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# f(0) = 0, or the entries only move.
_KEEP_ZERO = _names(
    """
    abs asin asinh atan atanh broadcast_in_dim cbrt ceil conj convert_element_type copy
    copy_p cumsum dynamic_slice erf erf_inv expm1 floor gather imag integer_pow log1p
    name neg optimization_barrier pad pcast population_count pvary real
    reduce_precision reduce_window reduce_window_max reduce_window_min
    reduce_window_sum reshape rev round sharding_constraint sign sin sinh slice split
    sqrt square squeeze stop_gradient tan tanh tile transpose unstack
    """
)
_FIRST = _names("div rem gather dynamic_slice pad cumsum reduce_window")
_ANY = _names("mul and")
_ALL = _names(
    """
    add add_any sub or xor max min select_n complex nextafter concatenate stack scatter
    scatter-add scatter_add dynamic_update_slice clamp
    """
)
_SAME = _names("copy copy_p name optimization_barrier sharding_constraint pvary pcast")
_SUMS = _names("reduce_sum")
_ORDERS = _names("sort top_k approx_top_k cumsum cumprod cummax cummin cumlogsumexp")

Leaf = int  # the identity of a leaf


class Effect(NamedTuple):
    """What masking the indices of each axis does to a value.

    Attributes:
      zero: the leaves along which masked entries are zero.
      token: the value's identity.
      same: for a scan's own axis, the value that this one equals in a masked turn.
      constant: the one number of which all entries are; None where they differ.
    """

    zero: frozenset[Leaf]
    token: object
    same: Mapping[Leaf, object]
    constant: float | None = None

    def vanishes(self, leaf: Leaf) -> bool:
        """Whether its entries are zero where the leaf's index is masked."""
        return self.constant == 0 or leaf in self.zero


def violations(trace: Trace) -> dict[Leaf, Any]:
    """The axes whose masked indices still act, each with the first place where.

    Args:
      trace: a trace.

    Returns:
      By the identity of the leaf the equation's visit.
    """
    walk = _Zeros(trace)
    args = []
    for var, path in zip(trace.program.jaxpr.invars, trace.paths, strict=False):
        zero = frozenset().union(*map(walk.ids, trace.dims[path]))
        args.append(Effect(zero, var, {}))
    for var in trace.program.jaxpr.invars[len(trace.paths) :]:
        args.append(Effect(frozenset(), var, {}))
    walk.run(trace.program, args, ())
    return walk.found


class _Zeros:
    """One walk."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.found: dict[Leaf, Any] = {}
        self.silent = 0
        self.layers: frozenset[Leaf] = frozenset()
        self._ids: dict[int, frozenset[Leaf]] = {}

    def ids(self, axis: algebra.Axis) -> frozenset[Leaf]:
        """The leaves of an axis."""
        node = algebra.find(axis)
        if id(node) not in self._ids:
            self._ids[id(node)] = frozenset(
                id(x) for x in algebra.leaves(node) if x.size > 1
            )
        return self._ids[id(node)]

    def within(self, dims: Dims) -> frozenset[Leaf]:
        return self.layers.union(*map(self.ids, dims))

    def blame(self, leaves: frozenset[Leaf], address: Address) -> None:
        if not self.silent:
            for leaf in leaves:
                self.found.setdefault(leaf, self.trace.nodes[address].visit)

    def run(
        self, program: Any, args: Sequence[Effect], address: Address
    ) -> list[Effect]:
        env: dict[Any, Effect] = dict(zip(program.jaxpr.invars, args, strict=True))
        for var in program.jaxpr.constvars:
            env[var] = Effect(frozenset(), object(), {})

        def read(atom: Any) -> Effect:
            if isinstance(atom, core.Literal):
                return Effect(frozenset(), object(), {}, _number(atom.val))
            return env[atom]

        for index, eqn in enumerate(program.jaxpr.eqns):
            outs = self.eqn(eqn, [read(x) for x in eqn.invars], (*address, index))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(x) for x in program.jaxpr.outvars]

    def eqn(self, eqn: Any, ins: list[Effect], address: Address) -> list[Effect]:
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, ins, address)
        if name == "while":
            return self.loop(eqn, ins, address)
        if name == "cond":
            branches = [
                self.run(branch, ins[1:], (*address, i))
                for i, branch in enumerate(inner(eqn))
            ]
            return [_either(effects) for effects in zip(*branches, strict=True)]
        if called(eqn) is not None:
            return self.run(called(eqn), ins, (*address, 0))
        if name in _SAME:
            return list(ins[: len(eqn.outvars)])
        node = self.trace.nodes[address]
        self.reductions(eqn, ins, node.ins, address)
        return [
            Effect(
                self.zero(eqn, ins, node.ins, dims),
                object(),
                self.unchanged(name, ins),
                ins[0].constant
                if name in {"broadcast_in_dim", "convert_element_type", "reshape"}
                else None,
            )
            for dims in node.outs
        ]

    def zero(
        self, eqn: Any, ins: list[Effect], before: Sequence[Dims], after: Dims
    ) -> frozenset[Leaf]:
        name, here = eqn.primitive.name, self.within(after)
        kept = lambda test: frozenset(x for x in here if test(x))
        if name in {"max", "min", "clamp"}:
            ins = [e for e in ins if not _beyond(name, ins, e)] or ins
        if name in {"dot_general", "conv_general_dilated"}:
            return kept(self.contraction(eqn, ins, before))
        if name in _ANY:
            # An axis may occur twice: what is zero along one of both is not enough.
            times = lambda x, dims: sum(x in self.ids(d) for d in dims)
            return kept(
                lambda x: any(
                    e.vanishes(x) and times(x, d) >= times(x, after)
                    for e, d in zip(ins, before, strict=True)
                )
            )
        if name == "pad" and ins[1].constant == 0:
            own = self.within(before[0])
            return kept(lambda x: x not in own or ins[0].vanishes(x))
        if name in {"concatenate", "stack", "pad"}:
            at = eqn.params.get("dimension", eqn.params.get("axis"))
            own = [(e, self.within(d) if at is not None else here) for e, d in
                   zip(ins, before, strict=True)]  # fmt: skip
            return kept(
                lambda x: all(e.vanishes(x) for e, leaves in own if x in leaves)
            )
        if name == "select_n":
            return kept(lambda x: all(e.vanishes(x) for e in ins[1:]))
        if name in {"scatter", "scatter-add", "scatter_add"}:
            return kept(lambda x: ins[0].vanishes(x) and ins[2].vanishes(x))
        if name == "dynamic_update_slice":
            return kept(lambda x: ins[0].vanishes(x) and ins[1].vanishes(x))
        if name in _ALL:
            return kept(lambda x: all(e.vanishes(x) for e in ins))
        if name == "integer_pow" and eqn.params["y"] <= 0:
            return frozenset()
        if name in _KEEP_ZERO or name in _FIRST or name in _SUMS:
            return kept(ins[0].vanishes) if ins else frozenset()
        return frozenset()

    def contraction(
        self, eqn: Any, ins: list[Effect], before: Sequence[Dims]
    ) -> Callable[[Leaf], bool]:
        """Which of a product's results are zero, by the operand that has the axis."""
        p, (left, right) = eqn.params, before
        own = lambda dims, axes: frozenset().union(*(self.ids(dims[a]) for a in axes))
        if eqn.primitive.name == "dot_general":
            (lc, rc), (lb, rb) = p["dimension_numbers"]
            free = lambda dims, gone: own(dims, set(range(len(dims))) - {*gone})
            a, b = free(left, (*lc, *lb)), free(right, (*rc, *rb))
        else:
            numbers = p["dimension_numbers"]
            a = own(left, [numbers.lhs_spec[0]])
            b = own(right, [numbers.rhs_spec[0]])
            if p["feature_group_count"] > 1:
                b -= own(left, [numbers.lhs_spec[1]])  # groups are of both
        of_one = lambda x: (
            (x not in a or ins[0].vanishes(x)) and (x not in b or ins[1].vanishes(x))
        )
        return lambda x: of_one(x) and any(e.vanishes(x) for e in ins)

    def unchanged(self, name: str, ins: list[Effect]) -> dict[Leaf, object]:
        if name not in {"add", "add_any", "sub"} or not self.layers:
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
        self, eqn: Any, ins: list[Effect], before: Sequence[Dims], address: Address
    ) -> None:
        name, p = eqn.primitive.name, eqn.params
        gone = lambda dims, axes: frozenset().union(*(self.ids(dims[a]) for a in axes))
        if name == "dot_general":
            leaves = gone(before[0], p["dimension_numbers"][0][0])
        elif name == "conv_general_dilated":
            leaves = self.ids(before[1][p["dimension_numbers"].rhs_spec[1]])
        elif name in {"ragged_dot", "ragged_dot_general"}:
            leaves = self.ids(before[0][-1])
        elif name in REDUCTIONS:
            leaves = gone(before[0], p["axes"] if "axes" in p else p["dimensions"])
            if name not in _SUMS:
                return self.blame(leaves, address)
        elif name in _ORDERS:
            at = p.get("axis", p.get("dimension", -1))
            return self.blame(gone(before[0], [at]), address)
        else:
            return None
        acting = (x for x in leaves if not any(e.vanishes(x) for e in ins[:2]))
        return self.blame(frozenset(acting), address)

    def scan(self, eqn: Any, ins: list[Effect], address: Address) -> list[Effect]:
        first, carried = scan_counts(eqn)
        last = first + carried
        body, layer = inner(eqn)[0], self.ids(self.trace.layers[address])
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
        fresh = lambda e: Effect(e.zero, object(), {}, e.constant)
        carry = [fresh(e) for e in start]
        while True:
            self.silent += 1
            outs = turn(carry)[: len(carry)]
            self.silent -= 1
            both = [_either(pair) for pair in zip(carry, outs, strict=True)]
            if all(
                a.zero == b.zero and a.constant == b.constant
                for a, b in zip(both, carry, strict=True)
            ):
                return carry, turn(carry)
            carry = [fresh(e) for e in both]


def _either(effects: Sequence[Effect]) -> Effect:
    """What holds whichever of some values it is."""
    constants = {e.constant for e in effects}
    constant = constants.pop() if len(constants) == 1 else None
    every = frozenset().union(*(e.zero for e in effects))
    zero = frozenset(x for x in every if all(e.vanishes(x) for e in effects))
    return Effect(zero, object(), {}, constant)


def _beyond(name: str, ins: Sequence[Effect], one: Effect) -> bool:
    """Whether an operand is a bound that zero lies within: max(x, -1), min(x, 6)."""
    if one.constant is None:
        return False
    if name == "clamp":
        return one is not ins[1] and (
            one.constant <= 0 if one is ins[0] else one.constant >= 0
        )
    return one.constant <= 0 if name == "max" else one.constant >= 0


def _number(value: Any) -> float | None:
    try:
        return float(np.asarray(value))
    except (TypeError, ValueError):
        return None
