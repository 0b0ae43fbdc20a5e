"""What all engines share: what a product is, its shapes and its types."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._platform import on_cpu
from jaxsparse._typing import Array
from jaxsparse.formats import (
    Bitmap,
    Condensed,
    Csr16,
    Int8Tiles,
    Nm,
    PackedArray,
    Tiles,
)
from jaxsparse.formats.dense import dtype_of

# Of the values of one layer.
_AXES = {Bitmap: 2, Csr16: 2, Condensed: 2, Nm: 3, Tiles: 4, Int8Tiles: 3}

Engine = Callable[[Array, PackedArray], Array]
"""`engine(x, packed)`, of `[*batch, ..., d_in]` and a kernel `[*batch, ..., d_out]`."""


def check_product(x: Any, packed: Any) -> None:
    """Raises unless a packed kernel can be multiplied by an array."""
    check_packed(packed)
    _checks.check_arrays(x=x)
    if not hasattr(x, "ndim"):
        raise TypeError(f"x must be an array, got {_checks.shown(x)}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be of floating point, got {x.dtype}. Cast it.")
    batch = batch_of(packed)
    d_in = packed.view.d_in
    if x.shape[: len(batch)] != batch or x.ndim <= len(batch) or x.shape[-1] != d_in:
        lead = "".join(f"{n}, " for n in batch)
        raise ValueError(
            f"x has the shape {tuple(x.shape)}; a kernel of {d_in} inputs takes "
            f"[{lead}..., {d_in}]."
        )


def check_packed(packed: Any) -> None:
    """Raises unless this is a packed kernel."""
    _checks.check_is(PackedArray, "js.formats.pack(params, masks)", packed=packed)


def batch_of(packed: PackedArray) -> tuple[int, ...]:
    """The layers that are there: none in a turn of a scan."""
    return packed.values.shape[: packed.values.ndim - _AXES[type(packed)]]


def over_rows(engine: Callable[[Array, Any], Array], x: Array, packed: Any) -> Array:
    """`engine` of rows `[rows, d_in]` and one layer, for all layers and axes of `x`."""
    batch = batch_of(packed)
    lead = x.shape[len(batch) : -1]
    rows = jnp.asarray(x).reshape(*batch, math.prod(lead), x.shape[-1])
    for _ in batch:
        engine = jax.vmap(engine)
    y = engine(rows, packed)
    return y.reshape(*batch, *lead, y.shape[-1])


def result_type(x: Array, packed: PackedArray) -> Any:
    """The type of a product, that of `x` where weights have 8 bits."""
    dtype = dtype_of(packed)
    if dtype.itemsize < 2:
        return x.dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(x.dtype, dtype)


def contract(
    a: Array, b: Array, dtype: Any, over: tuple[Any, Any], batch: Any = ((), ())
) -> Array:
    """`dot_general` of operands of a type, added up in float32 at least."""
    numbers = over, batch

    def narrow(a: Array, b: Array) -> Array:
        wide = dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32
        own = lambda x: x if x.dtype == dtype else x.astype(dtype)
        return lax.dot_general(own(a), own(b), numbers, preferred_element_type=wide)

    if jnp.dtype(dtype).itemsize >= 4:
        return narrow(a, b)

    def wide(a: Array, b: Array) -> Array:
        return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), numbers)

    # Processors multiply in float32 anyway, and XLA has no product of all types there.
    return on_cpu(wide, narrow, a, b)
