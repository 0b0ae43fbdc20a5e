"""Products of float32 or int8 activations with sparse weights, by native CPU kernels.

Weights are `[d_in, d_out]`, grouped by outputs: a group is one output (CSR) or four
consecutive ones (tiles), and each of its entries names an input; within a group inputs
ascend. Entries beyond `offsets[-1]` are padding: they are not read, and their gradient
is 0. Leading axes of activations are tokens, and so is the axis of a `vmap` over
activations. A `vmap` over weights is a loop.

Inside, activations are feature-major: the kernels ask XLA for that layout, and what is
elementwise between two of them XLA computes in it, without a transposition.

The kernels check every index when they run: a wrong one is an error of the program, and
nothing beyond an array is read. Each output is summed by one thread, in an order that
the number of tokens and the instruction set decide: threads change no bit.

Tokens that are sharded stay where they are, and so do outputs; weights are replicated,
and features that are sharded are gathered. All arrays of such a program must lie on one
mesh. With weights that are packed for each shard of outputs, call the products within
`jax.shard_map`.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxsparse._typing import Array
from jaxsparse.formats.dense import MOST_INT8_INPUTS
from jaxsparse.kernels import _native_build
from jaxsparse.kernels import _native_calls as calls


def available() -> bool:
    """Whether native kernels can be used; the first call of all may compile them.

    `JAXSPARSE_NATIVE=off` turns them off.
    """
    return not why_not()


def why_not() -> str:
    """What is missing for native kernels, in one line; "" where nothing is."""
    if _asked() == "off":
        return "the native kernels are turned off by JAXSPARSE_NATIVE=off"
    return _native_build.load().problem


def variants() -> tuple[str, ...]:
    """The instruction sets that this processor runs, the best first."""
    return _native_build.load().variants if available() else ()


def _asked() -> str:
    """What the environment asks for: "off", an instruction set, or "" for the best."""
    return os.environ.get("JAXSPARSE_NATIVE", "").strip().lower()


def csr_matmul(
    x: Array, values: Array, columns: Array, offsets: Array, *, variant: str = ""
) -> Array:
    """`x [..., d_in] @ w` of values and columns `[nnz]`, offsets `[d_out + 1]`."""
    kind = calls.Kind(1, _variant(variant))
    _check_structure(columns, offsets, "columns")
    _check_values(values, columns, ())
    return _of_tokens(lambda x: calls.matmul(kind, x, values, (columns, offsets)), x)


def csr_matmul_transposed(
    dy: Array,
    values: Array,
    columns: Array,
    offsets: Array,
    d_in: int,
    *,
    variant: str = "",
) -> Array:
    """`dy [..., d_out] @ w.T`, an array `[..., d_in]`."""
    kind = calls.Kind(1, _variant(variant))
    d_out = _check_structure(columns, offsets, "columns")
    _check_values(values, columns, ())
    _check_tokens(dy, "dy", d_out)
    call = lambda dy: calls.transposed(kind, d_in, dy, values, (columns, offsets))
    return _of_tokens(call, dy)


def csr_sampled(
    x: Array, dy: Array, columns: Array, offsets: Array, *, variant: str = ""
) -> Array:
    """The gradient `[nnz]` of the values, summed over all tokens."""
    kind = calls.Kind(1, _variant(variant))
    d_out = _check_structure(columns, offsets, "columns")
    x, dy = _same_tokens(x, dy, d_out)
    return calls.sampled(kind, columns.shape[0], x, dy, (columns, offsets))


def tiles4_matmul(
    x: Array, values: Array, rows: Array, offsets: Array, *, variant: str = ""
) -> Array:
    """`x [..., d_in] @ w` of values `[n, 4]`, rows `[n]`, offsets `[d_out / 4 + 1]`."""
    kind = calls.Kind(4, _variant(variant))
    _check_structure(rows, offsets, "rows")
    _check_values(values, rows, (4,))
    flat = values.reshape(-1)
    return _of_tokens(lambda x: calls.matmul(kind, x, flat, (rows, offsets)), x)


def tiles4_matmul_transposed(
    dy: Array,
    values: Array,
    rows: Array,
    offsets: Array,
    d_in: int,
    *,
    variant: str = "",
) -> Array:
    """`dy [..., d_out] @ w.T`, an array `[..., d_in]`."""
    kind = calls.Kind(4, _variant(variant))
    d_out = 4 * _check_structure(rows, offsets, "rows")
    _check_values(values, rows, (4,))
    _check_tokens(dy, "dy", d_out)
    flat = values.reshape(-1)
    call = lambda dy: calls.transposed(kind, d_in, dy, flat, (rows, offsets))
    return _of_tokens(call, dy)


def tiles4_sampled(
    x: Array, dy: Array, rows: Array, offsets: Array, *, variant: str = ""
) -> Array:
    """The gradient `[n, 4]` of the values, summed over all tokens."""
    kind = calls.Kind(4, _variant(variant))
    d_out = 4 * _check_structure(rows, offsets, "rows")
    x, dy = _same_tokens(x, dy, d_out)
    size = 4 * rows.shape[0]
    return calls.sampled(kind, size, x, dy, (rows, offsets)).reshape(-1, 4)


def int8_tiles_matmul(
    x: Array,
    values: Array,
    scale: Array,
    rows: Array,
    offsets: Array,
    *,
    variant: str = "",
) -> Array:
    """`x [..., d_in] @ (w * scale)`, of int8 weights in tiles of four inputs.

    Each token is quantized: `q = round(x / s)` with `s = max |x| / 127`. Products are
    summed exactly, in int32, so the result is the same on every processor. A token with
    a NaN or an infinity has no finite output; one whose `s` is below 1e-37 is taken for
    0. There is no gradient.

    Args:
      x: float32 `[..., d_in]`.
      values: int8 `[n, 4]`: the inputs `4 * row` to `4 * row + 3` of one output.
      scale: float32 `[d_out]`.
      rows: uint16 or uint32 `[n]`.
      offsets: int32 `[d_out + 1]`.
      variant: an instruction set of `variants()`; the best one by default.
    """
    chosen = _variant(variant)
    d_out = _check_structure(rows, offsets, "rows")
    _check_values(values, rows, (4,), jnp.int8)
    _check(scale, "scale", jnp.float32, (d_out,))
    _check_tokens(x, "x")
    if x.shape[-1] > MOST_INT8_INPUTS:
        raise ValueError(
            f"Sums of int8 products over {x.shape[-1]} inputs may not fit into int32: "
            f"expected at most {MOST_INT8_INPUTS}. Keep these weights in float32."
        )
    flat = values.reshape(-1)
    call = lambda x: calls.int8_matmul(chosen, x, flat, scale, (rows, offsets))
    return _of_tokens(call, x)


def _variant(given: str) -> str:
    """The instruction set to use; an error where native kernels cannot be."""
    if problem := why_not():
        raise RuntimeError(f"No native kernels: {problem}.")
    chosen = given or _asked()
    if chosen and chosen not in variants():
        raise ValueError(
            f"This processor runs no variant {chosen!r} of the native kernels: "
            f"expected one of {', '.join(variants())}, as `variant` or in "
            "JAXSPARSE_NATIVE."
        )
    return chosen


def _of_tokens(call: Callable[[Array], Array], x: Array) -> Array:
    """Calls on `[tokens, features]`, with all leading axes made one."""
    _check_tokens(x, "x")
    y = call(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _same_tokens(x: Array, dy: Array, d_out: int) -> tuple[Array, Array]:
    """Activations and gradients of the same tokens, as matrices."""
    _check_tokens(x, "x")
    _check_tokens(dy, "dy", d_out)
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(
            f"x has the shape {x.shape} and dy {dy.shape}: expected the same leading "
            "axes, those of the tokens."
        )
    tokens = math.prod(x.shape[:-1])
    return x.reshape(tokens, x.shape[-1]), dy.reshape(tokens, d_out)


def _check_structure(indices: Array, offsets: Array, name: str) -> int:
    """Checks what does not depend on values; returns the number of groups."""
    if indices.dtype not in (jnp.uint16, jnp.uint32) or indices.ndim != 1:
        raise ValueError(
            f"{name} is {indices.dtype} of shape {indices.shape}: expected a vector of "
            "uint16, or of uint32 where there are more than 65,536 inputs."
        )
    if offsets.dtype != jnp.int32 or offsets.ndim != 1 or not offsets.size:
        raise ValueError(
            f"offsets is {offsets.dtype} of shape {offsets.shape}: expected int32, one "
            "for each group of outputs and one behind the last."
        )
    return offsets.shape[0] - 1


def _check_values(
    values: Array, indices: Array, tile: tuple[int, ...], dtype: Any = jnp.float32
) -> None:
    _check(values, "values", dtype, (*indices.shape, *tile))


def _check_tokens(x: Array, name: str, features: int | None = None) -> None:
    last = x.shape[-1:] if features is None else (features,)
    if x.ndim == 0 or x.dtype != jnp.float32 or x.shape[-1:] != last:
        expected = "" if features is None else f" with a last axis of {features}"
        raise ValueError(
            f"{name} is {x.dtype} of shape {x.shape}: expected float32{expected}. Cast "
            "what is narrower; native kernels compute in float32."
        )


def _check(x: Array, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or x.shape != shape:
        raise ValueError(
            f"{name} is {x.dtype} of shape {x.shape}: expected "
            f"{jnp.dtype(dtype).name} of shape {shape}."
        )
