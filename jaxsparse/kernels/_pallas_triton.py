"""The kernel of bitmaps for NVIDIA's GPUs, in Triton, which is an extra."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._typing import Array
from jaxsparse.formats import Bitmap
from jaxsparse.kernels._served import result_of, varying

try:
    import jax_triton  # pyrefly: ignore[missing-import]
    import triton  # pyrefly: ignore[missing-import]
    import triton.language as tl  # pyrefly: ignore[missing-import]
except ImportError as error:
    MISSING = str(error).partition("\n")[0]
else:
    MISSING = ""

OUTPUTS = 64  # of a block, and
INPUTS = 64  # of a step


def bitmap(x: Array, packed: Bitmap, *, capability: int | None = None) -> Array:
    """`y = x @ w`: values are stored by output, and a count of bits finds each."""
    rows, d_out = x.shape[0], packed.view.d_out
    block = min(64, max(16, triton.next_power_of_2(rows)))
    y = jax_triton.triton_call(
        x,
        packed.values,
        packed.bits,
        starts(packed),
        kernel=_compiled(),
        out_shape=result_of(x, packed.values, rows, d_out),
        grid=(triton.cdiv(d_out, OUTPUTS), triton.cdiv(rows, block)),
        name="jaxsparse_bitmap",
        compute_capability=capability,
        num_warps=4,
        n_rows=rows,
        d_in=packed.view.d_in,
        d_out=d_out,
        row_bytes=packed.bits.shape[-1],
        ROWS=block,
        OUTPUTS=OUTPUTS,
        INPUTS=INPUTS,
    )
    return varying(y, x, packed.values)


def starts(packed: Bitmap) -> Array:
    """Where the values of each output begin, `[d_out]`."""
    pieces, length = packed.values.shape
    count = jnp.sum(jax.lax.population_count(packed.bits), axis=-1, dtype=jnp.int32)
    count = count.reshape(pieces, -1)
    before = jnp.cumsum(count, axis=1, dtype=jnp.int32) - count
    first = length * jnp.arange(pieces, dtype=jnp.int32)
    return (before + first[:, None]).reshape(-1)


@functools.cache
def _compiled() -> Any:
    """The kernel below, for Triton's compiler."""
    return triton.jit(_multiply)


def _multiply(
    x,
    values,
    bits,
    starts,
    y,
    n_rows: tl.constexpr,
    d_in: tl.constexpr,
    d_out: tl.constexpr,
    row_bytes: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One block of outputs and rows; each step decodes weights of `INPUTS` inputs."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside, own = output < d_out, row < n_rows
    at = tl.load(starts + output, mask=inside, other=0)
    line = output.to(tl.int64) * row_bytes
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for first in range(0, d_in, INPUTS):
        k = first + tl.arange(0, INPUTS)
        there = inside[:, None] & (k < d_in)[None, :]
        packs = tl.load(bits + line[:, None] + (k // 8)[None, :], mask=there, other=0)
        kept = (packs.to(tl.int32) >> (7 - k % 8)[None, :]) & 1
        place = at[:, None] + tl.cumsum(kept, axis=1) - kept
        w = tl.load(values + place, mask=kept == 1, other=0.0)
        inputs = x + row.to(tl.int64)[None, :] * d_in + k[:, None]
        mask = (k < d_in)[:, None] & own[None, :]
        block = tl.load(inputs, mask=mask, other=0.0)
        total += tl.dot(w, block, input_precision="ieee")
        at += tl.sum(kept, axis=1)
    result = y + row.to(tl.int64)[None, :] * d_out + output[:, None]
    mask = inside[:, None] & own[None, :]
    tl.store(result, total.to(y.dtype.element_ty), mask=mask)
