"""From scores and counts to masks: what is compiled, in few programs.

Parameters of equal shape share a compilation: what is compiled does not know paths, and
who calls it has checked that the pattern fits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._sharded import each_sharded_like, sharded_like
from jaxsparse._typing import Array
from jaxsparse.patterns._floor import top_k_with_floor
from jaxsparse.patterns._rows import together, top_k_masks_of_each
from jaxsparse.patterns._spec import (
    NM,
    Balanced,
    Block,
    Channel,
    Pattern,
    Unstructured,
)
from jaxsparse.patterns._units import (
    batch_axes,
    block_scores,
    channel_scores,
    expand_blocks,
)
from jaxsparse.patterns.nm import nm_mask
from jaxsparse.ranking.shards import Split
from jaxsparse.ranking.threshold import top_k_masks
from jaxsparse.tree import Axes


class Part(NamedTuple):
    """A parameter that takes part: its scores, and how many of a group stay."""

    x: Array
    keep: Array
    axes: Axes | None
    split: Split


def masks_of_each(parts: list[Part], pattern: Pattern) -> list[Array]:
    """Masks of parameters that do not compete with each other."""
    found: list[Any] = [None] * len(parts)
    for group in _joint(parts, pattern):
        xs, keep, axes, _ = zip(*(parts[i] for i in group), strict=True)
        for i, mask in zip(group, _mask_many(xs, keep, pattern, axes), strict=True):
            found[i] = mask
    previous = None
    for i, (x, keep, axes, split) in enumerate(parts):
        if found[i] is None:
            if previous is not None and isinstance(pattern, Unstructured):
                keep = _after(previous, keep)
            found[i] = previous = _mask_one(x, keep, pattern, axes, split)
    return found


def _joint(parts: list[Part], pattern: Pattern) -> list[list[int]]:
    """Which parameters go through one program; see `together`."""

    def whole(part: Part) -> bool:
        competing = competing_axes(part.x.ndim, pattern, part.axes)
        return len(competing) == part.x.ndim

    if isinstance(pattern, NM):
        return []
    fit = [i for i, part in enumerate(parts) if whole(part)]
    units = [
        jax.eval_shape(
            lambda x, axes=parts[i].axes: units_of("", x, pattern, axes),
            jax.ShapeDtypeStruct(parts[i].x.shape, parts[i].x.dtype),
        )
        for i in fit
    ]
    groups = together([parts[i].x for i in fit], units)
    return [[fit[i] for i in group] for group in groups]


def _after(previous: Array, keep: Array) -> Array:
    """`keep`, once the mask of the previous parameter is there; see `now` there.

    Under jit XLA would otherwise work on all parameters at once, and hold the scratch
    memory of each of them. (Where there is a mesh, one entry is not at hand.)
    """
    spread = not jax.typeof(previous).sharding.mesh.empty
    if _checks.is_concrete(previous) or spread or not previous.size:
        return keep
    return keep + jnp.minimum(previous[(0,) * previous.ndim].astype(keep.dtype), 0)


def split_of_units(split: Split, pattern: Pattern, axes: Axes | None) -> Split:
    """How the units' scores are split: what a `Channel` adds up is so no more."""
    if not isinstance(pattern, Channel):
        return split
    ndim = len(split)
    apart = (pattern.axis % ndim, *batch_axes(pattern, ndim, axes))
    return tuple(names if a in apart else () for a, names in enumerate(split))


def competing_axes(ndim: int, pattern: Pattern, axes: Axes | None) -> tuple[int, ...]:
    """The axes along which units compete; the others number the groups."""
    if isinstance(pattern, Unstructured | Balanced) and pattern.scope == "output":
        assert axes is not None
        return tuple(sorted(axes.input))
    batch = batch_axes(pattern, ndim, axes)
    return tuple(a for a in range(ndim) if a not in batch)


def units_of(
    path: str,
    x: Array,
    pattern: Pattern,
    axes: Axes | None,
    split: Split | None = None,
) -> Array:
    match pattern:
        case Channel():
            return channel_scores(path, x, pattern, axes, split)
        case Block() | Balanced():
            assert axes is not None
            return block_scores(path, x, pattern, axes)
        case _:
            return x


def _expand(mask: Array, shape: tuple[int, ...], pattern: Pattern) -> Array:
    return expand_blocks(mask, shape) if isinstance(pattern, Block | Balanced) else mask


# Jitted, so that an eager caller compiles once for each shape: a loop whose body is a
# fresh closure would compile at every call. Inside the caller's jit this is inlined.
@functools.partial(jax.jit, static_argnames=("pattern", "axes", "split"))
def _mask_one(
    x: Array, keep: Array, pattern: Pattern, axes: Axes | None, split: Split
) -> Array:
    def one(x: Array, keep: Array) -> Array:
        if isinstance(pattern, NM):
            assert axes is not None
            return nm_mask("", x, keep, pattern, axes)
        units = units_of("", x, pattern, axes, split)
        competing = competing_axes(x.ndim, pattern, axes)
        splits = [split_of_units(split, pattern, axes)]
        (mask,) = top_k_masks([units], keep, axes=competing, splits=splits)
        return _expand(mask, x.shape, pattern)

    return sharded_like(one, x, keep)


@functools.partial(jax.jit, static_argnames=("pattern", "axes"))
def _mask_many(
    xs: tuple[Array, ...],
    keep: tuple[Array, ...],
    pattern: Pattern,
    axes: tuple[Axes | None, ...],
) -> list[Array]:
    units = [units_of("", x, pattern, a) for x, a in zip(xs, axes, strict=True)]
    kept = top_k_masks_of_each(units, keep)
    return [_expand(m, x.shape, pattern) for m, x in zip(kept, xs, strict=True)]


_STATIC = ("pattern", "axes", "splits", "min_keep", "of")


@functools.partial(jax.jit, static_argnames=_STATIC)
def masks_of_all(
    xs: list[Array],
    keep: Array,
    pattern: Pattern,
    axes: tuple[Axes | None, ...],
    splits: tuple[Split, ...],
    min_keep: int,
    of: Callable[[Array], Array] | None = None,
) -> list[Array]:
    def together(xs: list[Array], keep: Array) -> list[Array]:
        units = [
            units_of("", x, pattern, a, split)
            for x, a, split in zip(xs, axes, splits, strict=True)
        ]
        # Parameters of different types compete in the type that holds them all. Types
        # of 8 bits have none with others; float32 holds them.
        units = [u.astype(jnp.float32) if u.dtype.itemsize < 2 else u for u in units]
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*units)
        units = [u.astype(dtype) for u in units]
        layers = [
            competing_axes(x.ndim, pattern, a) for x, a in zip(xs, axes, strict=True)
        ]
        apart = [
            split_of_units(split, pattern, a)
            for split, a in zip(splits, axes, strict=True)
        ]
        kept = top_k_with_floor(units, keep, layers, apart, min_keep, of)
        return [_expand(m, x.shape, pattern) for m, x in zip(kept, xs, strict=True)]

    return each_sharded_like(together, xs, keep)
