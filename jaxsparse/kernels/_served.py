"""Which products kernels for accelerators are made for."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._typing import Array
from jaxsparse.formats import Nm, Tiles

SLOTS = 2**15  # tiles whose places fit into the scalar memory of a TPU
# Bytes of shared memory that operands of one step may take.
SHARED = 160 * 1024


def tpu_serves(x: Array, packed: Any) -> bool:
    """Whether there is a kernel for TPUs."""
    if x.dtype.name not in ("float32", "bfloat16") or not x.size:
        return False
    if isinstance(packed, Tiles):
        a, v = packed.tile
        return a % 8 == 0 and v % 128 == 0 and 0 < packed.rows.size <= SLOTS
    if not isinstance(packed, Nm) or packed.pattern.of > 16:
        return False
    groups, d_out = packed.values.shape[1:]
    whole = groups % (8 // bits_of(packed)) == 0
    return bool(groups and d_out) and (whole or groups > tpu_depth(packed))


def tpu_depth(packed: Nm) -> int:
    """The most groups of a block, so that their inputs are 2,048 or fewer."""
    return 2048 >> (packed.pattern.of - 1).bit_length()


def hopper_serves(x: Array, packed: Any) -> bool:
    """Whether there is a kernel for Hopper, and no other GPU is seen."""
    if x.dtype.name not in ("float16", "bfloat16") or not x.size or not on_hopper():
        return False
    if isinstance(packed, Tiles):
        a, v = packed.tile
        sides = a % 16 == 0 and a <= 128 and v % 64 == 0 and v <= 256
        return sides and packed.rows.size > 0
    if not isinstance(packed, Nm):
        return False
    groups, d_out = packed.values.shape[1:]
    blocks = groups % (8 // bits_of(packed) * 64) == 0 and d_out % 64 == 0
    return blocks and bool(groups and d_out) and hopper_bytes(packed) <= SHARED


def hopper_width(packed: Nm) -> int:
    """Outputs of a block of planes."""
    return 64 if packed.view.d_out % 128 else 128


def hopper_bytes(packed: Nm) -> int:
    """What the inputs, values and positions of a step take."""
    inputs = packed.pattern.of * 64 * 64 * 2
    return inputs + packed.pattern.keep * 64 * hopper_width(packed) * 3


def bits_of(packed: Nm) -> int:
    """Of a position; bytes hold as many as fit."""
    return next(bits for bits in (1, 2, 4, 8) if 2**bits >= packed.pattern.of)


def result_of(x: Array, values: Array, *shape: int) -> jax.ShapeDtypeStruct:
    """A result of a kernel, which varies over devices where an operand does."""
    first = lambda x, w: x.reshape(-1)[0] + w.reshape(-1)[0].astype(x.dtype)
    return jax.eval_shape(first, x, values).update(shape=shape, sharding=None)


def varying(y: Array, x: Array, values: Array) -> Array:
    """`y`, with the devices over which JAX takes the operands to vary.

    Not all kinds of kernels say it. The choice is always the same: it costs nothing.
    """
    if not jax.sharding.get_abstract_mesh().axis_names:
        return y
    there = (x.reshape(-1)[0] == 0) | (values.reshape(-1)[0] == 0) | True
    return jnp.where(there, y, jnp.zeros((), y.dtype))


def is_split(x: Array) -> bool:
    """Whether JAX, and not the caller, splits arrays over a mesh, as far as it says."""
    manual = jax.sharding.AxisType.Manual
    meshes = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
    return any(kind != manual for mesh in meshes for kind in mesh.axis_types)


def on_hopper() -> bool:
    """Whether a GPU is one, and where there is none whether programs are for one."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return True
    return getattr(device, "compute_capability", "") == "9.0"


def bitmap_serves(x: Array, packed: Any) -> bool:
    """Whether there is a kernel of bitmaps; its places are numbers of 32 bits."""
    narrow = x.dtype.name in ("float32", "bfloat16", "float16")
    return narrow and x.size > 0 and 0 < packed.values.size < 2**31


def no_bitmaps() -> str:
    """What the kernel of bitmaps needs, in one line; "" where nothing is missing."""
    from jaxsparse.kernels import _pallas_triton  # late: Triton takes a while

    if not _pallas_triton.MISSING:
        return ""
    return (
        "no kernel for Bitmap. pip install 'jaxsparse[gpu]', and JAX for NVIDIA's "
        f"GPUs, bring what it needs ({_pallas_triton.MISSING})"
    )
