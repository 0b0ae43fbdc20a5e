"""Pruning that goes on: what masks have removed stays removed, and counts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._sharded import sharded_like
from jaxsparse._typing import Array, PyTree, Sparsity
from jaxsparse.patterns._counts import removed_count
from jaxsparse.patterns._masks import kept_count
from jaxsparse.patterns._shards import Split
from jaxsparse.patterns._spec import NM, Block, Channel, Pattern
from jaxsparse.patterns._units import block_scores, channel_scores, expand_blocks
from jaxsparse.tree import Axes, AxesRule, kernel_axes, map_with_path, resolve_axes

Revived = list[tuple[str, Any, Array]]
"""Path, sparsity, and whether something that was gone would have come back."""


@functools.partial(jax.jit, static_argnames=("pattern", "axes", "split"))
def sink(
    x: Array, mask: Array, pattern: Pattern, axes: Axes | None, split: Split
) -> tuple[Array, Array]:
    """Scores in which what is gone comes last, whatever its score was.

    Args:
      x: one score a weight.
      mask: what was pruned before; it broadcasts to `x`.
      pattern: what lives or dies together.
      axes: the kernel's axes, counted from the front, if they are known.
      split: of a shard, over which mesh axes the parameter is split.

    Returns:
      The scores, and `gone_units`.
    """
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

    Args:
      path: the parameter's path, for messages.
      mask: what was pruned before.
      shape: the parameter's.
      pattern: what lives or dies together.
      axes: the kernel's axes, counted from the front, if they are known.
      split: of a shard, over which mesh axes the parameter is split.

    Returns:
      Bools that broadcast to the parameter; where units may be of different sizes, one
      entry is one unit.
    """
    any_left = lambda ms: [_any_left(path, ms[0], pattern, axes, split)]
    return ~sharded_like(any_left, [jnp.broadcast_to(mask, shape)])[0]


def _any_left(
    path: str, mask: Array, pattern: Pattern, axes: Axes | None, split: Split | None
) -> Array:
    match pattern:
        case Channel():
            whole = dataclasses.replace(pattern, reduce="max")
            count = mask.astype(jnp.int8)  # there is no maximum of bools over a mesh
            return channel_scores(path, count, whole, axes, split) > 0
        case Block():
            assert axes is not None
            whole = dataclasses.replace(pattern, reduce="max")
            return expand_blocks(block_scores(path, mask, whole, axes), mask.shape)
        case _:
            return mask


def may_have_lost_more(sparsity: Any, pattern: Pattern) -> bool:
    """Whether a group may have lost more than is asked for.

    N:M keeps at most `keep` of a group: one that has fewer obeys it. With a sparsity
    below that of the pattern it is the sparsity that is asked for.

    Args:
      sparsity: the fraction to remove.
      pattern: the pattern.

    Returns:
      True for a full `NM`, and where nobody can say.
    """
    if not _checks.is_concrete(sparsity):
        return True
    if not isinstance(pattern, NM):
        return False
    return int(removed_count(sparsity, pattern.of)) >= pattern.of - pattern.keep


def check_budget(revived: Revived, pattern: Pattern) -> None:
    """Raises when something that is gone would have to come back.

    Args:
      revived: of each parameter that takes part.
      pattern: the pattern.

    Raises:
      ValueError: it would, with the path of the first.
    """
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
    """Parameters, but for complex ones the shapes of their scores, which are real.

    Args:
      params: a tree of arrays.

    Returns:
      A tree with their structure, to select by.
    """

    def one(w: Array) -> Any:
        if not jnp.iscomplexobj(w):
            return w
        return jax.ShapeDtypeStruct(jnp.shape(w), jnp.finfo(w.dtype).dtype)

    return jax.tree.map(one, params)


def gone_before(
    masks: PyTree, params: PyTree, pattern: Pattern, selected: PyTree, axes: AxesRule
) -> PyTree:
    """`gone_units` of a tree; False for what takes no part.

    Args:
      masks: what was pruned before, checked.
      params: the parameters; only their shapes are looked at.
      pattern: what lives or dies together.
      selected: a tree of bools.
      axes: as for `masks`.

    Returns:
      A tree of bools.
    """
    stated = resolve_axes(params, axes)

    def one(path: str, mask: Array, w: Array, taken: bool) -> Array:
        if not taken:
            return jnp.zeros((), bool)
        tiles = isinstance(pattern, Block)
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
    """The sparsity after each cut, by equal factors of density.

    Args:
      gone: of `gone_before`; None for a dense model.
      sparsity: after the last cut, a number or a tree.
      steps: how many cuts.
      pattern: who competes with whom.
      selected: a tree of bools.

    Returns:
      One for each cut.
    """
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
