"""What moves entries: reshapes, slices, joins."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse.primitives import _masking
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives._row import Primitive
from jaxsparse.primitives.axes import Axis, leaf
from jaxsparse.primitives.dims import Dims, freeze, frozen, out_shapes, unify


def transpose(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The same axes in another order."""
    return [tuple(ins[0][a] for a in eqn.params["permutation"])]


def broadcast_in_dim(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """New axes, and those of the operand but where one index is spread out."""
    shape = out_shapes(eqn)[0]
    out = [leaf(n) for n in shape]
    for axis, at in zip(ins[0], eqn.params["broadcast_dimensions"], strict=True):
        if axis.size == shape[at]:
            out[at] = axis
    return [tuple(out)]


def squeeze(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """All axes but some of size 1."""
    gone = eqn.params["dimensions"]
    return [tuple(d for i, d in enumerate(ins[0]) if i not in gone)]


def reshape(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Runs of axes with the same number of entries hold the same indices."""
    order = eqn.params["dimensions"]  # a transpose before it, as a mapped conv has
    dims = ins[0] if order is None else tuple(ins[0][a] for a in order)
    return [_regroup(dims, out_shapes(eqn)[0], eqn)]


def _regroup(dims: Dims, shape: tuple[int, ...], eqn: Any) -> Dims:
    out: list[Axis] = []
    left, sizes = list(dims), list(shape)
    if 0 in sizes:
        return tuple(leaf(n) for n in sizes)
    while left or sizes:
        group, wanted = left[:1], sizes[:1]
        del left[:1], sizes[:1]
        a = group[0].size if group else 1
        b = wanted[0] if wanted else 1
        while a != b:
            if a < b:
                group.append(left.pop(0))
                a *= group[-1].size
            else:
                wanted.append(sizes.pop(0))
                b *= wanted[-1]
        if len(group) == len(wanted) == 1:
            out.extend(group)
            continue
        new = [leaf(n) for n in wanted]
        big = [x for x in new if x.size > 1]
        source = [x for x in group if x.size > 1]
        if big and len(big) == len(source) == 1:
            new = [source[0] if x is big[0] else x for x in new]
        elif big:
            unify(algebra.product(source), algebra.product(big), eqn)
        out.extend(new)
    return tuple(out)


def concatenate(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """A sum along one axis, the others the same."""
    at = eqn.params["dimension"]
    for dims in ins[1:]:
        for i, (a, b) in enumerate(zip(ins[0], dims, strict=True)):
            if i != at:
                unify(a, b, eqn)
    joined = algebra.concatenation([dims[at] for dims in ins if dims[at].size])
    return [(*ins[0][:at], joined, *ins[0][at + 1 :])]


def stack(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """A new axis that counts the operands."""
    at = eqn.params.get("axis", eqn.params.get("dimension", 0))
    for dims in ins[1:]:
        for a, b in zip(ins[0], dims, strict=True):
            unify(a, b, eqn)
    return [(*ins[0][:at], frozen(len(ins), "stack", eqn), *ins[0][at:])]


def unstack(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The indices of one axis, each without it: segments of size 1, squeezed away."""
    at = eqn.params["axis"]
    rest = ins[0][at]
    for _ in range(ins[0][at].size - 1):
        try:
            rest = algebra.cut(rest, 1)[1]
        except algebra.Incompatible as error:
            freeze(ins[0][at], f"unstack ({error})", eqn)
            break
    kept = (*ins[0][:at], *ins[0][at + 1 :])
    return [kept for _ in eqn.outvars]


def split(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The segments of one axis."""
    at, sizes = eqn.params["axis"], eqn.params["sizes"]
    rest, parts = ins[0][at], []
    try:
        for n in sizes[:-1]:
            # What is empty, or all that is left, is not cut off.
            part, rest = algebra.cut(rest, n) if 0 < n < rest.size else _ends(rest, n)
            parts.append(part)
        parts.append(rest)
    except algebra.Incompatible as error:
        freeze(ins[0][at], f"split ({error})", eqn)
        parts = [frozen(n, "split", eqn) for n in sizes]
    return [(*ins[0][:at], part, *ins[0][at + 1 :]) for part in parts]


def _ends(axis: Axis, n: int) -> tuple[Axis, Axis]:
    return (axis, leaf(0)) if n else (leaf(0), axis)


def slice_(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """A segment of each axis; with strides one index of a fast factor."""
    p, out = eqn.params, []
    strides = p["strides"] or (1,) * len(ins[0])
    starts, limits = p["start_indices"], p["limit_indices"]
    for axis, start, limit, stride in zip(ins[0], starts, limits, strides, strict=True):
        out.append(_slice_axis(axis, start, limit, stride, eqn))
    return [tuple(out)]


def _slice_axis(axis: Axis, start: int, limit: int, stride: int, eqn: Any) -> Axis:
    n = axis.size
    if (start, limit, stride) == (0, n, 1):
        return axis
    size = max(0, -(-(limit - start) // stride))
    if size in (0, 1) and stride != 1:
        limit, stride = start + size, 1
    try:
        if stride == 1 and size:
            if start:
                axis = algebra.cut(axis, start)[1]
            return algebra.cut(axis, size)[0] if size < axis.size else axis
        if size and n % stride == 0 and size == n // stride:
            major, minor = algebra.split_minor(axis, stride)
            freeze(minor, "strides", eqn)
            return major
    except algebra.Incompatible:
        pass
    freeze(axis, "slice", eqn)
    return frozen(size, "slice", eqn)


def pad(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Segments of their own around an axis."""
    out = []
    for axis, (low, high, interior) in zip(
        ins[0], eqn.params["padding_config"], strict=True
    ):
        if low < 0 or high < 0 or interior:
            freeze(axis, "pad", eqn)
            size = axis.size + low + high + max(0, axis.size - 1) * interior
            out.append(frozen(size, "pad", eqn))
            continue
        parts = [leaf(low)] * bool(low) + [axis] + [leaf(high)] * bool(high)
        out.append(algebra.concatenation(parts))
    return [tuple(out)]


def tile(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Each axis repeated as a whole."""
    reps = eqn.params["reps"]
    reps = (1,) * (len(ins[0]) - len(reps)) + tuple(reps)
    dims = (*(leaf(1) for _ in range(len(reps) - len(ins[0]))), *ins[0])
    repeat = lambda n, d: d if n == 1 else algebra.product([frozen(n, "tile", eqn), d])
    return [tuple(repeat(n, d) for n, d in zip(reps, dims, strict=True))]


def reverse(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes whose order is turned round stay as they are."""
    for at in eqn.params["dimensions"]:
        freeze(ins[0][at], "rev", eqn)
    return [ins[0]]


def _new_sizes(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    return {"new_sizes": sizes.shape(outs[0])}


def _shape(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    return {"shape": sizes.shape(outs[0])}


def _parts(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    at = eqn.params["axis"]
    return {"sizes": tuple(sizes.shape(dims)[at] for dims in outs)}


def _limits(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    p, shape = eqn.params, sizes.shape(outs[0])
    strides = p["strides"] or (1,) * len(ins[0])
    # With a stride the start counts within the first stride, which stays; one index
    # alone was sliced without a stride.
    starts = tuple(
        at if stride > 1 and out.size > 1 else sizes.before(axis, at)
        for axis, at, stride, out in zip(
            ins[0], p["start_indices"], strides, outs[0], strict=True
        )
    )
    limits = tuple(
        start + (size - 1) * stride + 1 if size else start
        for start, size, stride in zip(starts, shape, strides, strict=True)
    )
    return {"start_indices": starts, "limit_indices": limits}


def _around(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    """What is added around axes, of which some indices may be gone as well."""
    found = []
    for (low, high, inside), before, after in zip(
        eqn.params["padding_config"], ins[0], outs[0], strict=True
    ):
        if low >= 0 and high >= 0 and not inside:
            low = sizes.before(after, low)
            high = sizes.size(after) - sizes.size(before) - low
        found.append((low, high, inside))
    return {"padding_config": tuple(found)}


ROWS: Mapping[str, Primitive] = {
    **{
        name: Primitive(
            axes, keeps_entries=True, first=True, zeros=_masking.first, resize=resize
        )
        for name, axes, resize in (
            ("transpose", transpose, None),
            ("broadcast_in_dim", broadcast_in_dim, _shape),
            ("squeeze", squeeze, None),
            ("reshape", reshape, _new_sizes),
        )
    },
    **{
        name: Primitive(
            axes,
            keeps_entries=True,
            first=True,
            part=True,
            zeros=_masking.first,
            resize=resize,
        )
        for name, axes, resize in (
            ("slice", slice_, _limits),
            ("split", split, _parts),
            ("unstack", unstack, None),
        )
    },
    "rev": Primitive(reverse, first=True, zeros=_masking.first),
    "tile": Primitive(tile, first=True, zeros=_masking.first),
    "concatenate": Primitive(
        concatenate, keeps_entries=True, joins=True, zeros=_masking.joined
    ),
    "stack": Primitive(stack, joins=True, zeros=_masking.joined),
    "pad": Primitive(pad, joins=True, zeros=_masking.padded, resize=_around),
}
"""The rows by primitive."""
