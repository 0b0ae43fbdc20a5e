"""Sums and other reductions, cumulative ones, sorting, windows."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse.primitives import _masking
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives._general import elementwise
from jaxsparse.primitives._row import Primitive, names
from jaxsparse.primitives.dims import Dims, freeze, frozen, out_shapes, unify


def _reduced(eqn: Any) -> tuple[int, ...]:
    p = eqn.params
    return tuple(p["axes"] if "axes" in p else p["dimensions"])


def _ordered(eqn: Any) -> int:
    p = eqn.params
    return p.get("axis", p.get("dimension", p.get("reduction_dimension", -1)))


def reduce(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes that are summed, or otherwise reduced, are gone."""
    axes = _reduced(eqn)
    for dims in ins[1 : len(ins) // 2 if eqn.primitive.name == "reduce" else None]:
        for a, b in zip(ins[0], dims, strict=False):
            unify(a, b, eqn)
    for a in axes:
        algebra.flag(ins[0][a], f"reduced: {eqn.primitive.name}", eqn=eqn)
    kept = tuple(d for i, d in enumerate(ins[0]) if i not in axes)
    return [kept for _ in eqn.outvars]


def along_axis(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """What depends on the order of one axis: cumulative sums, sorting."""
    results, at = elementwise(eqn, ins), _ordered(eqn)
    sorts = eqn.primitive.name == "sort"
    algebra.flag(
        ins[0][at], "sorted" if sorts else f"frozen: {eqn.primitive.name}", eqn=eqn
    )
    return results


def top_k(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The last axis is sorted, and results have one of their own."""
    at = eqn.params.get("axis", -1) % len(ins[0])
    algebra.flag(ins[0][at], "sorted", eqn=eqn)
    size = out_shapes(eqn)[0][at]
    found = (*ins[0][:at], frozen(size, "top_k", eqn), *ins[0][at + 1 :])
    return [found for _ in eqn.outvars]


def window(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes of the same size whose window is 1 stay; the others are space."""
    results = []
    sizes = eqn.params.get("window_dimensions", ())
    for shape in out_shapes(eqn):
        out = []
        for at, size in enumerate(shape):
            axis = ins[0][at]
            untouched = size == axis.size and (not sizes or sizes[at] == 1)
            if not untouched:
                freeze(axis, "window", eqn)
            out.append(axis if untouched else frozen(size, "window", eqn))
        results.append(tuple(out))
    return results


ROWS: Mapping[str, Primitive] = {
    **{
        name: Primitive(
            reduce,
            reduced=_reduced,
            zeros=_masking.first if name == "reduce_sum" else None,
            first=name in {"reduce_max", "reduce_min"},
            gentle=True,
        )
        for name in names(
            """
            reduce reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or
            reduce_xor argmax argmin
            """
        )
    },
    **{
        name: Primitive(
            along_axis,
            ordered=_ordered,
            zeros=_masking.first if name == "cumsum" else None,
        )
        for name in names("cumsum cumprod cummax cummin cumlogsumexp sort")
    },
    **dict.fromkeys(("top_k", "approx_top_k"), Primitive(top_k, ordered=_ordered)),
    **{
        name: Primitive(
            window,
            zeros=_masking.first if name.startswith("reduce_window") else None,
        )
        for name in names(
            """
            reduce_window reduce_window_sum reduce_window_max reduce_window_min
            select_and_scatter_add select_and_gather_add
            """
        )
    },
}
"""The rows by primitive."""
