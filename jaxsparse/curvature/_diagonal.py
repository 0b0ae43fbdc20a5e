"""The diagonal of the empirical Fisher matrix: the cheapest curvature."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import widest
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.curvature._estimator import Estimator, Sums, merge_by
from jaxsparse.curvature._trees import (
    absolute_damping,
    check_finite,
    check_one_damping,
    gradient_leaves,
    leaves_at,
    mean_diagonal,
)
from jaxsparse.tree import leaves_with_paths, select


@dataclasses.dataclass(frozen=True)
class Plain:
    """A parameter that is not cut into anything.

    Attributes:
      path: its path.
      shape: its shape.
    """

    path: str
    shape: tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["diagonals", "damping"],
    meta_fields=["treedef", "layouts"],
)
@dataclasses.dataclass(frozen=True)
class DiagonalFisher:
    """The diagonal of a damped Fisher matrix.

    Attributes:
      diagonals: for each parameter `F_qq`, damping included, of its shape.
      damping: what was added, a scalar.
      treedef: the structure of the gradients.
      layouts: the parameters' paths and shapes.
    """

    diagonals: tuple[Array, ...]
    damping: Array
    treedef: Any
    layouts: tuple[Plain, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the parameters that take part."""
        return tuple(layout.path for layout in self.layouts)


def diagonal_fisher(
    grads: PyTree,
    *,
    damping: float | Array | None = None,
    rel_damping: float | Array | None = None,
) -> DiagonalFisher:
    """The diagonal of the empirical Fisher matrix.

    `F_qq = (1/m) sum_i g_iq^2 + damping`: with it the scores are those of Optimal Brain
    Damage (LeCun, Denker & Solla, 1989), whose Hessian diagonal it stands for, and
    pruning changes no other weight.

    Args:
      grads: leaves `[m, *shape]`, as `per_example_grads` makes them.
      damping: added to the diagonal.
      rel_damping: instead of it a factor for the mean diagonal of the weights that have
        gradients.

    Returns:
      A `DiagonalFisher`.

    Raises:
      ValueError: no gradients, gradients with NaN or Inf (in eager use), a damping that
        is not positive.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 3.0], [1.0, 1.0]])}
      >>> js.curvature.diagonal_fisher(grads, damping=1.0).diagonals
      (Array([2., 6.], dtype=float32),)
    """
    _, leaves, m = gradient_leaves(grads)
    check_one_damping(damping, rel_damping)
    shapes = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads)
    summed = tuple(map(_squares, leaves))
    check_finite([p for p, _ in leaves_with_paths(grads)], leaves, summed)
    sums = Sums(summed, jnp.int32(m), jax.tree.structure(grads), _layouts(shapes))
    return _finalize(sums, damping=damping, rel_damping=rel_damping)


def diagonal_estimator(*, where: Where = None) -> Estimator:
    """`diagonal_fisher` over gradients that arrive a few at a time and are not kept.

    Args:
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      An `Estimator`; its `finalize` gives a `DiagonalFisher`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> estimator = js.curvature.diagonal_estimator()
      >>> sums = estimator.init({"w": jnp.zeros((1, 2))})
      >>> for g in jnp.array([[1.0, 3.0], [1.0, 1.0]]):
      ...     sums = estimator.update(sums, {"w": g.reshape(1, 1, 2)})
      >>> estimator.finalize(sums, damping=1.0).diagonals
      (Array([[2., 6.]], dtype=float32),)
    """
    _checks.check_where(where)

    def init(params: PyTree) -> Sums:
        keep = lambda w, taken: w if taken else None
        params = jax.tree.map(keep, params, select(params, where))
        zeros = lambda w: jnp.zeros_like(w, dtype=widest([w]))
        zeros = tuple(map(zeros, jax.tree.leaves(params)))
        return Sums(zeros, jnp.int32(0), jax.tree.structure(params), _layouts(params))

    def update(sums: Sums, grads: PyTree) -> Sums:
        gradient_leaves(grads)
        shapes = [layout.shape for layout in sums.layouts]
        leaves = leaves_at(grads, sums.paths, shapes, name="grads", extra=1)
        parts = zip(sums.sums, map(_squares, leaves), strict=True)
        new = tuple(s + part.astype(s.dtype) for s, part in parts)
        check_finite(sums.paths, leaves, new)
        return dataclasses.replace(
            sums, sums=new, count=sums.count + leaves[0].shape[0]
        )

    return Estimator(init, update, merge_by(jnp.add), _finalize)


@jax.jit
def _squares(g: Array) -> Array:
    return jnp.sum(jnp.square(g.astype(widest([g]))), axis=0)


def _layouts(params: PyTree) -> tuple[Plain, ...]:
    return tuple(Plain(path, tuple(w.shape)) for path, w in leaves_with_paths(params))


def _finalize(
    sums: Sums,
    *,
    damping: float | Array | None = None,
    rel_damping: float | Array | None = None,
) -> DiagonalFisher:
    check_one_damping(damping, rel_damping)
    if _checks.is_concrete(sums.count) and int(sums.count) == 0:
        raise ValueError("No gradients were summed up (m = 0): call update first.")
    means = [s / sums.count.astype(s.dtype) for s in sums.sums]
    stored = widest(means)
    mean = lambda: mean_diagonal(means, stored)
    damping = absolute_damping(damping, rel_damping, mean, stored)
    diagonals = tuple(d + damping.astype(d.dtype) for d in means)
    return DiagonalFisher(diagonals, damping, sums.treedef, sums.layouts)
