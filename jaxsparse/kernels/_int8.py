"""Products with int8 weights in plain JAX, to the bits of the compiled kernel.

Rounded activations times rounded weights are integers, and their sums are exact in any
order. So every platform gets the same sums, and the same result to the last bit where
float32 is rounded alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._platform import on_cpu
from jaxsparse._typing import Array
from jaxsparse.formats import Int8Tiles
from jaxsparse.formats.dense import integers_of
from jaxsparse.kernels._native_calls import no_int8_gradient

_EXACT = 1024  # inputs whose products float32 adds up exactly: 127 * 128 * 1024 < 2^24
_LEAST = 1e-37  # a smaller scale has no inverse


@jax.custom_vjp
def int8_product(x: Array, packed: Int8Tiles) -> Array:
    """float32 `[rows, d_out]` of float32 `[rows, d_in]` and one layer."""
    whole, scale = rounded(x)
    sums = on_cpu(_sums_of_parts, _sums, whole, integers_of(packed))
    return sums.astype(jnp.float32) * (scale * packed.scale[None])


int8_product.defvjp(no_int8_gradient, no_int8_gradient)


def rounded(x: Array) -> tuple[Array, Array]:
    """Integers from -127 to 127, in float32, and the scales `[rows, 1]`.

    A row with a NaN or an infinity has integers of 0 and a scale that is not finite; so
    has every output of it, which is NaN.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = largest * np.float32(1 / 127)
    usable = (scale >= _LEAST) & (scale < jnp.inf)
    inverse = 1 / jnp.where(usable, scale, 1)
    return jnp.where(usable, jnp.rint(x * inverse), 0), scale


def _sums(whole: Array, w: Array) -> Array:
    """int32 `[rows, d_out]` of integers in float32 and int8 `[d_out, d_in]`."""
    last = ((1,), (1,)), ((), ())
    q = whole.astype(jnp.int8)
    return lax.dot_general(q, w, last, preferred_element_type=jnp.int32)


def _sums_of_parts(whole: Array, w: Array) -> Array:
    """The same by products of float32: XLA has no quick one of int8 on processors."""
    d_in = w.shape[1]
    parts = -(-d_in // _EXACT)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, parts * _EXACT - d_in)))
        return padded.reshape(x.shape[0], parts, _EXACT)

    w = w.astype(jnp.float32)
    if parts == 1:
        sums = lax.dot_general(whole, w, (((1,), (1,)), ((), ())))
        return sums.astype(jnp.int32)
    sums = lax.dot_general(split(whole), split(w), (((2,), (2,)), ((1,), (1,))))
    return sums.astype(jnp.int32).sum(0, dtype=jnp.int32)
