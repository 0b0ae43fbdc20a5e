"""Checks of what callers pass, with messages that say what to do instead."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxsparse._together import each
from jaxsparse._typing import PyTree


def is_concrete(x: Any) -> bool:
    """Whether the value of `x` can be looked at now (it is not a tracer).

    Returns:
      False under `jit`, `vmap` or `grad` and for `jax.ShapeDtypeStruct`.
    """
    return not isinstance(x, Tracer | jax.ShapeDtypeStruct)


def check_sparsity(sparsity: Any, *, name: str = "sparsity") -> None:
    """Raises unless `sparsity` is a number in [0, 1).

    Args:
      sparsity: a Python number, or a scalar array. Traced values pass: their value
        is not known yet.
      name: what the message calls it, for instance a parameter's path.

    Raises:
      TypeError: not a number.
      ValueError: outside [0, 1), NaN included.
    """
    if not is_concrete(sparsity):
        return
    if isinstance(sparsity, jax.Array | np.ndarray) and sparsity.ndim == 0:
        sparsity = float(sparsity)
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(
            f"{name} must be a number in [0, 1), the fraction of weights to remove; "
            f"got {sparsity!r} of type {type(sparsity).__name__}."
        )
    if not 0.0 <= float(sparsity) < 1.0:
        hint = ""
        if 1.0 <= float(sparsity) <= 100.0:
            hint = f" For {sparsity:g} % write {float(sparsity) / 100:g}."
        if math.isnan(float(sparsity)):
            hint = " A NaN here usually comes from a schedule that divides by zero."
        raise ValueError(
            f"{name} must lie in [0, 1): it is the fraction of weights to remove; "
            f"got {sparsity!r}.{hint}"
        )


def check_positive_int(value: Any, *, name: str, least: int = 1) -> None:
    """Raises unless `value` is an integer of at least `least`.

    Args:
      value: what the caller passed.
      name: the argument's name.
      least: the smallest value allowed.

    Raises:
      TypeError: not an integer.
      ValueError: too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_floating(path: str, x: Any) -> None:
    """Raises unless `x` is a real floating-point array.

    Args:
      path: the parameter's path, for the message.
      x: an array.

    Raises:
      TypeError: integers, bools or complex numbers.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{path}: scores must be real floating-point numbers, got {x.dtype}. "
            "Cast them, or leave this parameter out with `where`."
        )


def check_no_nan(named: Mapping[str, Any]) -> None:
    """Raises when a concrete array holds a NaN; traced arrays pass.

    Args:
      named: arrays by the paths of their parameters, for the message.

    Raises:
      ValueError: at least one NaN.
    """
    looked_at = {path: x for path, x in named.items() if is_concrete(x)}
    counts = jax.device_get(each(_nans, list(looked_at.values())))
    for (path, x), nans in zip(looked_at.items(), counts, strict=True):
        if nans:
            raise ValueError(
                f"{path}: {nans} of {x.size} scores are NaN, so an order of the "
                "weights does not exist. Look for NaN in the parameters or the "
                "gradients. (Under jit, where values cannot be looked at, NaN counts "
                "as the lowest score.)"
            )


@jax.jit
def _nans(x: Any) -> Any:
    return jnp.sum(jnp.isnan(x))


def same_structure(
    got: PyTree, expected: PyTree, *, name: str, of: str = "params"
) -> None:
    """Raises unless two trees have the same structure, naming what differs.

    Args:
      got: the tree that was passed.
      expected: the tree whose structure it must have.
      name: what the message calls `got`.
      of: what the message calls `expected`.

    Raises:
      ValueError: the structures differ.
    """
    if jax.tree.structure(got) == jax.tree.structure(expected):
        return

    def paths(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(p, simple=True, separator="/"): None for p, _ in leaves
        }

    got_paths, expected_paths = paths(got), paths(expected)
    missing = [p for p in expected_paths if p not in got_paths]
    extra = [p for p in got_paths if p not in expected_paths]
    said = []
    if missing:
        said.append(f"missing {_few(missing)}")
    if extra:
        said.append(f"not in {of} {_few(extra)}")
    if not said:
        said.append(
            f"the containers differ: {jax.tree.structure(got)} against "
            f"{jax.tree.structure(expected)}"
        )
    raise ValueError(
        f"{name} must have exactly the structure of {of}: {'; '.join(said)}. "
        f"Was {name} made for another model?"
    )


def _few(paths: list[str], most: int = 4) -> str:
    shown = ", ".join(repr(p) for p in paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
