"""The diagonal of the empirical Fisher matrix: the cheapest curvature."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._dtypes import widest
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.curvature import dispatch
from jaxsparse.curvature._estimator import Estimator, Form, Sums, at_once, streamed
from jaxsparse.curvature._trees import STATIC, mean_diagonal, paths_of_layouts
from jaxsparse.tree import leaves_with_paths


@dataclasses.dataclass(frozen=True)
class Plain:
    """A parameter that is not cut into anything."""

    path: str
    shape: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalFisher:
    """The diagonal of a damped Fisher matrix.

    Attributes:
      diagonals: for each parameter `F_qq`, damping included, of its shape.
      damping: the number added to the diagonal, a scalar.
      treedef: the structure of the gradients.
      layouts: the parameters' paths and shapes.
    """

    diagonals: tuple[Array, ...]
    damping: Array
    treedef: Any = dataclasses.field(metadata=STATIC)
    layouts: tuple[Plain, ...] = dataclasses.field(metadata=STATIC)
    paths = paths_of_layouts


def diagonal_fisher(
    grads: PyTree,
    *,
    damping: float | Array | None = None,
    rel_damping: float | Array | None = None,
) -> DiagonalFisher:
    """Estimate the diagonal of the empirical Fisher matrix.

    `F_qq = (1/m) sum_i g_iq^2 + damping` stands for the diagonal of the Hessian. With
    it the scores are those of Optimal Brain Damage (LeCun, Denker & Solla, 1989), and
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
    return at_once(_FORM, grads, damping, rel_damping)


def diagonal_estimator(*, where: Where = None) -> Estimator:
    """Build `diagonal_fisher` from gradients that arrive a few at a time.

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
    return streamed(_FORM, where)


@jax.jit
def _squares(g: Array) -> Array:
    return jnp.sum(jnp.square(g.astype(widest([g]))), axis=0)


def _add(total: Array | None, g: Array, **_: Plain) -> Array:
    return _squares(g) if total is None else total + _squares(g).astype(total.dtype)


def _layouts(params: PyTree) -> tuple[Plain, ...]:
    return tuple(Plain(path, tuple(w.shape)) for path, w in leaves_with_paths(params))


def _means(sums: Sums) -> list[Array]:
    return [total / sums.count.astype(total.dtype) for total in sums.sums]


def _finalize(sums: Sums, damping: Array, **_: bool) -> DiagonalFisher:
    diagonals = tuple(d + damping.astype(d.dtype) for d in _means(sums))
    return DiagonalFisher(diagonals, damping, sums.treedef, sums.layouts)


_FORM = Form(
    layouts=_layouts,
    zeros=lambda w, layout: jnp.zeros_like(w, dtype=widest([w])),
    add=_add,
    merge=jnp.add,
    largest=lambda s: s,
    mean=lambda sums, stored: mean_diagonal(_means(sums), stored),
    finalize=_finalize,
)


# What it answers.


@dispatch.ihvp.register
def _(fisher: DiagonalFisher, xs: list[Array]) -> list[Array]:
    parts = zip(fisher.diagonals, xs, strict=True)
    return [x.astype(d.dtype) / d for d, x in parts]


@dispatch.inverse_diagonal.register
def _(fisher: DiagonalFisher) -> list[Array]:
    return [1 / d for d in fisher.diagonals]


@dispatch.restrict.register
def _(fisher: DiagonalFisher, masks: list[Array], *, donate: bool) -> DiagonalFisher:
    del donate
    apart = lambda d, kept: jnp.where(kept, d, fisher.damping.astype(d.dtype))
    diagonals = tuple(map(apart, fisher.diagonals, masks))
    return dataclasses.replace(fisher, diagonals=diagonals)


@dispatch.eliminate.register
def _(
    fisher: DiagonalFisher, ws: list[Array], removed: list[Array], kept: list[Array]
) -> list[Array]:
    del kept
    gone = lambda d, w, q: jnp.where(q, -w.astype(d.dtype), jnp.zeros((), d.dtype))
    return list(map(gone, fisher.diagonals, ws, removed))
