"""Kernels for NVIDIA's Hopper: tiles, and N:M by selecting from planes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsparse._typing import Array
from jaxsparse.formats import Nm, Tiles
from jaxsparse.kernels._owners import spans
from jaxsparse.kernels._planes import plane, present
from jaxsparse.kernels._served import (
    SHARED,
    bits_of,
    hopper_bytes,
    hopper_width,
    result_of,
    varying,
)

ROWS = 64  # what a tensor core of this kind multiplies at once
DEPTH = 64  # bytes of positions in a block
STEPS = 4  # at most on their way at once


def tiles(x: Array, packed: Tiles, *, interpret: Any = None) -> Array:
    """`y_g = sum of x[:, rows_s] @ values_s` over the tiles `s` of group `g`."""
    (a, v), rows = packed.tile, x.shape[0]
    groups = packed.view.d_out // v
    laid = _swizzled(min(a, v), x.dtype)

    def block(
        x: Any, w: Any, number: Any, begin: Any, end: Any, y: Any, own: Any
    ) -> None:
        i, g = lax.axis_index("rows"), lax.axis_index("groups")
        first = begin[g]

        def add(total: Any) -> Array:
            def step(_: Any, x_block: Any, w_block: Any) -> None:
                plgpu.wgmma(total, x_block, w_block)
                plgpu.wgmma_wait(0)

            plgpu.emit_pipeline(
                step,
                grid=(end[g] - first,),
                in_specs=[
                    laid((ROWS, a), lambda s: (i, number[first + s])),
                    laid((None, a, v), lambda s: (first + s, 0, 0)),
                ],
                max_concurrent_steps=_steps((ROWS + v) * a * x.dtype.itemsize),
            )(x, w)
            return total[...]

        _write(add, own, y, i, g)

    whole = pl.cdiv(rows, ROWS)
    x = jnp.pad(x, ((0, -rows % ROWS), (0, 0)))
    blocks, names = (whole, groups), ("rows", "groups")
    shape = result_of(x, packed.values, whole * ROWS, packed.view.d_out)
    run = _kernel(block, blocks, names, v, shape, interpret)
    values, number = packed.values.reshape(-1, a, v), packed.rows.reshape(-1)
    with jax.enable_x64(False):  # the pipeline counts its steps in 32 bits
        y = run(x, values, number.astype(jnp.int32), *spans(packed))
    return varying(y[:rows], x, values)


def planes(x: Array, packed: Nm, *, interpret: Any = None) -> Array:
    """`y = sum_j x_j @ (values at position j, else 0)`, with `x_j = x[:, j::of]`.

    Byte `r` has the positions of groups `each r` to `each r + each - 1`: a step takes
    the same of these from each of many bytes, so that nothing is spread over rows.
    """
    keep, groups, d_out = packed.values.shape
    rows, of, bits = x.shape[0], packed.pattern.of, bits_of(packed)
    each, deep, wide = 8 // bits, DEPTH, hopper_width(packed)
    steps, across = groups // each // deep, d_out // wide
    laid = _swizzled(deep, x.dtype)

    def block(x: Any, values: Any, packs: Any, y: Any, own: Any, weights: Any) -> None:
        i, j = lax.axis_index("rows"), lax.axis_index("outputs")

        def add(total: Any) -> Array:
            def step(at: Any, x_block: Any, kept: Any, packs: Any) -> None:
                values = [kept[p] for p in range(keep)]
                position = _positions(packs, keep, bits, at[1])
                there = present(position)
                for place in range(of):
                    weights[...] = plane(place, position, there, values)
                    plgpu.commit_smem()
                    plgpu.wgmma(total, x_block.at[place], weights)
                    plgpu.wgmma_wait(0)

            plgpu.emit_pipeline(
                step,
                grid=(steps, each),
                in_specs=[
                    laid((of, ROWS, deep), lambda s, e: (e, i, s)),
                    laid((keep, deep, wide), lambda s, e: (0, s, e * across + j)),
                    plgpu.BlockSpec((keep, deep, wide), lambda s, e: (0, s, j)),
                ],
                max_concurrent_steps=_steps(hopper_bytes(packed)),
            )(x, values, packs)
            return total[...]

        _write(add, own, y, i, j)

    whole = pl.cdiv(rows, ROWS)
    x = jnp.pad(x, ((0, -rows % ROWS), (0, 0)))
    # A copy has five axes at most, and two are those of tiles in shared memory.
    apart = x.reshape(-1, groups // each, each * of).transpose(2, 0, 1)
    blocks, names = (whole, across), ("rows", "outputs")
    scratch = plgpu.SMEM((deep, wide), x.dtype, transforms=laid.keywords["transforms"])
    shape = result_of(x, packed.values, whole * ROWS, d_out)
    run = _kernel(block, blocks, names, wide, shape, interpret, scratch)
    values = packed.values.reshape(keep, groups // each, each * d_out)
    return varying(run(apart, values, packed.positions)[:rows], x, values)


def _positions(packs: Any, keep: int, bits: int, which: Array) -> list[Array]:
    """Positions within groups, of those that are `which` in their bytes."""
    low = 2**bits - 1
    return [(packs[p].astype(jnp.int32) >> bits * which) & low for p in range(keep)]


def _write(add: Any, own: Any, y: Any, i: Array, j: Array) -> None:
    """Adds up a block of the result, and writes it."""
    rows, wide = own.shape
    total = pl.run_scoped(add, plgpu.ACC((rows, wide), jnp.float32))
    own[...] = total.astype(own.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, y.at[pl.ds(i * rows, rows), pl.ds(j * wide, wide)])
    plgpu.wait_smem_to_gmem(0)


def _kernel(
    body: Any,
    grid: Any,
    names: Any,
    wide: int,
    shape: Any,
    interpret: Any,
    *scratch: Any,
) -> Any:
    transforms = _swizzled(wide, shape.dtype).keywords["transforms"]
    own = plgpu.SMEM((ROWS, wide), shape.dtype, transforms=transforms)
    semantics = plgpu.LoweringSemantics.Warpgroup
    return plgpu.kernel(
        body,
        out_type=shape,
        scratch_types=[own, *scratch],
        grid=grid,
        grid_names=names,
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics),
        interpret=interpret,
    )


def _swizzled(wide: int, dtype: Any) -> Any:
    """Makes blocks that lie in shared memory as tensor cores take them.

    Both operands of a product must lie in the same way: `wide` is of the narrower.
    """
    swizzle = plgpu.find_swizzle(wide * dtype.itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    transforms = tiling, plgpu.SwizzleTransform(swizzle)
    return functools.partial(plgpu.BlockSpec, transforms=transforms)


def _steps(taken: int) -> int:
    return max(1, min(STEPS, SHARED // taken))
