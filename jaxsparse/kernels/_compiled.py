"""Products by compiled kernels, on processors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._typing import Array
from jaxsparse.formats import Csr16, Int8Tiles, PackedArray, Tiles
from jaxsparse.kernels import _native
from jaxsparse.kernels._product import batch_of, check_product, result_type


def native(x: Array, packed: PackedArray) -> Array:
    """Multiply by compiled kernels: `Csr16`, `Int8Tiles`, and `Tiles` of (1, 4).

    It runs on processors in float32; other types are widened in each call. It supports
    jit, vmap, and gradients of `x` and of the values. `Int8Tiles` have no gradient;
    their products are those of `js.kernels.dense`, bit for bit.

    The kernels are compiled at first use, once per user, which takes up to a minute;
    see "Compiled kernels" on this page.

    Args:
      x: `[*batch, ..., d_in]`, of floating point; `batch` are the kernel's batch axes.
      packed: a kernel from `js.formats.pack`, in one of these formats, on one device.

    Returns:
      `[*batch, ..., d_out]`, in the type that a dense product would have.

    Raises:
      ValueError: `x` of another width, a kernel that is split over devices.
      TypeError: another format, `x` not of floating point, a gradient of `Int8Tiles`.
      RuntimeError: there are no compiled kernels; the message says what is missing.

    Example: see `jaxsparse.kernels.matmul`, which takes it where it is quicker.
    """
    check_product(x, packed)
    if not has_native(packed):
        raise TypeError(
            "packed: kernels.native multiplies Csr16, Int8Tiles and Tiles of (1, 4), "
            f"got a {type(packed).__name__}. Take kernels.matmul, which chooses."
        )
    if not _native.available():
        raise RuntimeError(
            f"No compiled kernels: {_native.why_not()}. kernels.matmul does without."
        )
    batch = batch_of(packed)
    pieces = packed.values.shape[len(batch)]
    if pieces > 1 and not _is_balanced(packed):
        raise ValueError(
            f"packed: a kernel in {pieces} pieces lies on as many devices, and native "
            "kernels work on one. Take kernels.dense, or pack what is on one device."
        )
    one = _one
    for _ in batch:
        one = _over_layers(one)
    y = one(x.astype(jnp.float32), packed)
    return y.astype(result_type(x, packed))


def has_native(packed: PackedArray) -> bool:
    """Whether there is a compiled kernel for this format."""
    if isinstance(packed, Tiles):
        return packed.tile == (1, 4)
    return isinstance(packed, Csr16 | Int8Tiles)


def _is_balanced(packed: PackedArray) -> bool:
    return isinstance(packed, Tiles) and packed.offsets is None


def _over_layers(one: Callable[..., Array]) -> Callable[..., Array]:
    """One layer after the other: each call has its threads."""
    return lambda x, packed: jax.lax.map(lambda both: one(*both), (x, packed))


def _one(x: Array, packed: Any) -> Array:
    if isinstance(packed, Int8Tiles):
        parts = packed.rows[0], packed.offsets[0]
        return _native.int8_tiles_matmul(x, packed.values[0], packed.scale, *parts)
    values = packed.values.astype(jnp.float32)
    if isinstance(packed, Csr16):
        parts = values[0], packed.columns[0], packed.offsets[0]
        return _native.csr_matmul(x, *parts)
    if packed.offsets is None:
        groups, k = packed.rows.shape
        offsets = k * jnp.arange(groups + 1, dtype=jnp.int32)
    else:
        offsets = packed.offsets[0]
    return _native.tiles4_matmul(
        x, values.reshape(-1, 4), packed.rows.reshape(-1), offsets
    )
