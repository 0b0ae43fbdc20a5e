"""Pruning that goes on: what masks have removed stays removed, and counts."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._sharded import sharded_like
from jaxsparse._typing import Array, PyTree, Sparsity
from jaxsparse.patterns._counts import removed_count
from jaxsparse.patterns._masks import kept_count
from jaxsparse.patterns._spec import (
    NM,
    Balanced,
    Block,
    Channel,
    Pattern,
    Unstructured,
)
from jaxsparse.patterns._units import block_scores, channel_scores, expand_blocks
from jaxsparse.ranking.shards import Split
from jaxsparse.tree import Axes, AxesRule, kernel_axes, map_with_path, resolve_axes

Revived = list[tuple[str, Any, Array]]
"""Path, sparsity, and whether something that was gone would have come back."""


@functools.partial(jax.jit, static_argnames=("pattern", "axes", "split"))
def sink(
    x: Array, mask: Array, pattern: Pattern, axes: Axes | None, split: Split
) -> tuple[Array, Array]:
    """Scores in which what is gone comes last, whatever its score was."""
    gone = gone_units("", mask, x.shape, pattern, axes, split)
    # NaN is below all numbers, infinities too, and a mean or maximum of NaN is one.
    return jnp.where(gone, jnp.full((), jnp.nan, x.dtype), x), gone


@jax.jit
def without_gone(kept: Array, mask: Array, gone: Array) -> tuple[Array, Array]:
    """A new mask without what was gone, and whether it had brought any of it back."""
    return kept & mask, jnp.any(kept & gone)


def gone_units(
    path: str,
    mask: Array,
    shape: tuple[int, ...],
    pattern: Pattern,
    axes: Axes | None,
    split: Split | None = None,
) -> Array:
    """True for units that are removed whole.

    One that has lost some of its weights competes with the rest.
    """
    any_left = lambda mask: _any_left(path, mask, pattern, axes, split)
    return ~sharded_like(any_left, jnp.broadcast_to(mask, shape))


def _any_left(
    path: str, mask: Array, pattern: Pattern, axes: Axes | None, split: Split | None
) -> Array:
    match pattern:
        case Channel():
            whole = dataclasses.replace(pattern, reduce="max")
            count = mask.astype(jnp.int8)  # there is no maximum of bools over a mesh
            return channel_scores(path, count, whole, axes, split) > 0
        case Block() | Balanced():
            assert axes is not None
            whole = dataclasses.replace(pattern, reduce="max")
            return expand_blocks(block_scores(path, mask, whole, axes), mask.shape)
        case _:
            return mask


def may_have_lost_more(sparsity: Any, pattern: Pattern) -> bool:
    """Whether a group may have lost more than is asked for.

    N:M keeps at most `keep` of a group: one that has fewer obeys it. With a sparsity
    below that of the pattern it is the sparsity that is asked for.
    """
    if not _checks.is_concrete(sparsity):
        return True
    if not isinstance(pattern, NM):
        return False
    return int(removed_count(sparsity, pattern.of)) >= pattern.of - pattern.keep


def group_size(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """How many units of a matrix `[d_out, d_in]` compete with each other."""
    if isinstance(pattern, NM):
        return pattern.of
    if isinstance(pattern, Balanced):
        return shape[1] // pattern.shape[0]
    return shape[1] if pattern == Unstructured("output") else math.prod(shape)


def most_lost(gone: Array, sparsity: Any, pattern: Pattern) -> tuple[int, int, int]:
    """The most that a group of some matrices has lost, may lose, and its size."""
    size = group_size(pattern, gone.shape[-2:])
    if isinstance(pattern, Balanced):
        a, v = pattern.shape
        *batch, d_out, d_in = gone.shape
        gone = gone.reshape(*batch, d_out // v, v, d_in // a, a).all((-3, -1))
    lost = jnp.max(jnp.sum(gone.reshape(-1, size), axis=1, dtype=jnp.int32))
    return int(lost), int(removed_count(sparsity, size)), size


def check_budget(revived: Revived, pattern: Pattern) -> None:
    """Raises when something that is gone would have to come back."""
    asked = [(p, s, r) for p, s, r in revived if not may_have_lost_more(s, pattern)]
    if not asked or not all(_checks.is_concrete(r) for _, _, r in asked):
        return
    for (path, sparsity, _), back in zip(
        asked, jax.device_get([r for _, _, r in asked]), strict=True
    ):
        if back:
            raise ValueError(
                f"{path}: `masks` already remove more than `sparsity` asks for "
                f"({float(sparsity):g}), in all or in one of its groups ({pattern}). "
                "Ask for more, or leave `masks` out: then weights may come back."
            )


def score_shapes(params: PyTree) -> PyTree:
    """Parameters, but for complex ones the shapes of their scores, which are real."""

    def one(w: Array) -> Any:
        if not jnp.iscomplexobj(w):
            return w
        return jax.ShapeDtypeStruct(jnp.shape(w), jnp.finfo(w.dtype).dtype)

    return jax.tree.map(one, params)


def gone_before(
    masks: PyTree, params: PyTree, pattern: Pattern, selected: PyTree, axes: AxesRule
) -> PyTree:
    """`gone_units` of a tree; False for what takes no part."""
    stated = resolve_axes(params, axes)

    def one(path: str, mask: Array, w: Array, taken: bool) -> Array:
        if not taken:
            return jnp.zeros((), bool)
        tiles = isinstance(pattern, Block | Balanced)
        own = kernel_axes(path, w, stated) if tiles else stated.get(path)
        return gone_units(path, mask, w.shape, pattern, own)

    return map_with_path(one, masks, params, selected)


def targets(
    gone: PyTree | None,
    sparsity: Sparsity,
    steps: int,
    pattern: Pattern,
    selected: PyTree,
) -> list[Sparsity]:
    """The sparsity after each cut, by equal factors of density."""
    if steps == 1:
        return [sparsity]
    if gone is None:
        start = jax.tree.map(lambda _: 0.0, sparsity)
    else:
        start = _shares(gone, pattern, selected)
        if jax.tree_util.all_leaves([sparsity]):
            sparsity = jax.tree.map(lambda _: sparsity, start)

    def after(progress: float) -> Sparsity:
        def between(first: Any, last: Any) -> Any:
            # Where a count was rounded up, a little more may be gone than asked for.
            concrete = isinstance(first, float) and isinstance(last, int | float)
            first = min(first, last) if concrete else jnp.minimum(first, last)
            return 1 - (1 - first) * ((1 - last) / (1 - first)) ** progress

        return jax.tree.map(between, start, sparsity)

    return [*(after(k / steps) for k in range(1, steps)), sparsity]


def _shares(gone: PyTree, pattern: Pattern, selected: PyTree) -> PyTree:
    """What part of each parameter is gone, or in the global scope of all together."""

    def share(leaves: list[Array]) -> float | Array:
        count = sum(kept_count(g, g.shape) for g in leaves)
        size = max(1, sum(g.size for g in leaves))
        return int(count) / size if _checks.is_concrete(count) else count / size

    if getattr(pattern, "scope", "layer") != "global":
        return jax.tree.map(lambda g: share([g]), gone)
    pairs = zip(jax.tree.leaves(gone), jax.tree.leaves(selected), strict=True)
    return share([g for g, taken in pairs if taken])
