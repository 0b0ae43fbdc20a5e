"""The order in which the indices of groups go, and which groups compete."""

import math
import numbers
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxsparse import _checks
from jaxsparse._host import on_host
from jaxsparse.coupling.drop import Drop
from jaxsparse.coupling.grouping import Group, check_groups
from jaxsparse.tree import nearest

Scope = Literal["group", "global", "isomorphic"] | Callable[[Group], Hashable]
GroupWhere = str | Callable[[str, Group], bool] | None
"""None for all that have scores, an expression on names, or `(name, group) -> bool`."""


class Limits(NamedTuple):
    """What each group keeps, whatever its scores."""

    round_to: int  # how many are kept is a multiple of this
    min_keep: int  # how many are kept at least
    most: float  # the fraction that may go


def limits_of(round_to: int, min_keep: int, max_sparsity: float | None) -> Limits:
    """The limits that options ask for."""
    _checks.check_positive_int(round_to, name="round_to")
    _checks.check_positive_int(min_keep, name="min_keep")
    most = 1.0 if max_sparsity is None else max_sparsity
    if isinstance(most, bool) or not isinstance(most, numbers.Real):
        raise TypeError(f"max_sparsity must be a number, got {max_sparsity!r}.")
    if not 0 <= most <= 1:
        raise ValueError(
            "max_sparsity must lie in [0, 1], the fraction of each group that may go; "
            f"got {max_sparsity!r}."
        )
    return Limits(int(round_to), int(min_keep), float(most))


def _counts(limits: Limits, size: int) -> np.ndarray:
    """The numbers of indices of a group that may go, ascending, 0 first."""
    # 0.7 * 10 is less than 7 in floating point.
    most = min(math.floor(limits.most * size + 1e-9), size - limits.min_keep)
    if size < limits.round_to or most <= 0:
        return np.zeros(1, np.int64)
    kept = np.arange(size // limits.round_to, 0, -1) * limits.round_to
    gone = size - kept
    return np.unique(np.append(gone[gone <= most], 0))


class Chain(NamedTuple):
    """The indices of one group in the order in which they go.

    A step is what goes at once: one unit, or a block of them where counts are rounded.
    """

    name: str
    size: int
    copies: int
    order: np.ndarray  # [*copies, size], the first to go first
    after: np.ndarray  # [steps], how many are gone after each step
    score: np.ndarray  # [steps], ascending


def chains_of(
    groups: Mapping[str, Group],
    scores: Mapping[str, Any],
    per_copy: bool,
    limits: Limits,
    where: GroupWhere,
) -> list[Chain]:
    """The chains of all groups that take part."""
    check_groups(groups)
    _checks.check_mapping(made_by="js.channels.channel_scores(...)", scores=scores)
    check_names("scores", scores, groups)
    for name in scores:
        if not groups[name].prunable:
            why = "; ".join(map(str, groups[name].reasons))
            raise ValueError(
                f"{name}: there are scores of it, but it is not prunable: {why}."
            )
    takes = _predicate(where)
    names = [name for name in groups if name in scores and takes(name, groups[name])]
    if not names:
        raise ValueError(
            f"No group takes part: there are scores of {list(scores)[:8]}, and where="
            f"{where!r}. (It is matched with the names of groups.)"
        )
    return [_chain(groups[name], scores[name], per_copy, limits) for name in names]


def check_names(what: str, given: Iterable[str], groups: Mapping[str, Group]) -> None:
    """Raises a ValueError unless all names are those of groups."""
    for name in given:
        if name not in groups:
            raise ValueError(
                f"{name}: {what} names it, and there is no such group; the nearest: "
                f"{nearest(name, list(groups))}."
            )


def _predicate(where: GroupWhere) -> Callable[[str, Group], bool]:
    if where is None:
        return lambda name, group: True
    if isinstance(where, str):
        _checks.check_expression(where, name="where")
        pattern = re.compile(where)
        return lambda name, group: pattern.search(name) is not None
    if not callable(where):
        raise TypeError(
            "`where` must be None, a regular expression on the names of groups or a "
            f"predicate (name, group) -> bool; got {where!r}."
        )
    _checks.check_callable(2, where=where)
    return where


def _chain(group: Group, scores: Any, per_copy: bool, limits: Limits) -> Chain:
    x = _concrete(group, scores)
    size, copies = group.size, math.prod(group.copies)
    if not per_copy:
        x = np.mean(x.reshape(copies, size), axis=0)
    # Backwards, so that the sort leaves the higher of equal indices in front.
    order = size - 1 - np.argsort(x[..., ::-1], axis=-1, kind="stable")
    units = np.mean(np.sort(x, axis=-1).reshape(-1, size), axis=0)
    if not per_copy:
        order = np.broadcast_to(order, (*group.copies, size))
    gone = _counts(limits, size)
    after, before = gone[1:], gone[:-1]
    blocks = np.add.reduceat(units[: gone[-1]], before) if len(after) else np.zeros(0)
    # Means of blocks of different sizes may differ by rounding where scores are equal.
    score = np.maximum.accumulate(blocks / (after - before))
    return Chain(group.name, size, copies, order, after, score)


def _concrete(group: Group, scores: Any) -> np.ndarray:
    name, shape = group.name, (*group.copies, group.size)
    if not _checks.is_concrete(scores):
        raise TypeError(
            f"{name}: chosen channels decide shapes, so scores must not be traced: "
            "call js.channels.drop_lowest outside of jit."
        )
    x = on_host(scores)
    if x.shape != shape:
        raise ValueError(
            f"{name}: scores of shape {x.shape} for a group of {shape} (copies, size)."
        )
    x = x.astype(np.float64)
    if np.isnan(x).any():
        raise ValueError(
            f"{name}: {int(np.isnan(x).sum())} of {x.size} scores are NaN, so an order "
            "of its indices does not exist. Look for NaN in the parameters or the "
            "gradients."
        )
    return x


def scopes_of(
    groups: Mapping[str, Group], chains: list[Chain], scope: Scope
) -> list[list[int]]:
    """Which chains compete with one another."""
    if scope == "group":
        return [[i] for i in range(len(chains))]
    if scope == "global":
        return [list(range(len(chains)))]
    if scope != "isomorphic" and not callable(scope):
        raise ValueError(
            f"scope={scope!r}: expected 'group', 'global', 'isomorphic' or a function "
            "of a group."
        )
    of = scope if callable(scope) else lambda group: group.key
    found: dict[Hashable, list[int]] = {}
    for i, chain in enumerate(chains):
        found.setdefault(of(groups[chain.name]), []).append(i)
    return list(found.values())


def sorted_steps(chains: list[Chain]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All steps of a scope in the order in which they go."""
    which = np.repeat(np.arange(len(chains)), [len(c.after) for c in chains])
    join = lambda parts: np.concatenate([np.zeros(0), *parts])
    score = join([c.score for c in chains])
    after = join([c.after for c in chains]).astype(np.int64)
    went = join([np.diff(c.after, prepend=0) * c.copies for c in chains])
    # By score; of equal ones the later group goes first, and each in its own order.
    order = np.lexsort((after, -which, score))
    return which[order], after[order], went[order].astype(np.int64)


def drop_after(chains: list[Chain], counts: Any) -> Drop:
    """What is gone when so many indices of each chain are."""
    indices = {
        c.name: np.sort(c.order[..., : int(k)], axis=-1).astype(np.int64)
        for c, k in zip(chains, counts, strict=True)
    }
    return Drop(indices, {c.name: c.size for c in chains})
