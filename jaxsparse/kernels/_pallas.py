"""Products by kernels for accelerators, where there is one, else in plain JAX."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.formats import Bitmap, Nm, PackedArray, Tiles
from jaxsparse.kernels._dense import dense
from jaxsparse.kernels._gathered import gathered
from jaxsparse.kernels._product import check_product, over_rows, result_type
from jaxsparse.kernels._served import (
    bitmap_serves,
    hopper_serves,
    is_split,
    no_bitmaps,
    tpu_serves,
)


def pallas(x: Array, packed: PackedArray) -> Array:
    """Multiply by kernels for accelerators: `Tiles`, `Nm` and `Bitmap`.

    | format | TPU | NVIDIA Hopper |
    |---|---|---|
    | `Tiles` | sides that 8 and 128 divide | 16 and 64 divide, 128 and 256 at most |
    | `Nm` | `of <= 16` | inputs that 1,024 divides (2:4), outputs that 64 divides |
    | `Bitmap` | - | with the extra `jaxsparse[gpu]` |

    On TPUs in float32 and bfloat16, on Hopper in bfloat16 and float16. Gradients, and
    all other shapes, types and platforms, use `js.kernels.gathered` (`js.kernels.dense`
    for `Bitmap`). The platform that the program is lowered for decides.

    Tiles are read as they are stored, each once for every few hundred rows of `x`; of
    N:M the planes `x_j = x[:, j::of]` meet the values at position `j`, so that nothing
    is gathered. A kernel works on one device: where JAX splits arrays over a mesh, the
    product is plain JAX too. Under `jax.shard_map`, with rows of `x` split, each device
    runs the kernel.

    These kernels have never run on an accelerator: they are tested by interpreters on a
    processor, and lowered for `tpu` and `cuda`. The kernel of `Bitmap` is compiled for
    Hopper where the extra is there. No rule of `js.kernels.MEASURED` uses them.

    Args:
      x: `[*batch, ..., d_in]`, of floating point; `batch` are the kernel's batch axes.
      packed: a kernel from `js.formats.pack`, in one of these formats.

    Returns:
      `[*batch, ..., d_out]`, in the type that a dense product would have.

    Raises:
      ValueError: `x` of another width.
      TypeError: another format, or `x` not of floating point.
      RuntimeError: a `Bitmap` without the extra; the message says how to get it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> pattern, kernel = js.NM(1, 2), jnp.array([[3.0, 1.0], [2.0, 4.0]])
      >>> params, masks = js.prune({"w": kernel}, pattern=pattern)
      >>> packed = js.formats.pack(params, masks, format=pattern)["w"]
      >>> jax.jit(js.kernels.pallas)(jnp.array([[10.0, 1.0]]), packed)
      Array([[30.,  4.]], dtype=float32)
    """
    check_product(x, packed)
    if not isinstance(packed, Tiles | Nm | Bitmap):
        raise TypeError(
            "packed: kernels.pallas multiplies Tiles, Nm and Bitmap, got a "
            f"{type(packed).__name__}. Take kernels.matmul, which chooses."
        )
    if isinstance(packed, Bitmap) and no_bitmaps():
        raise RuntimeError(f"packed: {no_bitmaps()}. kernels.matmul does without.")
    dtype = result_type(x, packed)

    def one(x: Array, packed: Any) -> Array:
        own = packed.values.astype(dtype)
        return _product(x.astype(dtype), own, dataclasses.replace(packed, values=()))

    return over_rows(one, x, packed)


@jax.custom_vjp
def _product(x: Array, values: Array, rest: Any) -> Array:
    """`x [rows, d_in]` times one layer, whose values and `rest` are apart."""
    return _engines(x, values, rest)


def _forward(x: Array, values: Array, rest: Any) -> tuple[Array, Any]:
    return _product(x, values, rest), (x, values, rest)


def _backward(kept: Any, dy: Array) -> tuple[Array, Array, None]:
    x, values, rest = kept
    dx, dvalues = jax.vjp(lambda x, values: _plain(x, values, rest), x, values)[1](dy)
    return dx, dvalues, None


_product.defvjp(_forward, _backward)


@jax.custom_batching.custom_vmap
def _engines(x: Array, values: Array, rest: Any) -> Array:
    packed = dataclasses.replace(rest, values=values)
    kernels = _kernels(x, packed)
    plain = lambda x, packed: _plain(x, packed.values, packed)
    if not kernels:
        return plain(x, packed)
    return lax.platform_dependent(x, packed, default=plain, **kernels)


@_engines.def_vmap
def _over_layers(
    size: int, batched: Any, x: Array, values: Array, rest: Any
) -> tuple[Array, bool]:
    """Of one layer more rows; else one layer after the other, which kernels know."""
    if not any(jax.tree.leaves(batched[1:])):
        y = _engines(x.reshape(-1, x.shape[-1]), values, rest)
        return y.reshape(size, -1, y.shape[-1]), True
    flat, treedef = jax.tree.flatten((x, values, rest))
    which = jax.tree.leaves(batched)

    def one(slices: Any) -> Array:
        own = iter(slices)
        whole = [next(own) if b else a for a, b in zip(flat, which, strict=True)]
        return _engines(*jax.tree.unflatten(treedef, whole))

    return lax.map(one, [a for a, b in zip(flat, which, strict=True) if b]), True


def _plain(x: Array, values: Array, rest: Any) -> Array:
    packed = dataclasses.replace(rest, values=values)
    return (dense if isinstance(packed, Bitmap) else gathered)(x, packed)


def _kernels(x: Array, packed: Any) -> dict[str, Callable[..., Array]]:
    """By platform, what there is for a product. Imported late: Pallas takes a while."""
    found: dict[str, Callable[..., Array]] = {}
    if is_split(x) or is_split(packed.values):
        return found
    if tpu_serves(x, packed):
        from jaxsparse.kernels import _pallas_tpu as tpu

        found["tpu"] = tpu.planes if isinstance(packed, Nm) else tpu.tiles
    if isinstance(packed, Bitmap):
        if bitmap_serves(x, packed):
            from jaxsparse.kernels import _pallas_triton

            found["cuda"] = _pallas_triton.bitmap
    elif hopper_serves(x, packed):
        try:
            from jaxsparse.kernels import _pallas_hopper as hopper
        except ImportError:  # JAX has no Mosaic GPU on some systems
            return found
        found["cuda"] = hopper.planes if isinstance(packed, Nm) else hopper.tiles
    return found


__all__ = ["pallas"]
