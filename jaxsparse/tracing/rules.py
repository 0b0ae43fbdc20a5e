"""What each primitive does to the axes of its operands: one rule for each idea.

A rule takes the equation and the axes of its operands, unifies what must be the same,
and returns the axes of its results. What a rule does not understand, it freezes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse.tracing import _moves
from jaxsparse.tracing import axes as algebra
from jaxsparse.tracing.axes import Axis, leaf
from jaxsparse.tracing.dims import Dims, Rule, freeze, frozen, out_shapes, unify


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

REDUCTIONS = _names(
    """
    reduce reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor
    argmax argmin
    """
)
"""Results without some of the operands' axes."""


def elementwise(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes of equal size at the same place are the same; those of size 1 broadcast."""
    results = []
    for shape in out_shapes(eqn):
        dims = []
        for at, size in enumerate(shape):
            same = [d[at] for d in ins if len(d) == len(shape) and d[at].size == size]
            first = same[0] if same else leaf(size)
            for other in same[1:] if size > 1 else ():
                unify(first, other, eqn)
            dims.append(first)
        results.append(tuple(dims))
    return results


def bitcast(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Other types of the same width; with another one an axis comes or goes."""
    shapes = [tuple(d.size for d in ins[0])]
    return elementwise(eqn, ins) if shapes == out_shapes(eqn) else opaque(eqn, ins)


def opaque(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Nothing is known: everything stays as it is."""
    why = eqn.primitive.name
    for dims in ins:
        for axis in dims:
            freeze(axis, why, eqn)
    return [tuple(frozen(n, why, eqn) for n in s) for s in out_shapes(eqn)]


def fresh(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Results that depend on no operand's axes."""
    return [tuple(leaf(n) for n in shape) for shape in out_shapes(eqn)]


def each(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Each operand as it is; they have nothing to do with each other."""
    return list(ins)


def drawn(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The axes of the keys, then new ones for what each of them gives."""
    shape = out_shapes(eqn)[0]
    for dims in ins[1:]:
        for a, b in zip(ins[0], dims, strict=False):
            unify(a, b, eqn)
    keys = ins[0][: len(shape)]
    new = tuple(leaf(n) for n in shape[len(keys) :])
    words = ins[0][len(shape) :]  # that a key consists of
    for axis in new if eqn.primitive.name == "random_unwrap" else words:
        freeze(axis, eqn.primitive.name, eqn)
    return [(*keys, *new)]


def dot_general(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Contracted and batch axes are the same on both sides."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    lhs, rhs = ins
    for a, b in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        unify(lhs[a], rhs[b], eqn)
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


def reduce(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Axes that are summed, or otherwise reduced, are gone."""
    p = eqn.params
    axes = p["axes"] if "axes" in p else p["dimensions"]
    for dims in ins[1 : len(ins) // 2 if eqn.primitive.name == "reduce" else None]:
        for a, b in zip(ins[0], dims, strict=False):
            unify(a, b, eqn)
    for a in axes:
        algebra.flag(ins[0][a], f"reduced: {eqn.primitive.name}", eqn=eqn)
    kept = tuple(d for i, d in enumerate(ins[0]) if i not in axes)
    return [kept for _ in eqn.outvars]


def along_axis(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """What depends on the order of one axis: cumulative sums, sorting."""
    p = eqn.params
    results = elementwise(eqn, ins)
    at = p["axis"] if "axis" in p else p["dimension"]
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


def iota(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The values along one axis are its positions."""
    dims = tuple(leaf(n) for n in out_shapes(eqn)[0])
    algebra.flag(dims[eqn.params["dimension"]], "iota", eqn=eqn)
    return [dims]


def by_einsum(equation: str) -> Rule:
    """A rule from an einsum-like equation: equal letters are the same axis.

    Args:
      equation: `"btd,df->btf"`; `?` for an operand or result that has no part in it.

    Returns:
      A rule.
    """
    if not isinstance(equation, str) or equation.count("->") != 1:
        raise ValueError(
            f"rules: {equation!r} is no equation such as 'btd,df->btf', in which equal "
            "letters are the same axis."
        )
    left, right = equation.replace(" ", "").split("->")
    operands, results = left.split(","), right.split(",")

    def rule(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
        shapes = out_shapes(eqn)
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
                # Its sizes are in its own program, which no one can change from here.
                algebra.flag(axis, f"fixed: {eqn.primitive.name}", eqn=eqn)
                if letters == "?":
                    freeze(axis, eqn.primitive.name, eqn)
                elif letter in known:
                    unify(known[letter], axis, eqn)
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
        _names(
            """
            rng_bit_generator rng_uniform create_token empty axis_index
            """
        ),
        fresh,
    ),
    **dict.fromkeys(
        _names(
            """
            random_bits random_seed random_wrap random_unwrap random_fold_in
            random_split random_clone
            """
        ),
        drawn,
    ),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(
        _names(
            """
            cumsum cumprod cummax cummin cumlogsumexp sort
            """
        ),
        along_axis,
    ),
    **dict.fromkeys(
        _names(
            """
            reduce_window reduce_window_sum reduce_window_max
            reduce_window_min select_and_scatter_add select_and_gather_add
            """
        ),
        window,
    ),
    **dict.fromkeys(
        _names(
            """
            scatter scatter-add scatter_add scatter-mul scatter_mul scatter-min
            scatter_min scatter-max scatter_max scatter-sub
            """
        ),
        _moves.scatter,
    ),
    "approx_top_k": top_k,
    "bitcast_convert_type": bitcast,
    "broadcast_in_dim": _moves.broadcast_in_dim,
    "concatenate": _moves.concatenate,
    "conv_general_dilated": conv,
    "dot_general": dot_general,
    "dynamic_slice": _moves.dynamic_slice,
    "dynamic_update_slice": _moves.dynamic_update_slice,
    "gather": _moves.gather,
    "iota": iota,
    "optimization_barrier": each,
    "pad": _moves.pad,
    "ragged_dot": ragged_dot,
    "ragged_dot_general": ragged_dot,
    "reshape": _moves.reshape,
    "rev": _moves.reverse,
    "slice": _moves.slice_,
    "split": _moves.split,
    "squeeze": _moves.squeeze,
    "stack": _moves.stack,
    "tile": _moves.tile,
    "top_k": top_k,
    "transpose": _moves.transpose,
    "unstack": _moves.unstack,
}
"""The rules by primitive."""
