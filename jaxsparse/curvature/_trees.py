"""Gradient trees: leaves `[m, *shape]`, None where a parameter takes no part."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import leaves_with_paths


def gradient_leaves(grads: PyTree) -> tuple[list[str], list[Any], int]:
    """The leaves of a tree of gradients, and how many gradients it holds.

    Args:
      grads: leaves `[m, *shape]`.

    Returns:
      Paths, leaves and m.

    Raises:
      ValueError: no leaves, no gradients, or leaves that disagree about m.
      TypeError: leaves that are not floating point.
    """
    named = leaves_with_paths(grads)
    if not named:
        raise ValueError(
            "grads: a tree without arrays. Does `where` leave every parameter out?"
        )
    for path, g in named:
        _checks.check_floating(path, g)
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


def leaves_at(tree: PyTree, paths: tuple[str, ...], *, name: str) -> list[Any]:
    """The leaves of a tree at given paths.

    Args:
      tree: has a leaf at each of `paths`, and possibly more.
      paths: of the parameters that take part.
      name: what the message calls `tree`.

    Returns:
      Leaves, in the order of `paths`.

    Raises:
      ValueError: a path is missing.
    """
    found = dict(leaves_with_paths(tree))
    missing = [path for path in paths if path not in found]
    if missing:
        raise ValueError(
            f"{name} lacks {missing[:4]}, which the gradients were taken for. Was it "
            "made for another model, or with another `where`?"
        )
    return [found[path] for path in paths]


def check_shapes(paths, shapes, leaves, *, name: str, extra: int = 0) -> None:
    """Raises unless leaves have given shapes after their first `extra` axes.

    Args:
      paths: of the leaves.
      shapes: of the parameters.
      leaves: arrays.
      name: what the message calls the tree of `leaves`.
      extra: how many leading axes they have besides.

    Raises:
      ValueError: another shape.
    """
    for path, shape, x in zip(paths, shapes, leaves, strict=True):
        if jnp.shape(x)[extra:] != tuple(shape):
            raise ValueError(
                f"{path}: {name} has shape {jnp.shape(x)}, expected "
                f"{('m',) * extra + tuple(shape)}. Was it made for another model?"
            )


def check_damping(damping: Any, *, name: str = "damping") -> None:
    """Raises unless a damping is a positive number; a traced one passes.

    Args:
      damping: what the caller passed.
      name: the argument's name.

    Raises:
      ValueError: zero, negative or not finite.
      TypeError: no number.
    """
    if not _checks.is_concrete(damping):
        return
    if isinstance(damping, jax.Array | np.ndarray | np.generic) and damping.ndim == 0:
        damping = float(damping)
    if isinstance(damping, bool) or not isinstance(damping, numbers.Real):
        raise TypeError(f"{name} must be a positive number, got {damping!r}.")
    if not 0 < float(damping) < float("inf"):
        raise ValueError(
            f"{name} must be positive, got {damping!r}: with fewer gradients than "
            "weights the Fisher matrix is singular without it. 1e-7 to 1e-4 is usual; "
            "rel_damping=1e-3 follows the scale of the gradients."
        )


def check_one_damping(damping: Any, rel_damping: Any) -> None:
    """Raises unless exactly one kind of damping is given, and is positive.

    Args:
      damping: absolute, or None.
      rel_damping: relative to the mean diagonal, or None.

    Raises:
      ValueError: both, neither, or one that is not positive.
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


def check_finite(paths, grads, sums) -> None:
    """Raises, in eager use, when statistics of gradients are not finite.

    Args:
      paths: of the parameters.
      grads: leaves `[m, *shape]`, to say which gradient it was.
      sums: for each leaf an array that is finite if all its gradients are.

    Raises:
      ValueError: NaN or Inf, with the path and the first gradient that holds it.
    """
    for path, g, s in zip(paths, grads, sums, strict=True):
        if not _checks.is_concrete(s) or bool(jnp.all(jnp.isfinite(s))):
            continue
        axes = tuple(range(1, g.ndim))
        bad = np.flatnonzero(~np.asarray(jnp.all(jnp.isfinite(g), axis=axes)))
        if not bad.size:
            raise ValueError(
                f"{path}: the squares of the gradients leave the range of {s.dtype}. "
                "Scale the loss down."
            )
        raise ValueError(
            f"{path}: {bad.size} of {g.shape[0]} gradients hold NaN or Inf, the first "
            f"is number {bad[0]}. Look at the loss on that part of the data."
        )


def check_factor(path: str, diagonal: Array, damping: Any) -> None:
    """Raises, in eager use, when a factorisation failed.

    Args:
      path: the parameter's path, or what else was factored.
      diagonal: that of the factor, NaN where the matrix was not positive definite.
      damping: what was added to the diagonal.

    Raises:
      ValueError: how many factors failed, and what would help.
    """
    if not _checks.is_concrete(diagonal):
        return
    failed = ~jnp.all(jnp.isfinite(diagonal), axis=-1)
    count = int(jnp.sum(failed))
    if count:
        raise ValueError(
            f"{path}: {count} of {max(failed.size, 1)} Fisher matrices could not be "
            f"factored: with damping {float(damping):.3g} rounding leaves them "
            "indefinite, since their largest eigenvalue is too many times the damping. "
            "Raise the damping (a factor of 10 costs little), or let accurate=True "
            "factor in float64."
        )
