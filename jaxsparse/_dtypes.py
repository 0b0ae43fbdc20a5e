"""Types to compute in (float32 at least, under any promotion rules) and to count in."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array


def wide_dtype(*dtypes: Any) -> np.dtype:
    """The widest of some types, float32 at least; integers and bools do not count."""
    floating = (np.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.inexact))
    return max([np.dtype(np.float32), *floating], key=lambda dtype: dtype.itemsize)


def widest(arrays: Iterable[Any]) -> np.dtype:
    """The `wide_dtype` of some arrays."""
    return wide_dtype(*(x.dtype for x in arrays))


def as_wide(x: Array) -> Array:
    """An array in its `wide_dtype`."""
    return x.astype(wide_dtype(x.dtype))


def widen(x: Array) -> Array:
    """The same for numbers of less than 32 bits; all other arrays as they are."""
    low = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize < 4
    return as_wide(x) if low else x


def count_dtype(n: int) -> type[np.signedinteger]:
    """The integer type in which `n` can be counted; an error where JAX has it off."""
    if n < 2**31:
        return np.int32
    if jnp.result_type(int) != jnp.int64:
        raise ValueError(
            f"{n:,} weights compete in one group, more than int32 can count. Set "
            "jax_enable_x64, or let fewer compete: js.Unstructured(scope='layer')."
        )
    return np.int64
