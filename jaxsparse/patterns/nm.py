"""N:M masks by ranks: each weight counts who in its group beats it."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.patterns._counts import removed_count
from jaxsparse.patterns._spec import NM
from jaxsparse.ranking.keys import ordered_keys
from jaxsparse.tree import Axes


def check_removable(pattern: NM, sparsity: Any, *, path: str = "") -> None:
    """Raises if a sparsity removes more of a group than the pattern does."""
    most = pattern.of - pattern.keep
    if not _checks.is_concrete(sparsity):
        return
    if int(removed_count(sparsity, pattern.of)) > most:
        raise ValueError(
            f"{path and path + ': '}{pattern} removes at most {most} of {pattern.of}, "
            f"a sparsity of {pattern.sparsity:g}; asked for {float(sparsity):g}. Leave "
            "the sparsity out, or choose another pattern."
        )


def nm_mask(path: str, scores: Array, keep: Array, pattern: NM, axes: Axes) -> Array:
    """Keeps the `keep` best of every `pattern.of` weights along the input axes.

    A weight's rank is the number of others in its group that come before it: those
    with a larger score, and among equals those with a lower index. That takes
    `of * (of - 1)` comparisons, needs no sort and no communication, and fuses into one
    pass.
    """
    grouped, axis = group_inputs(path, scores, pattern, axes)
    keys = ordered_keys(grouped)
    members = [lax.index_in_dim(keys, i, axis) for i in range(pattern.of)]

    def rank(i: int) -> Array:
        ahead = [
            other >= members[i] if j < i else other > members[i]
            for j, other in enumerate(members)
            if j != i
        ]
        start = jnp.zeros(members[i].shape, jnp.int32)
        return sum((a.astype(jnp.int32) for a in ahead), start=start)

    kept = [rank(i) < keep for i in range(pattern.of)]
    mask = lax.concatenate(kept, axis)
    return ungroup_inputs(mask, scores.shape, pattern, axes)


def group_inputs(path: str, x: Array, pattern: NM, axes: Axes) -> tuple[Array, int]:
    """Splits the input axes of a kernel into groups of `pattern.of`."""
    of, shape = pattern.of, x.shape
    d_in = math.prod(shape[a] for a in axes.input)
    if d_in % of:
        raise ValueError(
            f"{path}: {pattern} needs a number of inputs that {of} divides, but shape "
            f"{tuple(shape)} with input axes {axes.input} has {d_in}. Leave this "
            "parameter out with `where`, or state other axes."
        )
    last = axes.input[-1]
    if shape[last] % of == 0:
        return x.reshape(*shape[:last], shape[last] // of, of, *shape[last + 1 :]), (
            last + 1
        )
    # Groups run over the end of the last input axis: take the input axes as one.
    rest = (*axes.output, *axes.batch)
    moved = x.transpose((*axes.input, *rest))
    return moved.reshape(d_in // of, of, *(shape[a] for a in rest)), 1


def ungroup_inputs(
    grouped: Array, shape: tuple[int, ...], pattern: NM, axes: Axes
) -> Array:
    """Undoes `group_inputs`, for a kernel of that shape."""
    if shape[axes.input[-1]] % pattern.of == 0:
        return grouped.reshape(shape)
    order = (*axes.input, *axes.output, *axes.batch)
    moved = grouped.reshape(tuple(shape[a] for a in order))
    return moved.transpose(tuple(order.index(a) for a in range(len(shape))))
