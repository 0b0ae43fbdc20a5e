"""Products: of two arrays, of rows in groups with a matrix each, convolutions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsparse.primitives import _masking
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives._general import opaque
from jaxsparse.primitives._row import Contraction, Leaves, Masking, Primitive
from jaxsparse.primitives.axes import Axis
from jaxsparse.primitives.dims import Dims, freeze, frozen, out_shapes, unify


def dot_general(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Contracted and batch axes are the same on both sides."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    lhs, rhs = ins
    for a, b in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        unify(lhs[a], rhs[b], eqn)
    free = lambda dims, gone: [d for i, d in enumerate(dims) if i not in gone]
    batch = [lhs[i] for i in lb]
    return [(*batch, *free(lhs, (*lc, *lb)), *free(rhs, (*rc, *rb)))]


def _ragged_axes(eqn: Any) -> tuple[int, int] | None:
    """Which axes of the matrices a product of groups of rows contracts and counts."""
    if [len(x.aval.shape) for x in eqn.invars[:2]] != [2, 3]:
        return None
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return 1, 0
    (left, right), batch = numbers.dot_dimension_numbers
    rows = tuple(left), tuple(numbers.lhs_ragged_dimensions)
    groups = numbers.rhs_group_dimensions
    if rows != ((1,), (0,)) or any(batch) or len(groups) != 1:
        return None
    return right[0], groups[0]


def ragged_dot(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """`lhs [m, k]`, `rhs [g, k, n]`: groups of rows, each with a matrix of its own."""
    axes = _ragged_axes(eqn)
    if axes is None:
        return opaque(eqn, ins)
    lhs, rhs, groups = ins[:3]
    unify(lhs[1], rhs[axes[0]], eqn)
    unify(rhs[axes[1]], groups[-1], eqn)
    freeze(lhs[0], "ragged_dot", eqn)
    (out,) = (d for i, d in enumerate(rhs) if i not in axes)
    return [(lhs[0], out)]


def conv(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Channels as in a product, in `feature_group_count` groups; space is frozen."""
    p = eqn.params
    spec, groups = p["dimension_numbers"], p["feature_group_count"]
    if p["batch_group_count"] != 1:
        return opaque(eqn, ins)
    lhs, rhs = ins
    channels, inputs, outputs = (
        lhs[spec.lhs_spec[1]],
        rhs[spec.rhs_spec[1]],
        rhs[spec.rhs_spec[0]],
    )
    try:
        if groups > 1:
            group, within = algebra.split_minor(channels, channels.size // groups)
            group_out, _ = algebra.split_minor(outputs, outputs.size // groups)
            algebra.unify(group, group_out)
            algebra.unify(within, inputs)
        else:
            algebra.unify(channels, inputs)
    except algebra.Incompatible as error:
        for axis in (channels, inputs, outputs):
            freeze(axis, f"conv ({error})", eqn)
    out: list[Axis] = [frozen(n, "space", eqn) for n in out_shapes(eqn)[0]]
    for axis in (*spec.lhs_spec[2:],):
        freeze(lhs[axis], "space", eqn)
    for axis in (*spec.rhs_spec[2:],):
        freeze(rhs[axis], "window", eqn)
    out[spec.out_spec[0]] = lhs[spec.lhs_spec[0]]
    out[spec.out_spec[1]] = outputs
    return [tuple(out)]


def _of_arrays(eqn: Any) -> Contraction:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = (range(x.aval.ndim) for x in eqn.invars)
    free = lambda axes, gone: tuple(a for a in axes if a not in gone)
    return Contraction(
        (tuple(lc), tuple(rc)),
        (tuple(lb), tuple(rb)),
        (free(left, (*lc, *lb)), free(right, (*rc, *rb))),
    )


def _of_groups(eqn: Any) -> Contraction | None:
    axes = _ragged_axes(eqn)
    if axes is None:
        return None
    contracted, group = axes
    out = tuple(a for a in range(3) if a not in axes)
    return Contraction(
        ((1,), (contracted,)),
        ((), (group,)),
        ((0,), out),
        kernels=(1,),
        pairs=False,
    )


def _of_windows(eqn: Any) -> Contraction:
    p, shape = eqn.params, eqn.outvars[0].aval.shape
    lhs, rhs, out = p["dimension_numbers"]
    return Contraction(
        ((lhs[1],), (rhs[1],)),
        ((), ()),
        ((lhs[0],), (rhs[0],)),
        (tuple(lhs[2:]), tuple(rhs[2:])),
        kernels=(1,) if p["batch_group_count"] == 1 else (),
        groups=p["feature_group_count"],
        samples=(lhs[0], math.prod(shape[a] for a in out[2:])),
    )


def _groups(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    """How many groups of channels a convolution has left."""
    (channels,), (per_group,) = _of_windows(eqn).summed
    whole, one = sizes.shape(ins[0])[channels], sizes.shape(ins[1])[per_group]
    return {"feature_group_count": whole // one}


def _zeros(of: Callable[[Any], Contraction]) -> Callable[[Masking], Leaves]:
    return lambda x: _masking.product(x, of(x.eqn))


_RAGGED = Primitive(ragged_dot, contraction=_of_groups)
ROWS: Mapping[str, Primitive] = {
    "dot_general": Primitive(
        dot_general, contraction=_of_arrays, zeros=_zeros(_of_arrays)
    ),
    "ragged_dot": _RAGGED,
    "ragged_dot_general": _RAGGED,
    "conv_general_dilated": Primitive(
        conv, contraction=_of_windows, zeros=_zeros(_of_windows), resize=_groups
    ),
}
"""The rows by primitive."""
