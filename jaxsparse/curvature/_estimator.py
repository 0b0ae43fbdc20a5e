"""What the Fisher approximations share: sums over gradients, and when they are done."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import widest
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.curvature._trees import (
    STATIC,
    absolute_damping,
    check_finite,
    check_one_damping,
    for_each,
    gradient_leaves,
    leaves_at,
    paths_of_layouts,
    without_m,
)
from jaxsparse.tree import select


class Estimator(NamedTuple):
    """A Fisher approximation summed up over streamed gradients.

    Attributes:
      init: `init(params) -> sums`, for the parameters that take part.
      update: `update(sums, grads) -> sums`; grads has leaves `[m, *shape]`, any m.
      merge: `merge(sums, other) -> sums`, of two parts of the data. The order of
        merging changes rounding only.
      finalize: `finalize(sums, *, damping=None, rel_damping=None, donate=False) ->
        fisher`. The sums stay as they are, so a whole grid of dampings takes one pass
        over the data; with `donate`, blocks are inverted in the memory of their sums.
    """

    init: Callable[[PyTree], "Sums"]
    update: Callable[["Sums", PyTree], "Sums"]
    merge: Callable[["Sums", "Sums"], "Sums"]
    finalize: Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of outer products of gradients, in one of the approximations.

    Attributes:
      sums: for each parameter that takes part its statistics.
      count: the number of gradients summed up, int32.
      treedef: the structure of the gradients.
      layouts: for each parameter how its weights are laid out.
    """

    sums: tuple[Any, ...]
    count: Array
    treedef: Any = dataclasses.field(metadata=STATIC)
    layouts: tuple[Any, ...] = dataclasses.field(metadata=STATIC)
    paths = paths_of_layouts


class Form(NamedTuple):
    """What sets one approximation apart from another, of one parameter or of all."""

    layouts: Callable[[PyTree], tuple[Any, ...]]  # `layouts(params) -> layouts`
    zeros: Callable[..., Any]  # `zeros(w, layout=...) -> statistics` of no gradients
    # `add(statistics, g, layout=...) -> statistics`, of gradients `[m, *shape]` too;
    # None in the place of statistics for zeros
    add: Callable[..., Any]
    merge: Callable[[Any, Any], Any]  # `merge(statistics, other) -> statistics`
    # `largest(statistics)`, not finite where anything in them is not
    largest: Callable[[Any], Array]
    # `mean(sums, dtype) -> mean diagonal` of F over all weights with gradients
    mean: Callable[[Sums, Any], Array]
    finalize: Callable[..., Any]  # `finalize(sums, damping, donate=...) -> fisher`


def at_once(form: Form, grads: PyTree, damping: Any, rel_damping: Any) -> Any:
    """The approximation of gradients that are all there."""
    check_one_damping(damping, rel_damping)
    paths, leaves, m = gradient_leaves(grads)
    layouts = form.layouts(without_m(grads))
    summed = tuple(for_each(form.add, layouts, [None] * len(leaves), leaves))
    check_finite(paths, leaves, map(form.largest, summed))
    sums = Sums(summed, jnp.int32(m), jax.tree.structure(grads), layouts)
    return _finalize(form, sums, damping, rel_damping, donate=True)


def streamed(form: Form, where: Where) -> Estimator:
    """The approximation of gradients that arrive a few at a time."""
    _checks.check_where(where)

    def init(params: PyTree) -> Sums:
        keep = lambda w, taken: w if taken else None
        params = jax.tree.map(keep, params, select(params, where))
        layouts = form.layouts(params)
        zeros = tuple(for_each(form.zeros, layouts, jax.tree.leaves(params)))
        return Sums(zeros, jnp.int32(0), jax.tree.structure(params), layouts)

    def update(sums: Sums, grads: PyTree) -> Sums:
        gradient_leaves(grads)
        shapes = [layout.shape for layout in sums.layouts]
        leaves = leaves_at(grads, sums.paths, shapes, name="grads", extra=1)
        new = tuple(for_each(form.add, sums.layouts, sums.sums, leaves))
        check_finite(sums.paths, leaves, map(form.largest, new))
        count = sums.count + leaves[0].shape[0]
        return dataclasses.replace(sums, sums=new, count=count)

    def merge(sums: Sums, other: Sums) -> Sums:
        if (sums.treedef, sums.layouts) != (other.treedef, other.layouts):
            raise ValueError(
                "merge: the two sums are of other parameters, or in other blocks. Make "
                "both with one estimator."
            )
        together = tuple(map(form.merge, sums.sums, other.sums))
        return dataclasses.replace(sums, sums=together, count=sums.count + other.count)

    def finalize(
        sums: Sums,
        *,
        damping: float | Array | None = None,
        rel_damping: float | Array | None = None,
        donate: bool = False,
    ) -> Any:
        check_one_damping(damping, rel_damping)
        _checks.check_bool(donate=donate)
        if _checks.is_concrete(sums.count) and int(sums.count) == 0:
            raise ValueError("No gradients were summed up (m = 0): call update first.")
        return _finalize(form, sums, damping, rel_damping, donate=donate)

    return Estimator(init, update, merge, finalize)


def _finalize(form: Form, sums: Sums, damping, rel_damping, *, donate: bool) -> Any:
    stored = widest(jax.tree.leaves(sums.sums))
    mean = lambda: form.mean(sums, stored)
    damping = absolute_damping(damping, rel_damping, mean, stored)
    return form.finalize(sums, damping, donate=donate)
