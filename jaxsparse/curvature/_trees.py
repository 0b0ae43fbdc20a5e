"""Gradient trees: leaves `[m, *shape]`, None where a parameter takes no part."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._host import on_host
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import leaves_with_paths

STATIC = {"static": True}
"""Marks the fields of a pytree that are no arrays."""

paths_of_layouts: Any = property(
    lambda self: tuple(layout.path for layout in self.layouts),
    doc="The paths of the parameters that take part.",
)


def gradient_leaves(grads: PyTree) -> tuple[list[str], list[Any], int]:
    """The leaves of a tree of gradients, and how many gradients it holds."""
    _checks.check_arrays(grads=grads)
    named = leaves_with_paths(grads)
    if not named:
        raise ValueError(
            "grads: a tree without arrays. Does `where` leave every parameter out?"
        )
    for path, g in named:
        check_real(path, g)
        if g.ndim < 1:
            raise ValueError(
                f"{path}: gradients need a leading axis that numbers them, shape "
                "(m, *parameter); got a scalar. See js.curvature.per_example_grads."
            )
        if g.shape[0] == 0:
            raise ValueError(f"{path}: no gradients, shape {tuple(g.shape)} (m = 0).")
        if g.shape[0] != named[0][1].shape[0]:
            raise ValueError(
                f"grads: {named[0][0]} holds {named[0][1].shape[0]} gradients, {path} "
                f"holds {g.shape[0]}. The leading axis m must be the same everywhere."
            )
    return [path for path, _ in named], [g for _, g in named], named[0][1].shape[0]


def without_m(grads: PyTree) -> PyTree:
    """Shapes and types of what the gradients are of."""
    return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads)


def for_each(
    f: Callable[..., Any], layouts: Iterable[Any], *columns: Any, **options: Any
) -> list[Any]:
    """`f(*arrays, layout=layout, **options)` for one parameter after another."""
    rows = zip(layouts, *columns, strict=True)
    return [f(*arrays, layout=layout, **options) for layout, *arrays in rows]


def check_real(path: str, x: Any) -> None:
    """Raises unless `x` is an array of which there are gradients."""
    dtype = getattr(x, "dtype", type(x))
    if not jnp.issubdtype(dtype, jnp.floating) or not hasattr(x, "ndim"):
        raise TypeError(
            f"{path}: gradients are arrays of real floating-point numbers, of such "
            f"parameters; got {dtype}. Leave this parameter out with `where`."
        )


def leaves_at(
    tree: PyTree,
    paths: tuple[str, ...],
    shapes: Iterable[tuple[int, ...]] | None = None,
    *,
    name: str,
    extra: int = 0,
) -> list[Any]:
    """The leaves of a tree at given paths."""
    _checks.check_arrays(**{name: tree})
    found = dict(leaves_with_paths(tree))
    missing = [path for path in paths if path not in found]
    if missing:
        raise ValueError(
            f"{name} lacks {missing[:4]}, which the gradients were taken for. Was it "
            "made for another model, or with another `where`?"
        )
    for path, shape in zip(paths, shapes, strict=True) if shapes else ():
        options: Any = {"name": name, "of": "the parameter", "extra": extra}
        _checks.check_shape(path, found[path], shape, **options)
    return [found[path] for path in paths]


def check_damping(damping: Any, *, name: str = "damping") -> None:
    """Raises unless a damping is a positive number; a traced one passes."""
    if not _checks.is_concrete(damping):
        return
    _checks.check_scalar(**{name: damping})
    if not 0 < float(damping) < float("inf"):
        raise ValueError(
            f"{name} must be positive, got {damping!r}: with fewer gradients than "
            "weights the Fisher matrix is singular without it. 1e-7 to 1e-4 is usual; "
            "rel_damping=1e-3 follows the scale of the gradients."
        )


def check_one_damping(damping: Any, rel_damping: Any) -> None:
    """Raise an error unless exactly one damping is given, and is positive.

    Args:
      damping: absolute, or None.
      rel_damping: relative to the mean diagonal, or None.

    Raises:
      ValueError: both, neither, or one that is not positive.

    Example:
      >>> import jaxsparse as js
      >>> js.curvature.check_one_damping(1e-7, None)
      >>> js.curvature.check_one_damping(None, 0.0)
      Traceback (most recent call last):
        ...
      ValueError: rel_damping must be positive, got 0.0: ...
    """
    if (damping is None) == (rel_damping is None):
        raise ValueError(
            "Pass either damping (absolute) or rel_damping (times the mean diagonal of "
            f"the Fisher matrix); got {damping=}, {rel_damping=}."
        )
    if damping is None:
        check_damping(rel_damping, name="rel_damping")
    else:
        check_damping(damping)


def absolute_damping(
    damping: Any, rel_damping: Any, mean: Callable[[], Array], dtype: Any
) -> Array:
    """The damping, whichever kind was given."""
    if damping is None:
        scalar = jnp.asarray(rel_damping, dtype) * mean().astype(dtype)
    else:
        scalar = jnp.asarray(damping, dtype)
    if _checks.is_concrete(scalar) and float(scalar) == 0:
        raise ValueError(
            f"With {damping=}, {rel_damping=} the damping is 0 in {scalar.dtype}: too "
            "small, or all gradients are 0. Pass a larger damping."
        )
    return scalar


def mean_diagonal(diagonals: Iterable[Array], dtype: Any) -> Array:
    """The mean over the weights that have gradients."""
    parts = [(jnp.sum(d), jnp.sum(d > 0, dtype=jnp.int32)) for d in diagonals]
    add = lambda xs: functools.reduce(jnp.add, [x.astype(dtype) for x in xs])
    total, count = map(add, zip(*parts, strict=True))
    return total / jnp.maximum(count, 1)


@jax.jit
def largest_number(x: Array) -> Array:
    """The largest number by size; NaN or Inf if there is one."""
    return jnp.max(jnp.abs(x))


def check_finite(paths, grads, sums) -> None:
    """Raises, in eager use, when statistics of gradients are not finite."""
    finite = lambda s: not _checks.is_concrete(s) or not int(_not_finite(s))
    parts = zip(paths, grads, sums, strict=True)
    suspect = [(path, g) for path, g, s in parts if not finite(s)]
    for path, g in suspect:
        axes = tuple(range(1, g.ndim))
        bad = np.flatnonzero(~on_host(jnp.all(jnp.isfinite(g), axis=axes)))
        if bad.size:
            raise ValueError(
                f"{path}: {bad.size} of {g.shape[0]} gradients hold NaN or Inf, the "
                f"first is number {bad[0]}. Look at the loss on that part of the data."
            )
    if suspect:
        raise ValueError(
            f"{suspect[0][0]}: the squares of the gradients leave the range of "
            "float32. Scale the loss down."
        )


def check_factor(
    path: str,
    diagonal: Array,
    damping: Any,
    largest: Callable[[], Any],
    *,
    accurate: bool,
) -> None:
    """Raises, in eager use, when a factorization failed."""
    if not _checks.is_concrete(diagonal):
        return
    count = int(_not_finite(diagonal))
    if not count:
        return
    damping, top = float(damping), float(largest())
    # As much as rounding the sums, of 48 bits or 24, can add up to in n columns.
    enough = top * diagonal.shape[-1] * 2.0 ** (-44 if accurate else -20)
    instead = "" if accurate else ", or accurate=True"
    raise ValueError(
        f"{path}: {count} of {diagonal[..., 0].size} Fisher matrices could not be "
        f"factored. The largest eigenvalue is {top:.2g} or more, the damping "
        f"{damping:.2g}: a condition number of {top / damping:.0e}, beyond "
        f"{'float64' if accurate else 'float32'}. Take damping={enough:.0e}{instead}."
    )


@jax.jit
def _not_finite(x: Array) -> Array:
    """How many rows hold NaN or Inf."""
    rows = jnp.all(jnp.isfinite(jnp.atleast_1d(x)), axis=-1)
    return jnp.sum(~rows, dtype=jnp.int32)
