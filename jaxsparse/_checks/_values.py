"""Checks of numbers and of what arrays hold."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxsparse._together import each


def is_concrete(x: Any) -> bool:
    """Whether the value of `x` can be looked at now (it is not a tracer)."""
    return not isinstance(x, Tracer | jax.ShapeDtypeStruct)


def shown(value: Any) -> str:
    """A value in a message: short, and with its kind."""
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if value is None else f"{text} of type {type(value).__name__}"


def check_sparsity(sparsity: Any, *, name: str = "sparsity") -> None:
    """Raises unless `sparsity` is a number in [0, 1)."""
    if not is_concrete(sparsity):
        return
    sparsity = _scalar(sparsity)
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(
            f"{name} must be a number in [0, 1), the fraction of weights to remove; "
            f"got {sparsity!r} of type {type(sparsity).__name__}."
        )
    if not 0.0 <= float(sparsity) < 1.0:
        hint = ""
        if float(sparsity) == 1.0:
            hint = " All weights cannot go: leave some, or take the layer out."
        elif 1.0 < float(sparsity) <= 100.0:
            hint = f" For {sparsity:g} % write {float(sparsity) / 100:g}."
        if math.isnan(float(sparsity)):
            hint = " A NaN here usually comes from a schedule that divides by zero."
        raise ValueError(
            f"{name} must lie in [0, 1): it is the fraction of weights to remove; "
            f"got {sparsity!r}.{hint}"
        )


def check_positive_int(value: Any, *, name: str, least: int = 1) -> None:
    """Raises unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_number(
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    **values: Any,
) -> None:
    """Raises unless each value is a number within bounds; traced ones pass."""
    for name, value in values.items():
        check_scalar(**{name: value})
        if not is_concrete(value):
            continue
        x = float(value)
        if not (least <= x <= most and above < x < below):
            raise ValueError(
                f"{name} must {_within(least, above, most, below)}, got {value!r}."
            )


def _within(least: float, above: float, most: float, below: float) -> str:
    low = f"[{least:g}" if math.isfinite(least) else f"({above:g}"
    high = f"{most:g}]" if math.isfinite(most) else f"{below:g})"
    if math.isfinite(max(least, above)) and math.isfinite(min(most, below)):
        return f"lie in {low}, {high}"
    if above == 0:
        return "be positive"
    if math.isfinite(least):
        return f"be at least {least:g}"
    return "be a finite number"


def check_scalar(**values: Any) -> None:
    """Raises unless each value is a real number of any size; traced ones pass."""
    for name, value in values.items():
        if not is_concrete(value):
            continue
        number = _scalar(value)
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise TypeError(f"{name} must be a number, got {shown(value)}.")


def _scalar(value: Any) -> Any:
    """A number out of an array that holds just one; anything else as it is."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if is_array and value.ndim == 0 and np.dtype(value.dtype).kind in "fiuV":
        return float(value)
    return value


def check_floating(path: str, x: Any) -> None:
    """Raises unless `x` is a real floating-point array."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{path}: scores must be real floating-point numbers, got {x.dtype}. "
            "Cast them, or leave this parameter out with `where`."
        )


def check_all_numbers(**trees: Any) -> None:
    """Raises when a concrete tree of arrays holds a NaN; traced ones pass."""
    for name, tree in trees.items():
        known = [
            (keys, x)
            for keys, x in jax.tree_util.tree_leaves_with_path(tree)
            if is_concrete(x) and jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        counts = _nan_counts([x for _, x in known])
        for (keys, x), nans in zip(known, counts, strict=True):
            if nans:
                path = jax.tree_util.keystr(keys, simple=True, separator="/")
                raise ValueError(
                    f"{path or name}: {nans} of the {x.size} entries of {name} are "
                    "NaN. Look at the loss and the data of this step."
                )


def check_no_nan(named: Mapping[str, Any]) -> None:
    """Raises when a concrete array of scores holds a NaN; traced arrays pass."""
    known = {path: x for path, x in named.items() if is_concrete(x)}
    counts = _nan_counts(list(known.values()))
    for (path, x), nans in zip(known.items(), counts, strict=True):
        if nans:
            raise ValueError(
                f"{path}: {nans} of {x.size} scores are NaN, so an order of weights "
                "does not exist. Look for NaN in the parameters or the gradients. "
                "(Under jit, where values cannot be looked at, NaN counts as the "
                "lowest score.)"
            )


def _nan_counts(arrays: Sequence[Any]) -> list[int]:
    """How many entries of each array are NaN, in few programs and one transfer."""
    found = each(_any_nan, arrays)
    if not all(map(is_concrete, found)):
        return [0] * len(found)  # constants of a function that is traced
    some = jax.device_get(found)
    return [int(_nans(x)) if s else 0 for x, s in zip(arrays, some, strict=True)]


@jax.jit
def _any_nan(x: Any) -> Any:
    # A maximum of bytes: for a sum XLA on CPU makes an array of integers, as large as
    # all that is looked at, and takes ten times as long.
    return jnp.max(jnp.isnan(x).astype(jnp.uint8), initial=0)


@jax.jit
def _nans(x: Any) -> Any:
    return jnp.sum(jnp.isnan(x), dtype=jnp.int32)
