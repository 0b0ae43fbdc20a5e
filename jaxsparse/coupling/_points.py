"""What a program of one entry gives at known numbers: is it finite there?

A masked entry is mostly exactly zero, and what follows from it alone is a number too:
`exp(0) - 1`, the predicate of a `jnp.where`. Others are unknown; they are finite, and
nothing in particular. So 0 / 0 and log 0 are found without a model's weights. Values
are computed here; derivatives are programs that JAX gives.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.primitives import row_of
from jaxsparse.program import bind, called, interpret

Number = float | None
"""A known number, infinities and NaN among them; None if it is something finite."""

# What unknown operands are given: what comes out of all of these alike is known.
_SAMPLES = ((0.6, 1.7, 0.9), (-1.3, 0.4, -2.2), (2.1, -0.7, 1.2))
_UNORDERED = frozenset({"lt", "le", "gt", "ge", "lt_to", "le_to", "max", "min"})


def is_bad(x: Number) -> bool:
    """Whether it is known not to be finite."""
    return x is not None and not math.isfinite(x)


class Numbers:
    """What equations give at numbers, each looked up once in a walk."""

    def __init__(self):
        self._values: dict[Any, Number] = {}
        self._steep: dict[Any, bool] = {}
        self._inexact: dict[Any, bool] = {}

    def value(self, eqn: Any, at: Sequence[Number]) -> Number:
        """See `value_at`."""
        if all(x is None for x in at):
            return None
        return _once(self._values, _key(eqn, at), lambda: value_at(eqn, at))

    def steep(self, eqn: Any, at: Sequence[Number], which: tuple[int, ...]) -> bool:
        """See `steep_at`."""
        key = which, *_key(eqn, at)
        return _once(self._steep, key, lambda: steep_at(eqn, at, which))

    def inexact(self, dtype: Any) -> bool:
        """Whether there are derivatives of a type."""
        if dtype not in self._inexact:
            self._inexact[dtype] = jnp.issubdtype(dtype, jnp.inexact)
        return self._inexact[dtype]


def _key(eqn: Any, at: Sequence[Number]) -> tuple[Any, ...]:
    """Equal for equations that give the same at the same numbers."""
    types = [v.aval.dtype for v in (*eqn.invars, eqn.outvars[0])]
    # As a text, since 0.0 equals -0.0, and NaN does not equal itself.
    return eqn.primitive, *eqn.params.items(), *types, repr(at)


def _once(known: dict[Any, Any], key: Any, find: Callable[[], Any]) -> Any:
    """What was found, or is; parameters that have no hash cannot be looked up."""
    try:
        missing = key not in known
    except TypeError:
        return find()
    if missing:
        known[key] = find()
    return known[key]


def value_at(eqn: Any, at: Sequence[Number]) -> Number:
    """What an equation gives, entry by entry, at known and unknown numbers."""
    name = eqn.primitive.name
    if all(x is None for x in at):
        return None
    if name == "select_n":
        return _selected(at)
    if name in {"convert_element_type", "reduce_precision"}:
        return _rounded(at[0], eqn)
    if any(x is None for x in at):
        if name in {"eq", "ne"}:
            return float(name == "ne")
        if name in {"and", "or", "not", "xor"}:
            return 0.0 if name == "and" and 0 in at else None
        if name in _UNORDERED | {"clamp"}:  # an unknown one is of any size
            return (
                math.nan if any(x is not None and math.isnan(x) for x in at) else None
            )
    found = [_one(eqn, x) for x in _sampled(at)]
    if any(x is None for x in found):
        return None
    if all(is_bad(x) for x in found):
        return found[0] if len({*map(str, found)}) == 1 else math.nan
    return found[0] if len({*found}) == 1 else None


def steep_at(eqn: Any, at: Sequence[Number], which: tuple[int, ...]) -> bool:
    """Whether the derivative is not finite there."""
    if eqn.primitive.name == "integer_pow" and eqn.params["y"] > 0:
        return False
    if called(eqn) is not None:
        # A rule is not for what its function closes over.
        which = tuple(i for i in which if i >= eqn.params.get("num_consts", 0))
        if not which or _gentle(called(eqn)):
            return False
        program = _slope(eqn, [v.aval for v in eqn.invars], which)
    else:
        types = tuple(np.dtype(v.aval.dtype) for v in eqn.invars)
        text = str(sorted(eqn.params.items(), key=lambda x: x[0]))
        program = _slope_of_entries(
            _Named(eqn, (str(eqn.primitive), text)), types, which
        )
    return program is not None and any(map(is_bad, run(program, at)))


def run(program: Any, at: Sequence[Number]) -> list[Number]:
    """The numbers that a program gives, one for each result."""
    missing = len(program.jaxpr.invars) - len(at)
    return interpret(
        program,
        [*at, *[None] * missing][: len(program.jaxpr.invars)],
        _numbers,
        literal=lambda x: number(x.val),
        constants=[number(x) for x in program.consts],
    )


def _numbers(eqn: Any, values: list[Number], _: Any) -> list[Number]:
    """The numbers that an equation gives."""
    row, count = row_of(eqn), len(eqn.outvars)
    if called(eqn) is not None:
        return run(called(eqn), values)
    if row.entrywise:
        found = [value_at(eqn, values)]
    elif row.first and row.reduced is None:
        found = values[:1]
    else:
        sums = row.reduced is None or eqn.primitive.name == "reduce_sum"
        lost = sums and any(map(is_bad, values))
        return [math.nan if lost else None] * count
    return [*found, *[None] * (count - len(found))]


def number(value: Any) -> Number:
    """The number that a literal or a constant is; None for arrays of several."""
    try:
        return float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        return None


def _selected(at: Sequence[Number]) -> Number:
    which, *cases = at
    if which is not None:
        return cases[int(which)] if 0 <= which < len(cases) else None
    return cases[0] if len({*map(str, cases)}) == 1 else None


def _sampled(at: Sequence[Number]) -> list[list[float]]:
    if all(x is not None for x in at):
        return [[x for x in at if x is not None]]
    return [
        [row[i % len(row)] if x is None else x for i, x in enumerate(at)]
        for row in _SAMPLES
    ]


def _one(eqn: Any, at: Sequence[float]) -> Number:
    name, of = eqn.primitive.name, eqn.invars[0].aval.dtype
    whole = jnp.issubdtype(of, jnp.integer) or jnp.issubdtype(of, jnp.bool_)
    try:
        with np.errstate(all="ignore"):
            if whole and name in {"div", "rem"} and at[1] == 0:
                return math.nan  # a number that depends on the machine
            if name in {"and", "or", "xor", "not"}:
                return _logic(name, of, [int(x) for x in at])
            if name == "integer_pow":
                return _rounded(np.float64(at[0]) ** eqn.params["y"], eqn)
            value = row_of(eqn).value
            if value is not None:
                found = value(*map(np.float64, at))
                return _rounded(
                    math.trunc(found) if whole and name == "div" else found, eqn
                )
            with jax.ensure_compile_time_eval():
                types = (v.aval.dtype for v in eqn.invars)
                values = [jnp.asarray(x, t) for x, t in zip(at, types, strict=True)]
                return float(bind(eqn, values)[0])
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        return None


def _logic(name: str, of: Any, at: Sequence[int]) -> Number:
    if name == "not":
        return float(1 - at[0] if jnp.issubdtype(of, jnp.bool_) else ~at[0])
    a, b = at
    return float(a & b if name == "and" else a | b if name == "or" else a ^ b)


def _rounded(x: Any, eqn: Any) -> Number:
    """As the type of the result holds it: an epsilon may be 0 in float16."""
    to = eqn.outvars[0].aval.dtype
    if x is None or not jnp.issubdtype(to, jnp.floating):
        whole = x is not None and math.isfinite(x) and jnp.issubdtype(to, jnp.integer)
        return float(math.trunc(x)) if whole else None if x is None else float(x)
    with np.errstate(all="ignore"):
        return float(np.asarray(x, np.float64).astype(to))


def _gentle(program: Any) -> bool:
    """Whether a program's own derivatives would be finite, as its rule's are then."""
    return all(
        _gentle(called(eqn))
        if called(eqn) is not None
        else row_of(eqn).gentle or row_of(eqn).first
        for eqn in program.jaxpr.eqns
    )


class _Named:
    """An equation that equals those with the same primitive and parameters."""

    def __init__(self, eqn: Any, name: Any):
        self.eqn, self.name = eqn, name

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and self.name == other.name


@functools.lru_cache(maxsize=1024)
def _slope_of_entries(eqn: _Named, types: Any, which: tuple[int, ...]) -> Any:
    shapes = [jax.ShapeDtypeStruct((), t) for t in types]
    return _slope(eqn.eqn, shapes, which)


def _slope(eqn: Any, shapes: Sequence[Any], which: tuple[int, ...]) -> Any:
    """The program of a derivative; None where JAX has none.

    Its operands are those of the equation, then a change of those in `which`.
    """
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]

    def slope(values: Any, changes: Any) -> Any:
        def moved(*some: Any) -> Any:
            whole = list(values)
            for at, x in zip(which, some, strict=True):
                whole[at] = x
            outs = bind(eqn, whole)
            return [x for x in outs if jnp.issubdtype(x.dtype, jnp.inexact)]

        if eqn.primitive.name.startswith("custom_vjp"):
            outs, back = jax.vjp(moved, *(values[i] for i in which))
            return back([jnp.ones_like(x) for x in outs])
        return jax.jvp(moved, tuple(values[i] for i in which), tuple(changes))[1]

    try:  # what was traced is not to be judged by the types of today
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.make_jaxpr(slope)(shapes, [shapes[i] for i in which])
    except (TypeError, ValueError, NotImplementedError):
        return None
