"""What a walk found: the kernels, and what it could not follow."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsparse.tracing.changes import Change
from jaxsparse.tracing.kernels import NotFollowed, Reading, view_of
from jaxsparse.tracing.values import Site
from jaxsparse.tracing.walk import Walk
from jaxsparse.tree import MatrixView


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A parameter that is contracted with data.

    Attributes:
      path: its path.
      view: its input, output and batch axes, which say how to read it as matrices.
      readings: every place where it is contracted; more than one for tied weights.
      input: the name of its input; kernels with the same input name read the same
        numbers.
      flops: the operations of all its contractions for the example inputs, two for a
        multiply-add.
      via: the primitives that changed its entries before it was contracted: masks,
        scales, quantization. Empty for a plain kernel.
      changes: the equations that changed its entries, with their lines, and whether
        each is a product with a factor that does not depend on the kernel.
    """

    path: str
    view: MatrixView
    readings: tuple[Reading, ...]
    input: str
    flops: int
    via: tuple[str, ...]
    changes: tuple[Change, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The lines of the model at which it is contracted."""
        return tuple(reading.site.source for reading in self.readings)


class Unfollowed(NamedTuple):
    """A use of parameters that the trace could not follow.

    Attributes:
      paths: the parameters concerned; empty where only activations are.
      primitive: the primitive that the trace could not follow.
      source: the line of the model.
      reason: the reason in words, and what to state by hand.
    """

    paths: tuple[str, ...]
    primitive: str
    source: str
    reason: str


def kernels_of(
    walk: Walk, shapes: Mapping[str, Any]
) -> tuple[dict[str, Kernel], tuple[Unfollowed, ...]]:
    """The kernels by path, and what could not be followed."""
    by_path: dict[str, list[Site]] = collections.defaultdict(list)
    for site in walk.sites:
        for path, _ in site.origin.sources:
            by_path[path].append(site)
    kernels: dict[str, Kernel] = {}
    unfollowed: list[Unfollowed] = []
    names: dict[Any, str] = {}
    for path, sites in by_path.items():
        last = sites[-1]
        try:
            if "dynamic_slice" in frozenset().union(*(s.origin.via for s in sites)):
                raise NotFollowed(
                    "slices of it are taken at a traced index; let a scan hand them out"
                )
            _check_real(shapes[path], sites, walk)
            view, readings = view_of(path, tuple(shapes[path].shape), sites)
        except NotFollowed as error:
            reason = (
                f"{path}: {error} ({last.primitive} at {last.source}). State its axes "
                f"by hand, axes={{r'{re.escape(path)}': js.Axes(...)}}, and give its "
                "statistics yourself."
            )
            unfollowed.append(Unfollowed((path,), last.primitive, last.source, reason))
            continue
        key = frozenset(reading.key for reading in readings), view.batch
        kernels[path] = Kernel(
            path,
            view,
            readings,
            names.setdefault(key, path),
            sum(_share(site, path) for site in sites),
            tuple(sorted(frozenset().union(*(s.origin.via for s in sites)))),
            tuple(dict.fromkeys(x.change for s in sites for x in s.origin.changes)),
        )
    for stop in (*walk.stops, *walk.scaled):
        lost = tuple(p for p in stop.paths if p not in kernels)
        if stop.paths and not lost:
            continue
        unfollowed.append(_explained(stop, lost))
    return kernels, tuple(dict.fromkeys(unfollowed))


def _check_real(shape: Any, sites: Sequence[Site], walk: Walk) -> None:
    for site in sites:
        acts = walk.nodes[site.address].visit.invars[site.operand].aval.dtype
        if jnp.issubdtype(acts, np.complexfloating) > jnp.issubdtype(
            shape.dtype, np.complexfloating
        ):
            raise NotFollowed(
                f"it is made a part of complex numbers before {site.source}; keep a "
                "complex parameter, or multiply by both parts apart"
            )


def _share(site: Site, path: str) -> int:
    """A kernel's part of the FLOPs where several are joined and contracted at once."""
    sizes = {
        p: math.prod(d.size for d in dims) // math.prod(a.size for _, a in loops)
        for loops in [site.origin.loops]
        for p, dims in site.origin.sources
    }
    operand = math.prod(d.size for d in site.origin.dims)
    return site.flops * min(sizes[path], operand) // operand


def _explained(stop: Any, paths: tuple[str, ...]) -> Unfollowed:
    who = ", ".join(paths)
    if stop.unknown:
        reason = (
            f"{who}: there is no rule for the primitive {stop.primitive} at "
            f"{stop.source}. Give one: rules={{'{stop.primitive}': 'btd,df->btf'}}, or "
            "state the axes by hand."
        )
    elif stop.primitive == "dynamic_slice":
        reason = (
            f"{who}: slices of it are taken at a traced index, at {stop.source}, so no "
            "one knows which. Let a scan hand them out, or state its axes by hand."
        )
    elif stop.product:
        others = "each other" if len(paths) > 1 else "something that is no input"
        reason = (
            f"{who}: multiplied by {others} by {stop.primitive} at {stop.source}, and "
            "data meets the product alone. Multiply the data by one after another, "
            "(x @ a) @ b, keep the product as the parameter, or state its axes by hand "
            "and give its statistics yourself."
        )
    else:
        reason = (
            f"{who}: no contraction with data, but {stop.primitive} at {stop.source}. "
            "If it is a kernel, state its axes by hand and give its statistics "
            "yourself."
        )
    return Unfollowed(paths, stop.primitive, stop.source, reason)
