"""One walk of a jaxpr: the axes of all values, and all that reads a parameter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse.primitives import UNKNOWN, Primitive, foreign, row_of, sides_of
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives.axes import Axis, leaf
from jaxsparse.primitives.dims import Dims, unify
from jaxsparse.program import (
    Address,
    Counter,
    called,
    carried_counters,
    counted,
    inner,
    interpret,
    number,
    scan_counts,
)
from jaxsparse.tracing._pieces import piece_of
from jaxsparse.tracing._products import Product, passes, product_of
from jaxsparse.tracing.changes import Past, change_of, past_of, together
from jaxsparse.tracing.values import Node, Origin, Site, Stop, Value, Visit

_LOOPS = frozenset({"scan", "while", "cond"})


class Walk:
    """The state of one walk: what it found so far.

    Attributes:
      seen, sites: the names of all primitives; contractions of parameters.
      stops: other ends of parameters.
      lookups: paths of parameters that are indexed (embeddings).
      nodes: the axes at every equation.
      constants: the axes of the constants of every jaxpr that has some.
      layers: the axis that each scan runs over.
    """

    def __init__(self, rules: Mapping[str, str]):
        self.stops: list[Stop] = []
        self.lookups: dict[str, list[str]] = {}
        self.nodes: dict[Address, Node] = {}
        self.constants: dict[Address, tuple[Dims, ...]] = {}
        self.layers: dict[Address, Axis] = {}
        self._foreign = {name: foreign(text) for name, text in rules.items()}
        self.seen = set[str]()
        self._known: dict[Any, int] = {}
        self._literals: dict[Any, tuple[int, Past, Counter | None]] = {}
        self._count = iter(range(1 << 62))
        self._around: tuple[Visit, ...] = ()  # what leads to where it is
        self._order: list[Site | Product] = []

    def run(
        self, jaxpr: Any, args: Sequence[Value], address: Address, times: int | None
    ) -> list[Value]:
        """Walks a closed jaxpr."""
        constants = [
            self.new(var.aval.shape, data=False, token=("const", id(const)))
            for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
        ]
        if constants:
            self.constants[address] = tuple(value.dims for value in constants)

        def meaning(eqn: Any, ins: list[Value], here: Address) -> list[Value]:
            parts = eqn.primitive, eqn.params, eqn.invars, eqn.outvars, eqn
            visit = Visit(*parts, self._around)
            outs = self._eqn(visit, ins, here, times)
            before, after = ([v.dims for v in values] for values in (ins, outs))
            self.nodes[here] = Node(tuple(before), tuple(after), visit)
            return outs

        return interpret(
            jaxpr, args, meaning, address, literal=self._literal, constants=constants
        )

    def whole(self, program: Any, args: Sequence[Value]) -> list[Value]:
        """Walks a whole program; then what became of its products is known."""
        results = self.run(program, args, (), 1)
        self._end(results)
        return results

    @property
    def sites(self) -> tuple[Site, ...]:
        """The contractions of parameters, in the order of the program."""
        found = (x.site if isinstance(x, Product) else x for x in self._order)
        return tuple(x for x in found if x is not None)

    @property
    def scaled(self) -> tuple[Stop, ...]:
        """Where a matrix only scales data."""
        products = (x for x in self._order if isinstance(x, Product))
        return tuple(
            Stop(x.origin.paths, "mul", x.eqn.source, False)
            for x in products
            if x.site is None and x.origin.is_matrix
        )

    def _literal(self, x: Any) -> Value:
        key = str(x.val), x.aval
        if key not in self._literals:
            past = Past(zero=not np.any(x.val))
            self._literals[key] = next(self._count), past, number(x.val)
        token, past, counter = self._literals[key]
        dims = tuple(leaf(n) for n in x.aval.shape)
        return Value(dims, False, token, None, past, counter)

    def new(self, shape: Sequence[int], *, data: bool, token: Any = None) -> Value:
        """A value of which nothing is known."""
        token = self._token(token) if token is not None else next(self._count)
        return Value(tuple(leaf(n) for n in shape), data, token)

    def _made(self, like: Value, data: bool, past: Past) -> Value:
        return Value(like.dims, data, next(self._count), None, past)

    def _token(self, key: Any) -> int:
        return self._known.setdefault(key, next(self._count))

    def _eqn(
        self, eqn: Any, ins: list[Value], address: Address, times: int | None
    ) -> list[Value]:
        name = eqn.primitive.name
        foreign, row = self._foreign_row(eqn), row_of(eqn)
        calls = called(eqn) is not None
        product = self._product(eqn, ins, address, times, calls or passes(eqn, row))
        if foreign is None and (name in _LOOPS or calls):
            before, self._around = self._around, (*self._around, eqn)
            outs = self._inner(eqn, ins, address, times)
            self._around = before
            return outs
        row = foreign or row
        dims = row.axes(eqn, [v.dims for v in ins])
        data = any(v.data for v in ins)
        origins: list[Origin | None] = [None] * len(dims)
        if not data:
            origins = self._origins(eqn, ins, row)
        elif product is None and any(v.origin for v in ins):
            self._meet(eqn, ins, address, times, row)
        token = self._value_number(eqn, ins)
        past = Past() if data else past_of(eqn, [v.past for v in ins])
        counter = None if data else counted(eqn, [v.counter for v in ins])
        return [
            Value(d, data, self._token((token, i)), origin, past, counter, product)
            for i, (d, origin) in enumerate(zip(dims, origins, strict=True))
        ]

    def _product(
        self,
        eqn: Any,
        ins: list[Value],
        address: Address,
        times: int | None,
        passed_on: bool,
    ) -> Product | None:
        """The product of data and a parameter that a result is, if it is one."""
        name = eqn.primitive.name
        if passed_on:
            return next((v.product for v in ins if v.product), None)
        if name == "reduce_sum" and ins[0].product is not None:
            ins[0].product.summed(eqn.params["axes"])
            return None
        self._end(ins)
        found = product_of(eqn, ins, address, times)
        if found is not None:
            self._order.append(found)
        return found

    @staticmethod
    def _end(values: Sequence[Value]) -> None:
        for value in values:
            if value.product is not None:
                value.product.ends = True

    def _inner(
        self, eqn: Any, ins: list[Value], address: Address, times: int | None
    ) -> list[Value]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, ins, address, times)
        if name == "while":
            return self._while(eqn, ins, address)
        if name == "cond":
            return self._cond(eqn, ins, address, times)
        return self.run(called(eqn), ins, (*address, 0), times)

    def _foreign_row(self, eqn: Any) -> Primitive | None:
        if not self._foreign:
            return None
        names = [eqn.primitive.name]
        for key in ("name", "target_name", "name_and_src_info"):
            found = getattr(eqn.params.get(key), "name", eqn.params.get(key))
            if isinstance(found, str):
                names.append(f"{names[0]}[{found}]")
        self.seen.update(names)
        found = (self._foreign[n] for n in reversed(names) if n in self._foreign)
        return next(found, None)

    def _value_number(self, eqn: Any, ins: list[Value]) -> int:
        try:
            params = tuple(sorted(eqn.params.items()))
            if eqn.eqn.effects:
                return next(self._count)
            return self._token((
                eqn.primitive.name,
                params,
                tuple(v.token for v in ins),
            ))
        except TypeError:  # unhashable parameters
            return next(self._count)

    def _origins(
        self, eqn: Any, ins: list[Value], row: Primitive
    ) -> list[Origin | None]:
        name, none = eqn.primitive.name, [None] * len(eqn.outvars)
        found = [v.origin for v in ins if v.origin]
        if not found:
            return list(none)
        piece = piece_of(eqn, ins)
        if piece is not None:
            return [piece]
        if not row.keeps_entries and not row.entrywise:
            paths = tuple(path for o in found for path in o.paths)
            if name == "gather" and ins[0].origin:
                self._look_up(ins[0].origin, eqn)
            else:
                product = row.contraction(eqn) is not None
                self.stops.append(Stop(paths, name, eqn.source, False, product))
            return list(none)
        shape = lambda atom: atom.aval.shape
        before = [
            v.origin.dims if v.origin else tuple(leaf(n) for n in shape(x))
            for v, x in zip(ins, eqn.invars, strict=True)
        ]
        after = row.axes(eqn, before)
        via = frozenset().union(*(o.via for o in found))
        partial = name == "dynamic_slice" and any(
            a.size != b.size for a, b in zip(before[0], after[0], strict=True)
        )
        if not row.keeps_entries or partial:
            via |= {name}
        changes = tuple(x for o in found for x in o.changes)
        if not row.keeps_entries:
            changes += change_of(eqn, [(v.past, v.origin is not None) for v in ins])
        ones = [d for dims in before for d in dims if d.size == 1]
        loops = tuple(dict.fromkeys(x for o in found for x in o.loops))
        results: list[Origin | None] = []
        for i, dims in enumerate(after):
            left = {algebra.find(d) for d in dims}
            dropped = (*(d for o in found for d in o.dropped), *ones)
            if name == "unstack":
                dropped += (algebra.leaves(before[0][eqn.params["axis"]])[i],)
            dropped = tuple(d for d in dropped if algebra.find(d) not in left)
            found_in = {path: dims for o in found for path, dims in o.sources}
            sources = tuple(found_in.items())
            results.append(Origin(sources, dims, dropped, via, loops, changes))
        return results

    def _look_up(self, origin: Origin, eqn: Any) -> None:
        for path in origin.paths:
            self.lookups.setdefault(path, []).append(eqn.source)

    def _meet(
        self,
        eqn: Any,
        ins: list[Value],
        address: Address,
        times: int | None,
        row: Primitive,
    ) -> None:
        """Parameters meet data: a contraction, a look-up, or the end of their trail."""
        name = eqn.primitive.name
        for at, value in enumerate(ins):
            if value.origin is None:
                continue
            paths = value.origin.paths
            if name == "gather" and at == 0:
                self._look_up(value.origin, eqn)
                continue
            sides = sides_of(row, eqn, at, [v.data for v in ins])
            if sides is None or not ins[sides[0]].data:
                # What is added, or a vector that scales, is no kernel: no one asks.
                asked = value.origin.is_matrix and name not in _ADDS
                unknown = row is UNKNOWN
                if asked or unknown:
                    self.stops.append(Stop(paths, name, eqn.source, unknown))
                continue
            other, contracted, batch, of_input = sides
            product = row.contraction(eqn)
            settings = {k: v for k, v in eqn.params.items() if k not in _NOT_SETTINGS}
            reads = (ins[other].token, name, other, str(settings))
            shape = eqn.invars[at].aval.shape
            flops = 2 * math.prod(eqn.outvars[0].aval.shape)
            flops *= math.prod(shape[a] for a in contracted)
            self._order.append(
                Site(
                    address,
                    name,
                    at,
                    other,
                    value.origin,
                    contracted,
                    batch,
                    of_input,
                    ins[other].dims,
                    product.groups if product else 1,
                    product.samples if product else None,
                    reads,
                    times,
                    flops * (times or 1),
                    eqn.source,
                )
            )

    def _scan(
        self, eqn: Any, ins: list[Value], address: Address, times: int | None
    ) -> list[Value]:
        first, carried = scan_counts(eqn)
        last = first + carried
        layer = self.layers[address] = leaf(eqn.params["length"], "layer")
        data = any(v.data for v in ins)
        inside = list(ins[:first])
        past = together(v.past for v in ins)
        counters = carried_counters(eqn, [v.counter for v in ins[first:last]], address)
        for v, counter in zip(ins[first:last], counters, strict=True):
            known = self._made(v, False, Past())._replace(counter=counter)
            inside.append(self._made(v, data, past) if counter is None else known)
        for v in ins[last:]:
            unify(v.dims[0], layer, eqn)
            origin = v.origin
            if origin is not None:
                loops = (*origin.loops, (address, origin.dims[0]))
                origin = origin._replace(dims=origin.dims[1:], loops=loops)
            inside.append(Value(v.dims[1:], v.data, next(self._count), origin, v.past))
        many = None if times is None else times * layer.size
        outs = self.run(inner(eqn)[0], inside, (*address, 0), many)
        self._end(outs)
        for a, b in zip(ins[first:last], outs[:carried], strict=True):
            _same(a.dims, b.dims, eqn)
        stacks = [v._replace(dims=(layer, *v.dims)) for v in outs[carried:]]
        results = [self._made(v, data, past) for v in outs[:carried]]
        return results + [self._made(v, v.data, past) for v in stacks]

    def _while(self, eqn: Any, ins: list[Value], address: Address) -> list[Value]:
        p = eqn.params
        tests, bodies = p["cond_nconsts"], p["body_nconsts"]
        data = any(v.data for v in ins)
        past = together(v.past for v in ins)
        carry = [self._made(v, data, past) for v in ins[tests + bodies :]]
        test, body = inner(eqn)
        self.run(test, [*ins[:tests], *carry], (*address, 0), None)
        arguments = [*ins[tests : tests + bodies], *carry]
        outs = self.run(body, arguments, (*address, 1), None)
        self._end(outs)
        for a, b in zip(carry, outs, strict=True):
            _same(a.dims, b.dims, eqn)
        return [self._made(v, data, past) for v in outs]

    def _cond(
        self, eqn: Any, ins: list[Value], address: Address, times: int | None
    ) -> list[Value]:
        results: list[Value] = []
        for i, branch in enumerate(inner(eqn)):
            outs = self.run(branch, ins[1:], (*address, i), times)
            self._end(outs)
            for a, b in zip(results, outs, strict=False):
                _same(a.dims, b.dims, eqn)
            results = results or outs
        data = any(v.data for v in ins)
        past = together(v.past for v in ins)
        return [self._made(v, data or v.data, past) for v in results]


_ADDS = {"add", "add_any", "sub"}
_NOT_SETTINGS = {"preferred_element_type", "out_sharding", "precision"}


def _same(a: Dims, b: Dims, eqn: Any) -> None:
    for x, y in zip(a, b, strict=True):
        unify(x, y, eqn)
