"""Blocks of parameters that share a sparsity, and the fill that meets a total."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import PyTree, Where
from jaxsparse.allocations._global import _below_one, round_to_weights
from jaxsparse.patterns import removed_count
from jaxsparse.tree import leaves_with_paths, map_with_path, select

Groups = Callable[[str], str] | None
"""path -> name of its block; None for one block for each parameter."""

Blocks = dict[str, list[tuple[str, Any]]]


def grouped(tree: PyTree, sparsity: float, where: Where, groups: Groups) -> Blocks:
    """The selected parameters by block, empty ones left out."""
    _checks.check_sparsity(sparsity)
    if groups is not None:
        _checks.check_callable(1, groups=groups)
    selected = jax.tree.leaves(select(tree, where))
    blocks: Blocks = {}
    for (path, x), take in zip(leaves_with_paths(tree), selected, strict=True):
        if take and math.prod(x.shape):
            name = path if groups is None else groups(path)
            if not isinstance(name, str):
                raise TypeError(
                    f"{path}: groups must return the name of its block, got {name!r}."
                )
            blocks.setdefault(name, []).append((path, x))
    if not blocks:
        raise ValueError(
            "The selected parameters hold no weights: all their sizes are 0, or none "
            "is selected. Look at `where`."
        )
    return blocks


def weights_in(leaves: list[tuple[str, Any]]) -> int:
    """How many weights some leaves have."""
    return sum(math.prod(x.shape) for _, x in leaves)


def removed_in(sparsity: float, blocks: Blocks) -> int:
    """How many weights a sparsity removes."""
    return int(removed_count(sparsity, sum(map(weights_in, blocks.values()))))


def by_shift(
    tree: PyTree, sparsity: float, where: Where, blocks: Blocks, wanted: dict
) -> PyTree:
    """Sparsities `wanted` and a constant, cut to [0, 1], that meet the total."""
    size = np.array([weights_in(leaves) for leaves in blocks.values()], float)
    base = size * np.array([wanted[name] for name in blocks])
    found = fill(base, size, 0 * size, size, removed_in(sparsity, blocks))
    return spread_over(tree, where, blocks, dict(zip(blocks, found, strict=True)))


def fill(
    base: np.ndarray,
    slope: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    total: float,
) -> np.ndarray:
    """`clip(base + t * slope, low, high)` with the one t that makes the sum `total`.

    The sum is piecewise linear in t, so it is looked up between its corners.
    """
    at = lambda t: np.clip(base + t * slope, low, high)
    total = min(max(total, low.sum()), high.sum())
    corners = np.sort(np.concatenate([(low - base) / slope, (high - base) / slope]))
    t = float(np.interp(total, [at(c).sum() for c in corners], corners))
    found = at(t)
    inside = (found > low) & (found < high)
    if inside.any():  # what rounding left
        found[inside] += (total - found.sum()) * slope[inside] / slope[inside].sum()
    return np.clip(found, low, high)


def spread_over(
    tree: PyTree, where: Where, blocks: Blocks, removed: dict[str, float]
) -> PyTree:
    """The tree of sparsities, of which each block removes so many weights."""
    found = {
        path: _below_one(min(max(removed[name] / weights_in(leaves), 0.0), 1.0))
        for name, leaves in blocks.items()
        for path, _ in leaves
    }
    sparsities = map_with_path(lambda path, _: found.get(path, 0.0), tree)
    return round_to_weights(tree, sparsities, where=where)
