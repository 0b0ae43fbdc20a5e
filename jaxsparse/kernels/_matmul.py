"""`matmul`: the product of activations and a packed kernel, by the quickest engine."""

import math

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.formats import PackedArray
from jaxsparse.kernels._product import batch_of, check_product
from jaxsparse.kernels._rules import MEASURED, Rules, choose


def matmul(x: Array, packed: PackedArray, *, rules: Rules = MEASURED) -> Array:
    """Multiply activations by a packed kernel: `y[..., o] = sum_i x[..., i] w[i, o]`.

    Several input axes of a kernel are flattened into one, the last axis fastest, and so
    are its output axes. Sums are accumulated in float32 at least and equal the dense
    product up to their order. For `Int8Tiles` activations are rounded too (see
    `dense`), and there is no gradient. Which engine computes it is a matter of speed:
    see `choose`. The choice depends on shapes alone, so a jitted function always uses
    the same engine. It has gradients of `x` and of the values:

        grads = jax.grad(lambda v: loss(js.kernels.matmul(
            x, js.formats.with_values(packed, v))))(packed.values)

    Args:
      x: `[*batch, ..., d_in]`, of floating point; `batch` are the kernel's batch axes.
      packed: a kernel from `js.formats.pack`.
      rules: the rules that choose the engine.

    Returns:
      `[*batch, ..., d_out]`, in the type that a dense product would have.

    Raises:
      ValueError: `x` of another width.
      TypeError: anything other than a packed kernel or rules, or `x` not of floating
        point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"w": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 0.5)
      >>> packed = js.formats.pack(params, masks, format=js.formats.Bitmap)["w"]
      >>> js.kernels.matmul(jnp.array([[1.0, 10.0]]), packed)
      Array([[ 3., 40.]], dtype=float32)
    """
    check_product(x, packed)
    _checks.check_is(Rules, "js.kernels.Rules(...)", rules=rules)
    rows = math.prod(x.shape[len(batch_of(packed)) : -1])
    return choose(packed, rows=rows, rules=rules)(x, packed)
