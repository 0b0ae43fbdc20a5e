"""Slices that lie in other slices, and those that cross."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxsparse._typing import PyTree
from jaxsparse.channels.slices import Part, Slices
from jaxsparse.channels.sums import entry_counts
from jaxsparse.tree import leaves_with_paths


def nesting(
    slices: Mapping[str, Slices], params: PyTree, *, disjoint: bool = False
) -> list[str]:
    """An order of groups: each set of slices comes before those that hold it."""
    counts = entry_counts(slices, params)
    order = sorted(slices, key=lambda name: float(counts[name].mean()))
    shapes = {path: np.shape(x) for path, x in leaves_with_paths(params)}
    rank = {name: i for i, name in enumerate(order)}
    shared: dict[tuple[str, str], np.ndarray] = {}
    for (one, part), (other, met) in _meetings(slices, rank):
        if part.path not in shapes:
            continue
        if one == other or disjoint or not set(part.axes) & set(met.axes):
            if _meet(part, met):
                raise ValueError(_OVERLAP.format(one, other, part.path))
            continue
        found = shared.setdefault((one, other), np.zeros((0, 3), np.int64))
        both = _common(part, met, shapes[part.path])
        shared[one, other] = np.concatenate([found, both])
    for (one, other), rows in shared.items():
        pairs, place = np.unique(rows[:, :2], axis=0, return_inverse=True)
        common = np.bincount(place.ravel(), rows[:, 2], minlength=len(pairs))
        if np.any(common != counts[one].ravel()[pairs[:, 0]]):
            raise ValueError(_OVERLAP.format(one, other, "their parameters"))
    return order


_OVERLAP = (
    "groups: slices of {0!r} and of {1!r} have entries of {2} in common that cannot be "
    "attributed to one of them. Pass fewer groups (for instance only those without "
    "`batched_by`, whole heads, or only those with it), or fewer roles."
)


def _meetings(
    slices: Mapping[str, Slices], rank: Mapping[str, int]
) -> Iterator[tuple[tuple[str, Part], tuple[str, Part]]]:
    """All pairs of parts in one parameter, that of the smaller slices first."""
    at: dict[str, list[tuple[str, Part]]] = {}
    for name in sorted(slices, key=rank.__getitem__):
        for part in slices[name].parts:
            at.setdefault(part.path, []).append((name, part))
    for parts in at.values():
        for i, first in enumerate(parts):
            for second in parts[i + 1 :]:
                yield first, second


def _over_both(p: Part, q: Part) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    axes = tuple(sorted({*p.axes, *q.axes}))
    fit = lambda part: np.expand_dims(
        part.labels, tuple(i for i, a in enumerate(axes) if a not in part.axes)
    )
    a, b = np.broadcast_arrays(fit(p), fit(q))
    return axes, a, b


def _meet(p: Part, q: Part) -> bool:
    if not set(p.axes) & set(q.axes):
        return bool(np.any(p.labels >= 0) and np.any(q.labels >= 0))
    _, a, b = _over_both(p, q)
    return bool(np.any((a >= 0) & (b >= 0)))


def _common(p: Part, q: Part, shape: tuple[int, ...]) -> np.ndarray:
    """Rows (index of p, index of q, how many entries both have)."""
    axes, a, b = _over_both(p, q)
    each = math.prod(n for i, n in enumerate(shape) if i not in axes)
    both = (a >= 0) & (b >= 0)
    pairs, n = np.unique(
        np.stack([a[both], b[both]], 1).astype(np.int64), axis=0, return_counts=True
    )
    return np.concatenate([pairs, each * n[:, None]], 1)
