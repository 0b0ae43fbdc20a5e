"""What each primitive does to the axes of its operands: one rule for each idea.

A rule takes the equation and the axes of its operands, unifies what must be the same,
and returns the axes of its results. What a rule does not understand, it freezes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsparse.tracing import _axes
from jaxsparse.tracing._axes import Axis, leaf

Dims = tuple[Axis, ...]
Rule = Callable[[Any, Sequence[Dims]], list[Dims]]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma
    div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a
    igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max
    min mul name ne neg nextafter not optimization_barrier or polygamma population_count
    pow pvary pcast real reduce_precision regularized_incomplete_beta rem round rsqrt
    select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
    """
)
"""Results that have, entry by entry, the axes of the operands."""

STRUCTURAL = _names(
    """
    transpose reshape broadcast_in_dim squeeze convert_element_type copy copy_p slice
    concatenate split dynamic_slice reduce_precision name stop_gradient
    sharding_constraint optimization_barrier pvary pcast unstack
    """
)
"""What moves entries and changes none: a kernel after it is still that kernel."""


def unify(a: Axis, b: Axis, why: str) -> None:
    """Makes two axes the same, or freezes both.

    Args:
      a: an axis.
      b: an axis.
      why: the primitive that asks.
    """
    try:
        _axes.unify(a, b)
    except _axes.Incompatible as error:
        freeze(a, f"{why} ({error})")
        freeze(b, f"{why} ({error})")


def freeze(axis: Axis, why: str) -> None:
    """Says of an axis that its indices must stay.

    Args:
      axis: an axis.
      why: the reason.
    """
    _axes.flag(axis, f"frozen: {why}")


def _out_shapes(eqn: Any) -> list[tuple[int, ...]]:
    return [tuple(v.aval.shape) for v in eqn.outvars]


