"""Scores of some arrays at a time: those of all are a second copy of a model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxsparse._typing import Array, PyTree

_LEAST = 2**22  # weights; what is smaller is not worth a program more
_PARTS = 8


def in_parts(
    score: Callable[[list[Array]], list[Array]],
    choose: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    selected: PyTree,
) -> PyTree:
    """`choose(score(params), selected)`, with a part of the scores at a time.

    For scores that an array has by itself, and masks for which arrays do not compete.
    Under jit it is one part: XLA makes scores when they are needed.
    """
    leaves, treedef = jax.tree.flatten(params)
    taken = zip(leaves, jax.tree.leaves(selected), strict=True)
    parts = parts_of({i: x.size for i, (x, take) in enumerate(taken) if take}, _LEAST)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    if traced or len(parts) < 2:
        return choose(treedef.unflatten(score(leaves)), selected)

    def of_part(part: list[int]) -> list[Array]:
        scored = list(leaves)
        for i, x in zip(part, score([leaves[i] for i in part]), strict=True):
            scored[i] = x
        taken = treedef.unflatten([i in part for i in range(len(leaves))])
        # What is dispatched holds its arguments.
        masks = jax.block_until_ready(choose(treedef.unflatten(scored), taken))
        return jax.tree.leaves(masks)

    masks = of_part(parts[0])
    for part in parts[1:]:
        found = of_part(part)
        for i in part:
            masks[i] = found[i]
    return treedef.unflatten(masks)


def parts_of(sizes: Mapping[Any, int], least: int) -> list[list[Any]]:
    """The keys of some sizes, in lists of similar size that are not too small."""
    most = max(least, sum(sizes.values()) // _PARTS)
    parts, filled = [], 0
    for key, size in sizes.items():
        if not parts or filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(key)
        filled += size
    return parts
