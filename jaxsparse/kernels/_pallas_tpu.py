"""Kernels for TPUs: tiles by scalar prefetch, N:M by selecting from planes."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsparse._typing import Array
from jaxsparse.formats import Nm, Tiles
from jaxsparse.kernels._owners import owners
from jaxsparse.kernels._planes import plane, present
from jaxsparse.kernels._served import bits_of, result_of, tpu_depth

# A block of each operand and the next one fit into 16 MiB.
ROWS = 256
OUTPUTS = 256


def tiles(x: Array, packed: Tiles, *, interpret: Any = False) -> Array:
    """`y_g = sum of x[:, rows_s] @ values_s` over the tiles `s` of group `g`."""
    (a, v), d_in, rows = packed.tile, packed.view.d_in, x.shape[0]
    groups = packed.view.d_out // v
    group, there, filled = owners(packed)
    block = min(rows, ROWS)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(pl.cdiv(rows, block), group.size),
        in_specs=[
            pl.BlockSpec((None, block, a), lambda i, s, g, t, row: (row[s], i, 0)),
            pl.BlockSpec((None, a, v), lambda i, s, g, t, row: (s, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, block, v), lambda i, s, g, t, row: (g[s], i, 0)),
        scratch_shapes=[pltpu.VMEM((block, v), jnp.float32)],
    )
    y = pl.pallas_call(
        _tile,
        grid_spec=spec,
        out_shape=result_of(x, packed.values, groups, rows, v),
        compiler_params=_order("parallel", "arbitrary"),
        interpret=interpret,
        name="jaxsparse_tiles",
    )(
        group,
        there.astype(jnp.int32),
        packed.rows.reshape(-1).astype(jnp.int32),
        x.reshape(rows, d_in // a, a).swapaxes(0, 1),
        packed.values.reshape(-1, a, v),
    )
    # What no tile belongs to is never written: whatever is there is not read.
    y = jnp.where(filled[:, None, None], y, jnp.zeros((), y.dtype))
    return y.swapaxes(0, 1).reshape(rows, groups * v)


def _tile(group: Any, there: Any, row: Any, x: Any, w: Any, y: Any, total: Any) -> None:
    """One tile; those of a group come one after another."""
    del row
    slot, last = pl.program_id(1), pl.num_programs(1) - 1
    own = group[slot]

    @pl.when((slot == 0) | (own != group[jnp.maximum(slot - 1, 0)]))
    def _first() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(there[slot] == 1)
    def _multiply() -> None:
        total[...] += jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    @pl.when((slot == last) | (own != group[jnp.minimum(slot + 1, last)]))
    def _last() -> None:
        y[...] = total[...].astype(y.dtype)


def planes(x: Array, packed: Nm, *, interpret: Any = False) -> Array:
    """`y = sum_j x_j @ (values at position j, else 0)`, with `x_j = x[:, j::of]`."""
    keep, groups, d_out = packed.values.shape
    rows, of, bits = x.shape[0], packed.pattern.of, bits_of(packed)
    apart = x.reshape(rows, groups, of).transpose(2, 0, 1)
    deep = min(groups, tpu_depth(packed))
    # Beyond the last group inputs are zeros: 0 times what a block has there may be NaN.
    apart = jnp.pad(apart, ((0, 0), (0, 0), (0, -groups % deep)))
    block, wide = min(rows, ROWS), min(d_out, OUTPUTS)
    kernel = functools.partial(_plane, of=of, keep=keep, bits=bits, groups=groups)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, block), pl.cdiv(d_out, wide), pl.cdiv(groups, deep)),
        in_specs=[
            pl.BlockSpec((of, block, deep), lambda i, j, k: (0, i, k)),
            pl.BlockSpec((keep, deep, wide), lambda i, j, k: (0, k, j)),
            pl.BlockSpec((keep, deep * bits // 8, wide), lambda i, j, k: (0, k, j)),
        ],
        out_specs=pl.BlockSpec((block, wide), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((block, wide), jnp.float32)],
        out_shape=result_of(x, packed.values, rows, d_out),
        compiler_params=_order("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="jaxsparse_planes",
    )(apart, packed.values, packed.positions)


def _plane(
    x: Any,
    values: Any,
    packs: Any,
    y: Any,
    total: Any,
    *,
    of: int,
    keep: int,
    bits: int,
    groups: int,
) -> None:
    """One block of groups: the planes of a block of weights, times their inputs."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _first() -> None:
        total[...] = jnp.zeros_like(total)

    deep = values.shape[1]
    group = lax.broadcasted_iota(jnp.int32, values.shape[1:], 0)
    inside = step * deep + group < groups
    position = [_positions(packs[j], deep, bits, group) for j in range(keep)]
    there = [inside & some for some in present(position)]
    # Masks of 32 bits select among 32 bits: not all TPUs have others.
    kept = [values[j].astype(jnp.float32) for j in range(keep)]
    for place in range(of):
        own = plane(place, position, there, kept).astype(x.dtype)
        total[...] += jnp.dot(x[place], own, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _last() -> None:
        y[...] = total[...].astype(y.dtype)


def _positions(packs: Array, deep: int, bits: int, group: Array) -> Array:
    """Bytes `[deep / each, n]` as the positions `[deep, n]` that they hold."""
    each = 8 // bits
    bytes_ = packs.astype(jnp.int32).astype(jnp.float32)
    # A product with zeros and ones repeats rows, which registers cannot; it is exact,
    # as a bfloat16 has the 8 bits of a byte.
    shape = (deep, deep // each)
    # `each` is a power of two; a division of integers is not one operation there.
    index = lax.broadcasted_iota(jnp.int32, shape, 0) >> (each - 1).bit_length()
    picks = index == lax.broadcasted_iota(jnp.int32, shape, 1)
    repeated = jnp.dot(
        picks.astype(jnp.float32), bytes_, preferred_element_type=jnp.float32
    )
    shifted = repeated.astype(jnp.int32) >> (bits * (group & (each - 1)))
    return shifted & (2**bits - 1)


def _order(*axes: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=axes)
