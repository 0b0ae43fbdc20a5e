"""What a walk knows of values and equations: no more than tuples."""

import dataclasses
import functools
from typing import Any, NamedTuple

from jaxsparse.primitives.axes import Axis, leaves
from jaxsparse.primitives.dims import Dims
from jaxsparse.program import Address, Counter, source_of
from jaxsparse.tracing.changes import Altering, Past


class Origin(NamedTuple):
    """How a value came about from parameters, and from nothing else.

    Its axes are expressions of the parameters' own axes, which no other value shares:
    a square kernel's two axes stay apart here.
    """

    sources: tuple[tuple[str, Dims], ...]  # parameters with their axes
    dims: Dims
    dropped: Dims = ()  # axes of size 1 that were squeezed away
    via: frozenset[str] = frozenset()  # what changed entries on the way
    loops: tuple[tuple[Address, Axis], ...] = ()  # scans that hand out its slices
    changes: tuple[Altering, ...] = ()  # the equations that did so

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters' paths."""
        return tuple(path for path, _ in self.sources)

    @property
    def is_matrix(self) -> bool:
        """Whether a parameter has more than one axis here, however it is spread out."""
        here = {x for d in self.dims for x in leaves(d) if x.size > 1}
        long = lambda dims: sum(any(x in here for x in leaves(d)) for d in dims)
        return any(long(dims) > 1 for _, dims in self.sources)


class Value(NamedTuple):
    """What is known of a traced value."""

    dims: Dims
    data: bool  # whether it depends on the inputs
    token: Any  # equal tokens, equal values
    origin: Origin | None = None
    past: Past = Past()  # where it does not depend on the inputs
    counter: Counter | None = None  # where it is an integer that counts turns
    product: Any = None  # of data and a parameter, see `_products`


class Site(NamedTuple):
    """An equation that contracts parameters with data."""

    address: Address
    primitive: str
    operand: int  # which operand comes from the parameters
    other: int  # and which from the inputs
    origin: Origin
    contracted: tuple[int, ...]  # axes of that operand
    batch: tuple[int, ...]
    of_input: tuple[tuple[int, ...], tuple[int, ...]]  # the same of the other operand
    input_dims: Dims  # all axes of the other operand
    groups: int  # of a convolution
    conv: tuple[int, int] | None  # its input's axis of samples, positions of a sample
    reads: Any  # equal values, equal statistics
    times: int | None  # how often the equation runs; None where no one knows
    flops: int
    source: str

    @property
    def by_groups(self) -> bool:
        """Whether rows fall in groups, each of which meets one matrix of a batch."""
        return bool(self.batch) and not self.of_input[1]


class Stop(NamedTuple):
    """Where a parameter's trail ends: it meets data other than in a contraction."""

    paths: tuple[str, ...]
    primitive: str
    source: str
    unknown: bool  # whether there is no rule for the primitive
    product: bool = False  # of parameters, and of nothing that depends on the inputs


@dataclasses.dataclass(eq=False)
class Visit:
    """An equation at the place where it is met: a jaxpr may be called at many.

    The first four are the equation's own; `around` are the calls and loops that lead
    to it, outermost first.
    """

    primitive: Any
    params: Any
    invars: Any
    outvars: Any
    eqn: Any
    around: tuple["Visit", ...]

    @functools.cached_property
    def source(self) -> str:
        """The line of the model; within JAX's own functions that of their call."""
        lines = (source_of(v.eqn) for v in (self, *reversed(self.around)))
        return next((line for line in lines if line), "an unknown line")


class Node(NamedTuple):
    """The axes of an equation's operands and results."""

    ins: tuple[Dims, ...]
    outs: tuple[Dims, ...]
    visit: Visit
