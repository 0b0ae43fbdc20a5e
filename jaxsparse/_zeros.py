"""Whether a weight is zero, by its bits.

XLA on CPU reads subnormal numbers as zeros, so `w != 0` is False where a weight of
1e-40 is there. Bits are the same on every device: files, checksums and the counts of a
table see one thing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._typing import Array


def nonzero(w: Any) -> Array:
    """Where weights are not zero: their bits are neither those of 0.0 nor of -0.0."""
    x: Any = w if isinstance(w, np.ndarray | np.generic) else jnp.asarray(w)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return jnp.ones(x.shape, bool)
    if jnp.issubdtype(x.dtype, np.complexfloating):
        of_numpy = not isinstance(x, jax.Array)
        real, imag = (x.real, x.imag) if of_numpy else (lax.real(x), lax.imag(x))
        return nonzero(real) | nonzero(imag)
    # The least number of what is narrower than a byte is no subnormal where it is read.
    if not jnp.issubdtype(x.dtype, np.floating) or jnp.finfo(x.dtype).bits < 8:
        return x != np.zeros((), x.dtype)
    if isinstance(x, jax.Array):
        return _differs(x)
    return _unlike_zeros(np.asarray(x).view(f"u{x.dtype.itemsize}"), x.dtype)


@jax.jit
def _differs(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, np.dtype(f"u{x.dtype.itemsize}"))
    return _unlike_zeros(bits, x.dtype)


def _unlike_zeros(bits: Any, dtype: Any) -> Any:
    differs = [bits != zero for zero in _bits_of_zeros(np.dtype(dtype))]
    return functools.reduce(lambda a, b: a & b, differs, bits == bits)


@functools.cache
def _bits_of_zeros(dtype: np.dtype) -> tuple[Any, ...]:
    """Two of most types, one where there is no -0.0, none of float8_e8m0fnu."""
    zero = np.zeros((), dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    both = [x.view(unsigned)[()] for x in (zero, np.asarray(-zero)) if x == 0]
    return tuple(dict.fromkeys(both))
