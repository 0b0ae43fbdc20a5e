"""Parameters in reverse order, and those of their slices that can be told."""

from collections.abc import Sequence
from typing import Any

from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives.axes import Axis
from jaxsparse.program import Counter
from jaxsparse.tracing.values import Origin, Value


def piece_of(eqn: Any, ins: Sequence[Value]) -> Origin | None:
    """How a parameter is read after a `rev`, or a `dynamic_slice`."""
    name, origin = eqn.primitive.name, ins[0].origin if ins else None
    if origin is None or name not in {"rev", "dynamic_slice"}:
        return None
    dims, loops = list(origin.dims), list(origin.loops)
    try:
        if name == "rev":
            for at in eqn.params["dimensions"]:
                dims[at] = algebra.taken(dims[at], reversed(range(dims[at].size)))
            return origin._replace(dims=tuple(dims))
        for at, size in enumerate(eqn.params["slice_sizes"]):
            start = ins[1 + at].counter
            if size == dims[at].size:
                continue
            taken = None if start is None else _sliced(dims[at], size, start)
            if taken is None:
                return None
            dims[at], turned = taken
            if start is not None and start.scan is not None and turned is not None:
                loops.append((start.scan, turned))
    except algebra.Incompatible:
        return None
    # Outermost first, whichever was taken first.
    loops.sort(key=lambda loop: len(loop[0]))
    return origin._replace(dims=tuple(dims), loops=tuple(loops))


def _sliced(axis: Axis, size: int, at: Counter) -> tuple[Axis, Axis | None] | None:
    """The axis of a slice, and the one that the turns of a scan run over."""
    places = at.values
    # What goes beyond the end is moved back by JAX.
    if not size or places.min() < 0 or places.max() + size > axis.size:
        return None
    if at.scan is None or not at.step:
        return algebra.taken(axis, range(at.start, at.start + size)), None
    if at.step % size or at.start % size or axis.size % size:
        return None
    major, minor = algebra.split_minor(axis, size)
    return minor, algebra.taken(major, places // size)
