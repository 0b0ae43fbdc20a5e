"""Masked entries that are not zero but all the same: what a sum is then short of.

Where a channel is masked, a centered value `x - mean` is `-mean`, in all masked entries
alike. A sum over the channels, such as that of a variance, then has in the masked model
as many such terms as channels are masked, and in the narrowed one none. They are
computed once, from the operands' own masked entries, and added.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse.coupling.known import Entries, Known
from jaxsparse.primitives import row_of
from jaxsparse.primitives.axes import Axis
from jaxsparse.primitives.dims import Dims
from jaxsparse.program import bind

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Calls whose equations are evaluated where they are called: what is known goes in."""
Kind = Literal["zero", "own", "same"]
"""What the masked entries of an operand are."""


class Uniform(NamedTuple):
    """A result whose masked entries are all the same along some of its axes.

    Wherever an index of one of `axes` is masked, the result is what the equation gives
    for the masked entries of its operands, which have none of those axes any more.

    Attributes:
      axes: of the result.
      operands: what the masked entries of each operand are: "zero"; "own", as it does
        not have those axes; "same", as it is uniform itself.
    """

    axes: frozenset[int]
    operands: tuple[Kind, ...]


class Operand(NamedTuple):
    """Which axes of a result an operand has.

    Attributes:
      own: those that it has itself.
      zero: those of them along which masked entries are zero.
      same: those along which they are all the same.
    """

    own: frozenset[int]
    zero: frozenset[int]
    same: frozenset[int]


def uniform(operands: Iterable[Operand], axes: frozenset[int]) -> Uniform:
    """Along which axes the masked entries of a result are all the same."""
    kinds: list[Kind] = []
    for x in operands:
        if not axes:  # whatever the others are
            break
        kind, most = "own", axes - x.own
        others: tuple[tuple[Kind, frozenset[int]], ...]
        others = ("zero", axes & x.zero), ("same", axes & x.same)
        for other, found in others:
            if len(found) > len(most):
                kind, most = other, found
        axes = most
        kinds.append(kind)
    return Uniform(axes, tuple(kinds))


def supported(eqn: Any) -> bool:
    """Whether a result's masked entries follow from those of the operands."""
    row = row_of(eqn)
    computed = row.entrywise and not row.same
    return computed or eqn.primitive.name == "broadcast_in_dim"


def places(eqn: Any, at: int, dims: Dims, after: Dims) -> dict[int, int]:
    """Where the axes of an operand lie in the result; those of size 1 are broadcast."""
    if eqn.primitive.name == "broadcast_in_dim":
        to = eqn.params["broadcast_dimensions"] if at == 0 else ()
    else:
        to = range(len(dims)) if len(dims) == len(after) else ()
    return {i: j for i, j in enumerate(to) if dims[i].size > 1}


def masked_entries(
    eqn: Any, ins: Sequence[Known], found: Uniform, shape: Sequence[int]
) -> Entries:
    """A result's masked entries."""
    shape = tuple(1 if at in found.axes else n for at, n in enumerate(shape))

    def operand(x: Known, kind: str, var: Any) -> Any:
        dtype = var.aval.dtype
        if kind == "zero":
            return jnp.zeros((), dtype)
        entries = x.value if kind == "own" else x.masked.compute()  # pyrefly: ignore
        return jnp.asarray(entries, dtype)

    @functools.cache
    def compute() -> Any:
        values = list(map(operand, ins, found.operands, eqn.invars))
        if eqn.primitive.name == "broadcast_in_dim":
            to = eqn.params["broadcast_dimensions"]
            return lax.broadcast_in_dim(values[0], shape, to)
        return bind(eqn, [jnp.broadcast_to(x, shape) for x in values])[0]

    return Entries(found.axes, compute)


def completed(
    total: Any,
    entries: Entries,
    axes: Sequence[int],
    told: Collection[int],
    dims: Dims,
    size: Callable[[Axis], int],
) -> Any:
    """The sum of the masked model."""
    uniform = [dims[a] for a in told if a in entries.axes]
    missing = math.prod(d.size for d in uniform) - math.prod(map(size, uniform))
    if not missing:
        return total
    one = jnp.sum(entries.compute(), axis=tuple(axes), dtype=total.dtype)
    return total + one * jnp.asarray(missing, total.dtype)
