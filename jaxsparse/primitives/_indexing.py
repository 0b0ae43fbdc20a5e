"""Look-ups and updates at indices that are values."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse.primitives import _masking
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives._row import Primitive, names
from jaxsparse.primitives.axes import Axis, leaf
from jaxsparse.primitives.dims import Dims, freeze, frozen, out_shapes, unify


def gather(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes taken whole stay; those that are indexed are gathered."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = ins
    shape = out_shapes(eqn)[0]
    batching = numbers.operand_batching_dims
    window_dims = [
        i
        for i in range(len(operand))
        if i not in numbers.collapsed_slice_dims and i not in batching
    ]
    out: list[Axis] = [leaf(n) for n in shape]
    for at, source in zip(numbers.offset_dims, window_dims, strict=True):
        if sizes[source] == operand[source].size:
            out[at] = operand[source]
        else:
            freeze(operand[source], "gather", eqn)
    for source in numbers.collapsed_slice_dims:
        algebra.flag(operand[source], "gathered", eqn=eqn)
    rows = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    for at, axis in zip(rows, indices[:-1], strict=True):
        out[at] = axis
    for a, b in zip(batching, numbers.start_indices_batching_dims, strict=True):
        unify(operand[a], indices[b], eqn)
    return [tuple(out)]


def scatter(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The operand's axes; whole ones are also the updates', indexed ones stay."""
    numbers = eqn.params["dimension_numbers"]
    operand, indices, updates = ins[:3]
    inserted = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [i for i in range(len(operand)) if i not in inserted]
    for at, source in zip(numbers.update_window_dims, windows, strict=True):
        if updates[at].size == operand[source].size:
            unify(updates[at], operand[source], eqn)
        else:
            freeze(operand[source], "scatter", eqn)
            freeze(updates[at], "scatter", eqn)
    for source in numbers.inserted_window_dims:
        algebra.flag(operand[source], "gathered", eqn=eqn)
    rows = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    for at, axis in zip(rows, indices[:-1], strict=True):
        unify(updates[at], axis, eqn)
    batching = numbers.operand_batching_dims
    for a, b in zip(batching, numbers.scatter_indices_batching_dims, strict=True):
        unify(operand[a], indices[b], eqn)
    return [operand]


def dynamic_slice(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes taken whole stay; the others are frozen."""
    out = []
    for axis, size in zip(ins[0], eqn.params["slice_sizes"], strict=True):
        if size != axis.size:
            freeze(axis, "dynamic_slice", eqn)
        out.append(axis if size == axis.size else frozen(size, "dynamic_slice", eqn))
    return [tuple(out)]


def dynamic_update_slice(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The operand's axes; whole ones are also the update's."""
    for axis, other in zip(ins[0], ins[1], strict=True):
        if axis.size == other.size:
            unify(axis, other, eqn)
        else:
            freeze(axis, "dynamic_update_slice", eqn)
            freeze(other, "dynamic_update_slice", eqn)
    return [ins[0]]


def _slice_sizes(
    eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]
) -> Any:
    return {"slice_sizes": sizes.shape(outs[0])}


def _whole_axes(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    """Axes that are taken whole still are."""
    taken = tuple(
        new if size == axis.size else size
        for size, axis, new in zip(
            eqn.params["slice_sizes"], ins[0], sizes.shape(ins[0]), strict=True
        )
    )
    return {"slice_sizes": taken}


ROWS: Mapping[str, Primitive] = {
    "gather": Primitive(gather, first=True, zeros=_masking.first, resize=_whole_axes),
    "dynamic_slice": Primitive(
        dynamic_slice,
        keeps_entries=True,
        first=True,
        part=True,
        zeros=_masking.first,
        resize=_slice_sizes,
    ),
    "dynamic_update_slice": Primitive(dynamic_update_slice, zeros=_masking.updated),
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter_add"),
        Primitive(scatter, zeros=_masking.scattered),
    ),
    **dict.fromkeys(
        names(
            """
            scatter-mul scatter_mul scatter-min scatter_min scatter-max scatter_max
            scatter-sub
            """
        ),
        Primitive(scatter),
    ),
}
"""The rows by primitive."""
