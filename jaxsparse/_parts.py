"""Scores of some arrays at a time: those of all are a second copy of a model."""

from collections.abc import Callable, Sequence

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
    parts = _parts(leaves, jax.tree.leaves(selected))
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


def _parts(leaves: Sequence[Array], selected: Sequence[bool]) -> list[list[int]]:
    """Indices of what is selected, in lists of similar size."""
    sizes = {i: x.size for i, x in enumerate(leaves) if selected[i]}
    most = max(_LEAST, sum(sizes.values()) // _PARTS)
    parts, filled = [], most
    for i, size in sizes.items():
        if filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(i)
        filled += size
    return parts
