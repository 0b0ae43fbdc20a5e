"""What the samples or tokens of a batch count: checked, and found for each row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.tracing import Trace
from jaxsparse.tracing.kernels import Reading


def batch_weight(
    weight: Callable[..., Any] | None, inputs: tuple[Any, ...], number: int
) -> Array | None:
    """What a batch's samples or tokens count."""
    if weight is None:
        return None
    _checks.check_callable(len(inputs), weight=weight)
    with _checks.explained("weight", inputs=inputs):
        found = jnp.asarray(weight(*inputs))
    shape = next((jnp.shape(x) for x in jax.tree.leaves(inputs) if jnp.ndim(x)), ())
    if not found.ndim or found.shape != shape[: found.ndim]:
        raise ValueError(
            f"weight: for batch {number}, whose first input has shape {shape}, it gave "
            f"an array of shape {found.shape}. It must give one number for each "
            f"sample, {shape[:1]}, or for each index of more of the leading axes, such "
            "as [batch, tokens]."
        )
    if jnp.issubdtype(found.dtype, jnp.complexfloating):
        raise TypeError(f"weight: it must give real numbers, got {found.dtype}.")
    wide = found.dtype == jnp.float64
    found = found.astype(jnp.float64 if wide else jnp.float32)
    if _checks.is_concrete(found) and found.size:
        least, most = float(jnp.min(found)), float(jnp.max(found))
        if not 0 <= least <= most < np.inf:
            raise ValueError(
                "weight: it must give finite numbers of at least 0; for batch "
                f"{number} they lie between {least:g} and {most:g}."
            )
    return found


def weight_of_rows(trace: Trace, reading: Reading, weight: Any) -> np.ndarray:
    """For each row of inputs which entry of the flat weight is its own."""
    places = reading.samples(trace.leading[: weight.ndim])
    if np.any(places < 0):
        what = "sample (the first axis of the first input)"
        if weight.ndim > 1:
            what = f"index along the first {weight.ndim} axes of the first input"
        raise ValueError(
            f"weight: its shape is {weight.shape}, but {np.sum(places < 0)} of the "
            f"{places.size} rows of inputs at {reading.site.source} do not each belong "
            f"to one {what}, so they cannot be weighted: the operand there has shape "
            f"{tuple(d.size for d in reading.site.input_dims)}. Give one number for "
            "each sample, leave the kernel out with `where`, or give no `weight`."
        )
    return places
