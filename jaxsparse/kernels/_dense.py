"""The meaning of a product with a packed kernel: the dense one."""

import jax.numpy as jnp

from jaxsparse._typing import Array
from jaxsparse.formats import Int8Tiles, PackedArray
from jaxsparse.formats.dense import matrices_of
from jaxsparse.kernels._int8 import int8_product
from jaxsparse.kernels._product import check_product, contract, over_rows, result_type


def dense(x: Array, packed: PackedArray) -> Array:
    """Multiply by the unpacked kernel: `y = x @ w`, added up in float32 at least.

    It defines the result of all engines, and is the quickest if a mask keeps many
    weights. Each call makes the dense array anew, so for speed alone keep such kernels
    dense.

    Of `Int8Tiles` it is a product of integers: each row is rounded as weights are, `q =
    round(x / s)` with `s = max |x| / 127`, in float32, and `y = (q_x @ q_w) * (s *
    scale)` with exact sums in int32. A row with a NaN or an infinity gives NaN, and one
    whose `s` is below 1e-37 gives 0. There is no gradient.

    Args:
      x: `[*batch, ..., d_in]`, of floating point; `batch` are the kernel's batch axes.
      packed: a kernel from `js.formats.pack`.

    Returns:
      `[*batch, ..., d_out]`, in the type that a dense product would have.

    Raises:
      ValueError: `x` of another width.
      TypeError: anything other than a packed kernel, or `x` not of floating point; a
        gradient of `Int8Tiles`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"w": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 0.5)
      >>> packed = js.formats.pack(params, masks, format=js.formats.Csr16)["w"]
      >>> js.kernels.dense(jnp.ones((1, 2)), packed)
      Array([[3., 4.]], dtype=float32)
    """
    check_product(x, packed)
    dtype = result_type(x, packed)
    if isinstance(packed, Int8Tiles):
        y = over_rows(int8_product, jnp.asarray(x, jnp.float32), packed)
        return y.astype(dtype)
    one = lambda x, packed: contract(x, matrices_of(packed), dtype, ((1,), (1,)))
    return over_rows(one, x, packed).astype(dtype)
