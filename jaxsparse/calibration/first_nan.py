"""Where the first NaN or Inf of a calibration is: a parameter, a batch or the model."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._host import on_host
from jaxsparse._typing import Array


def check_params(
    paths: Sequence[str], leaves: Sequence[Any], kernels: Collection[str]
) -> None:
    """Raises where a parameter is no number.

    Inf is an error in kernels alone: a constant mask that is added to attention scores
    may hold it.
    """
    for path, (nans, infs) in _counts(paths, leaves).items():
        if nans or (infs and path in kernels):
            raise ValueError(
                f"{path}: {nans} of its entries are NaN and {infs} are Inf, so nothing "
                "that is calculated with it can be relied on. Repair the parameter, or "
                "load it again."
            )


def check_batch(inputs: tuple[Any, ...], number: int) -> None:
    """Raises where a batch has no rows."""
    named: dict[str, Any] = {f"batches[{number}]": inputs}
    _checks.check_arrays(**named)
    shape = next((jnp.shape(x) for x in jax.tree.leaves(inputs) if jnp.ndim(x)), (1,))
    if 0 in shape:
        raise ValueError(
            f"batches: batch {number} is empty, its first input has shape {shape}. "
            "Leave it out: what no rows are seen of can only be pruned blindly."
        )


@jax.jit
def finite(states: Any) -> Array:
    """Whether each of some statistics is finite."""
    one = lambda s: jnp.all(jnp.isfinite(s.mean)) & jnp.all(jnp.isfinite(s.squares))
    return jnp.stack([one(state) for state in states])


def input_flags(inputs: Any) -> Array:
    """How many entries of each array of a batch are NaN or Inf."""
    return jnp.stack([sum(_of_leaf(x)) for x in jax.tree.leaves(inputs)])


def not_finite(
    path: str,
    number: int,
    bad_inputs: Any,
    paths: Sequence[str],
    leaves: Sequence[Any],
) -> ValueError:
    """The error for a kernel whose inputs are NaN or Inf."""
    said = f"batch {number}: the inputs of {path} hold NaN or Inf"
    bad_inputs = on_host(bad_inputs)
    bad = np.flatnonzero(bad_inputs)
    if len(bad):
        return ValueError(
            f"{said}, because array {bad[0]} of the batch does: "
            f"{int(bad_inputs[bad[0]])} entries. Leave the batch out, or "
            "repair it."
        )
    wrong = [p for p, (nans, infs) in _counts(paths, leaves).items() if nans + infs]
    if wrong:
        return ValueError(f"{said}, and so does the parameter {wrong[0]}. Repair it.")
    return ValueError(
        f"{said}, though the batch and all parameters are finite: it is the model that "
        "divides by 0 or overflows before it, or the squares of what it gives are more "
        "than the type holds."
    )


def _counts(paths: Sequence[str], leaves: Sequence[Any]) -> dict[str, tuple[int, int]]:
    """NaNs and Infs by path, of those that have some and can be looked at."""
    known = [
        (path, x)
        for path, x in zip(paths, leaves, strict=True)
        if _checks.is_concrete(x) and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if not known:
        return {}
    finite = _finite([x for _, x in known])
    if not _checks.is_concrete(finite):
        return {}
    whole = on_host(finite).tolist()
    wrong = [each for each, fine in zip(known, whole, strict=True) if not fine]
    if not wrong:
        return {}
    counts = on_host(_count([x for _, x in wrong])).tolist()
    pairs = zip(wrong, counts, strict=True)
    return {path: (nans, infs) for (path, _), (nans, infs) in pairs}


@jax.jit
def _finite(leaves: list[Array]) -> Array:
    """Whether each array is, without scratch: counts take that of two arrays."""
    most = lambda x: jnp.max(jnp.abs(as_wide(jnp.asarray(x))), initial=0)
    return jnp.stack([jnp.isfinite(most(x)) for x in leaves])


@jax.jit
def _count(leaves: list[Array]) -> Array:
    return jnp.stack([jnp.stack(_of_leaf(x)) for x in leaves])


def _of_leaf(x: Any) -> tuple[Array, Array]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    wide = as_wide(x)
    count = lambda flags: jnp.sum(flags, dtype=jnp.int32)
    return count(jnp.isnan(wide)), count(jnp.isinf(wide))