def elementwise(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes of equal size at the same place are the same; those of size 1 broadcast."""
    results = []
    for shape in _out_shapes(eqn):
        dims = []
        for at, size in enumerate(shape):
            same = [d[at] for d in ins if len(d) == len(shape) and d[at].size == size]
            first = same[0] if same else leaf(size)
            for other in same[1:] if size > 1 else ():
                unify(first, other, eqn.primitive.name)
            dims.append(first)
        results.append(tuple(dims))
    return results


def opaque(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Nothing is known: everything stays as it is."""
    why = eqn.primitive.name
    for dims in ins:
        for axis in dims:
            freeze(axis, why)
    return [tuple(leaf(n, f"frozen: {why}") for n in s) for s in _out_shapes(eqn)]


def fresh(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Results that depend on no operand's axes: random numbers, constants."""
    return [tuple(leaf(n) for n in shape) for shape in _out_shapes(eqn)]


def dot_general(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Contracted and batch axes are the same on both sides."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    lhs, rhs = ins
    for a, b in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        unify(lhs[a], rhs[b], "dot_general")
    free = lambda dims, gone: [d for i, d in enumerate(dims) if i not in gone]
    batch = [lhs[i] for i in lb]
    return [(*batch, *free(lhs, (*lc, *lb)), *free(rhs, (*rc, *rb)))]


def ragged_axes(eqn: Any) -> tuple[int, int] | None:
    """Which axes of the matrices a product of groups of rows contracts and counts.

    Args:
      eqn: a `ragged_dot`.

    Returns:
      The contracted axis and that of the groups; None where the operands are not rows
      `[m, k]` in groups, and a matrix for each group.
    """
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
    axes = ragged_axes(eqn)
    if axes is None:
        return opaque(eqn, ins)
    lhs, rhs, groups = ins[:3]
    unify(lhs[1], rhs[axes[0]], "ragged_dot")
    unify(rhs[axes[1]], groups[-1], "ragged_dot")
    freeze(lhs[0], "ragged_dot")
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
            group, within = _axes.split_minor(channels, channels.size // groups)
            group_out, _ = _axes.split_minor(outputs, outputs.size // groups)
            _axes.unify(group, group_out)
            _axes.unify(within, inputs)
        else:
            _axes.unify(channels, inputs)
    except _axes.Incompatible as error:
        for axis in (channels, inputs, outputs):
            freeze(axis, f"conv ({error})")
    out: list[Axis] = [leaf(n, "frozen: space") for n in _out_shapes(eqn)[0]]
    for axis in (*spec.lhs_spec[2:],):
        freeze(lhs[axis], "space")
    for axis in (*spec.rhs_spec[2:],):
        freeze(rhs[axis], "window")
    out[spec.out_spec[0]] = lhs[spec.lhs_spec[0]]
    out[spec.out_spec[1]] = outputs
    return [tuple(out)]


def transpose(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The same axes in another order."""
    return [tuple(ins[0][a] for a in eqn.params["permutation"])]


def broadcast_in_dim(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """New axes, and those of the operand but where one index is spread out."""
    shape = _out_shapes(eqn)[0]
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
    return [_regroup(ins[0], _out_shapes(eqn)[0])]


def _regroup(dims: Dims, shape: tuple[int, ...]) -> Dims:
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
            unify(_axes.product(source), _axes.product(big), "reshape")
        out.extend(new)
    return tuple(out)


def concatenate(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """A sum along one axis, the others the same."""
    at = eqn.params["dimension"]
    for dims in ins[1:]:
        for i, (a, b) in enumerate(zip(ins[0], dims, strict=True)):
            if i != at:
                unify(a, b, "concatenate")
    joined = _axes.concatenation([dims[at] for dims in ins if dims[at].size])
    return [(*ins[0][:at], joined, *ins[0][at + 1 :])]


def stack(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """A new axis that counts the operands."""
    at = eqn.params.get("axis", eqn.params.get("dimension", 0))
    for dims in ins[1:]:
        for a, b in zip(ins[0], dims, strict=True):
            unify(a, b, "stack")
    return [(*ins[0][:at], leaf(len(ins), "frozen: stack"), *ins[0][at:])]


def unstack(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The indices of one axis, each without it: segments of size 1, squeezed away."""
    at = eqn.params["axis"]
    rest = ins[0][at]
    for _ in range(ins[0][at].size - 1):
        try:
            rest = _axes.cut(rest, 1)[1]
        except _axes.Incompatible as error:
            freeze(ins[0][at], f"unstack ({error})")
            break
    kept = (*ins[0][:at], *ins[0][at + 1 :])
    return [kept for _ in eqn.outvars]


def split(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The segments of one axis."""
    at, rest, results = eqn.params["axis"], ins[0][eqn.params["axis"]], []
    sizes = list(eqn.params["sizes"])
    for n in sizes:
        try:
            part, rest = _axes.cut(rest, n) if n < rest.size else (rest, rest)
        except _axes.Incompatible as error:
            freeze(ins[0][at], f"split ({error})")
            part, rest = leaf(n, "frozen: split"), leaf(max(rest.size - n, 0))
        results.append((*ins[0][:at], part, *ins[0][at + 1 :]))
    return results


def slice_(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """A segment of each axis; with strides one index of a fast factor."""
    p, out = eqn.params, []
    strides = p["strides"] or (1,) * len(ins[0])
    starts, limits = p["start_indices"], p["limit_indices"]
    for axis, start, limit, stride in zip(ins[0], starts, limits, strides, strict=True):
        out.append(_slice_axis(axis, start, limit, stride))
    return [tuple(out)]


def _slice_axis(axis: Axis, start: int, limit: int, stride: int) -> Axis:
    n = axis.size
    if (start, limit, stride) == (0, n, 1):
        return axis
    size = max(0, -(-(limit - start) // stride))
    if size in (0, 1) and stride != 1:
        limit, stride = start + size, 1
    try:
        if stride == 1 and size:
            if start:
                axis = _axes.cut(axis, start)[1]
            return _axes.cut(axis, size)[0] if size < axis.size else axis
        if size and n % stride == 0 and size == n // stride:
            major, minor = _axes.split_minor(axis, stride)
            freeze(minor, "strides")
            return major
    except _axes.Incompatible:
        pass
    freeze(axis, "slice")
    return leaf(size, "frozen: slice")


def pad(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Frozen segments around an axis."""
    out = []
    for axis, (low, high, interior) in zip(
        ins[0], eqn.params["padding_config"], strict=True
    ):
        if low < 0 or high < 0 or interior:
            freeze(axis, "pad")
            size = axis.size + low + high + max(0, axis.size - 1) * interior
            out.append(leaf(size, "frozen: pad"))
            continue
        parts = [leaf(low, "frozen: pad")] * bool(low) + [axis]
        out.append(
            _axes.concatenation(parts + [leaf(high, "frozen: pad")] * bool(high))
        )
    return [tuple(out)]


def tile(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Each axis repeated as a whole."""
    reps = eqn.params["reps"]
    reps = (1,) * (len(ins[0]) - len(reps)) + tuple(reps)
    dims = (*(leaf(1) for _ in range(len(reps) - len(ins[0]))), *ins[0])
    repeat = lambda n, d: d if n == 1 else _axes.product([leaf(n, "frozen: tile"), d])
    return [tuple(repeat(n, d) for n, d in zip(reps, dims, strict=True))]


def reduce(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes that are summed, or otherwise reduced, are gone."""
    p = eqn.params
    axes = p["axes"] if "axes" in p else p["dimensions"]
    for dims in ins[1 : len(ins) // 2 if eqn.primitive.name == "reduce" else None]:
        for a, b in zip(ins[0], dims, strict=False):
            unify(a, b, "reduce")
    for a in axes:
        _axes.flag(ins[0][a], f"reduced: {eqn.primitive.name}")
    kept = tuple(d for i, d in enumerate(ins[0]) if i not in axes)
    return [kept for _ in eqn.outvars]


def along_axis(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """What depends on the order of one axis: cumulative sums, sorting."""
    p = eqn.params
    results = elementwise(eqn, ins)
    at = p["axis"] if "axis" in p else p["dimension"]
    sorts = eqn.primitive.name == "sort"
    _axes.flag(ins[0][at], "sorted" if sorts else f"frozen: {eqn.primitive.name}")
    return results


def top_k(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The last axis is sorted, and results have one of their own."""
    at = eqn.params.get("axis", -1) % len(ins[0])
    _axes.flag(ins[0][at], "sorted")
    size = _out_shapes(eqn)[0][at]
    found = (*ins[0][:at], leaf(size, "frozen: top_k"), *ins[0][at + 1 :])
    return [found for _ in eqn.outvars]


def window(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes of the same size whose window is 1 stay; the others are space."""
    results = []
    sizes = eqn.params.get("window_dimensions", ())
    for shape in _out_shapes(eqn):
        out = []
        for at, size in enumerate(shape):
            axis = ins[0][at]
            untouched = size == axis.size and (not sizes or sizes[at] == 1)
            if not untouched:
                freeze(axis, "window")
            out.append(axis if untouched else leaf(size, "frozen: window"))
        results.append(tuple(out))
    return results


def reverse(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes whose order is turned round stay as they are."""
    for at in eqn.params["dimensions"]:
        freeze(ins[0][at], "rev")
    return [ins[0]]


def iota(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The values along one axis are its positions."""
    shape, at = _out_shapes(eqn)[0], eqn.params["dimension"]
    return [tuple(leaf(n, *(["iota"] if i == at else [])) for i, n in enumerate(shape))]


def gather(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes taken whole stay; those that are indexed are gathered."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = ins
    shape = _out_shapes(eqn)[0]
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
            freeze(operand[source], "gather")
    for source in numbers.collapsed_slice_dims:
        _axes.flag(operand[source], "gathered")
    rows = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    for at, axis in zip(rows, indices[:-1], strict=True):
        out[at] = axis
    for a, b in zip(batching, numbers.start_indices_batching_dims, strict=True):
        unify(operand[a], indices[b], "gather")
    return [tuple(out)]


def scatter(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The operand's axes; whole ones are also the updates', indexed ones stay."""
    numbers = eqn.params["dimension_numbers"]
    operand, indices, updates = ins[:3]
    inserted = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [i for i in range(len(operand)) if i not in inserted]
    for at, source in zip(numbers.update_window_dims, windows, strict=True):
        if updates[at].size == operand[source].size:
            unify(updates[at], operand[source], "scatter")
        else:
            freeze(operand[source], "scatter")
            freeze(updates[at], "scatter")
    for source in numbers.inserted_window_dims:
        _axes.flag(operand[source], "gathered")
    rows = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    for at, axis in zip(rows, indices[:-1], strict=True):
        unify(updates[at], axis, "scatter")
    batching = numbers.operand_batching_dims
    for a, b in zip(batching, numbers.scatter_indices_batching_dims, strict=True):
        unify(operand[a], indices[b], "scatter")
    return [operand]


def dynamic_slice(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes taken whole stay; the others are frozen."""
    out = []
    for axis, size in zip(ins[0], eqn.params["slice_sizes"], strict=True):
        if size != axis.size:
            freeze(axis, "dynamic_slice")
        out.append(axis if size == axis.size else leaf(size, "frozen: dynamic_slice"))
    return [tuple(out)]


def dynamic_update_slice(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The operand's axes; whole ones are also the update's."""
    for axis, other in zip(ins[0], ins[1], strict=True):
        if axis.size == other.size:
            unify(axis, other, "dynamic_update_slice")
        else:
            freeze(axis, "dynamic_update_slice")
            freeze(other, "dynamic_update_slice")
    return [ins[0]]


def by_einsum(equation: str) -> Rule:
    """A rule from an einsum-like equation: equal letters are the same axis.

    Args:
      equation: `"btd,df->btf"`; `?` for an operand or result that has no part in it.

    Returns:
      A rule.
    """
    left, right = equation.replace(" ", "").split("->")
    operands, results = left.split(","), right.split(",")

    def rule(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
        shapes = _out_shapes(eqn)
        fits = len(operands) == len(ins) and len(results) == len(shapes)
        for letters, dims in zip((*operands, *results), (*ins, *shapes), strict=False):
            fits &= letters == "?" or len(letters) == len(dims)
        if not fits:
            raise ValueError(
                f"rules: {equation!r} does not fit {eqn.primitive.name} with operands "
                f"of {[len(d) for d in ins]} and results of {list(map(len, shapes))} "
                "axes."
            )
        known: dict[str, Axis] = {}
        for letters, dims in zip(operands, ins, strict=True):
            for letter, axis in zip(letters, dims, strict=False) if dims else ():
                if letters == "?":
                    freeze(axis, eqn.primitive.name)
                elif letter in known:
                    unify(known[letter], axis, eqn.primitive.name)
                else:
                    known[letter] = axis
        named = lambda letters, shape: tuple(
            known[c] if c in known else leaf(n)
            for c, n in zip(letters.ljust(len(shape), "?"), shape, strict=True)
        )
        return [named(c, s) for c, s in zip(results, shapes, strict=True)]

    return rule


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(
        (
            "random_bits",
            "random_seed",
            "random_wrap",
            "random_unwrap",
            "random_fold_in",
            "random_split",
            "random_clone",
            "threefry2x32",
            "rng_bit_generator",
            "rng_uniform",
            "create_token",
            "empty",
            "axis_index",
        ),
        fresh,
    ),
    **dict.fromkeys(
        (
            "reduce",
            "reduce_sum",
            "reduce_max",
            "reduce_min",
            "reduce_prod",
            "reduce_and",
            "reduce_or",
            "reduce_xor",
            "argmax",
            "argmin",
        ),
        reduce,
    ),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"), along_axis
    ),
    **dict.fromkeys(
        (
            "reduce_window",
            "reduce_window_sum",
            "reduce_window_max",
            "reduce_window_min",
            "select_and_scatter_add",
            "select_and_gather_add",
        ),
        window,
    ),
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul"), scatter
    ),
    **dict.fromkeys(("scatter-min", "scatter_min"), scatter),
    **dict.fromkeys(("scatter-max", "scatter_max", "scatter-sub"), scatter),
    "approx_top_k": top_k,
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate,
    "conv_general_dilated": conv,
    "dot_general": dot_general,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    "iota": iota,
    "pad": pad,
    "ragged_dot": ragged_dot,
    "ragged_dot_general": ragged_dot,
    "reshape": reshape,
    "rev": reverse,
    "slice": slice_,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "top_k": top_k,
    "transpose": transpose,
    "unstack": unstack,
}
"""The rules by primitive."""
