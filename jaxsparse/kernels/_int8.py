"""Products with int8 weights in plain JAX, to the bits of the compiled kernel.

Rounded activations times rounded weights are integers, and their sums are exact in any
order. So every platform gets the same sums, and the same result to the last bit where
float32 is rounded alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.formats import Int8Tiles
from jaxsparse.formats.dense import integers_of
from jaxsparse.kernels._native_calls import no_int8_gradient

_LEAST = 1e-37  # a smaller scale has no inverse
_LAST = ((1,), (1,)), ((), ())


@jax.custom_vjp
def int8_product(x: Array, packed: Int8Tiles) -> Array:
    """float32 `[rows, d_out]` of float32 `[rows, d_in]` and one layer."""
    whole, scale = rounded(x)
    w = integers_of(packed)
    sums = lax.dot_general(whole, w, _LAST, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * (scale * packed.scale[None])


int8_product.defvjp(no_int8_gradient, no_int8_gradient)


def rounded(x: Array) -> tuple[Array, Array]:
    """Int8 from -127 to 127, and the scales `[rows, 1]`.

    A row with a NaN or an infinity has integers of 0 and a scale that is not finite, so
    that every output of it is NaN.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = largest * np.float32(1 / 127)
    usable = (scale >= _LEAST) & (scale < jnp.inf)
    inverse = 1 / jnp.where(usable, scale, 1)
    whole = jnp.where(usable, jnp.rint(x * inverse), 0)
    return whole.astype(jnp.int8), scale
