"""`select`: which indices of which groups go, to a sparsity or to a budget."""

import math
import numbers
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxsparse import _checks
from jaxsparse.patterns import removed_count
from jaxsparse.structured._drop import Drop
from jaxsparse.structured._groups import Group
from jaxsparse.tree import nearest

Scope = Literal["group", "global", "isomorphic"] | Callable[[Group], Hashable]
GroupWhere = str | Callable[[str, Group], bool] | None
"""None for all that have scores, an expression on names, or `(name, group) -> bool`."""


def select(
    groups: Mapping[str, Group],
    scores: Mapping[str, Any],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "group",
    per_copy: bool = True,
    round_to: int = 1,
    min_keep: int = 1,
    max_sparsity: float | None = None,
    where: GroupWhere = None,
) -> Drop:
    """Chooses the indices with the lowest scores.

    The count rule: of n indices that compete `floor(s * n + 1/2)` go; of equal scores
    the lower index (the earlier group) is kept. Within a group, or within each scope.

    Copies (heads, experts, layers of a scan) lose equally many indices each, each its
    own. So the unit that competes is one index of every copy: the r-th unit of a group
    has the mean over the copies of each copy's r-th lowest score, and it counts as many
    indices as there are copies. A scope's counts are in units of their greatest common
    divisor.

    `round_to`, `min_keep` and `max_sparsity` come first: a scope goes on with other
    groups where one may lose no more, or where its next unit is larger than what is
    left of the count, and never removes more. It falls short of the count by less than
    one unit of a group that may still lose some. What was reached is
    `dropped_fraction(drop)`.

    It runs on the host, in a time of n log n.

    Differs from Torch-Pruning (Fang et al. 2023, arXiv:2301.12900), which removes all
    scores up to a threshold (more where some are equal), and repeats the same indices
    in each group or head (`per_copy=False`).

    Args:
      groups: of `js.structured.groups`.
      scores: `[*copies, size]` by name, larger = keep. Groups without scores stay.
      sparsity: the fraction of indices that goes, or one for each group; those that a
        mapping does not name stay. In a scope of several groups it is the sum of their
        shares that goes. A layer's density d of single weights becomes channels by
        `1 - sqrt(d)` (PreCropping, arXiv:2203.02549).
      scope: who competes: the indices of a "group", all of them ("global"; scores need
        a common scale, see `normalize_mean`), those of "isomorphic" groups (equal
        `Group.key`; Fang et al. 2024, arXiv:2407.04616), or those of groups for which a
        function has the same value.
      per_copy: whether each copy loses indices of its own. If not, the copies' scores
        are averaged and all lose the same.
      round_to: the number that is kept is rounded up to a multiple of this. A group
        with fewer indices is left alone.
      min_keep: how many indices each group (in each copy) keeps at least.
      max_sparsity: which fraction of each group may go at most.
      where: which groups take part.

    Returns:
      A `Drop` with an entry for every group that took part, of k = 0 where none goes.

    Raises:
      ValueError: scores of what is no group, of one that is not prunable, of another
        shape, or NaN; a sparsity outside [0, 1); options out of range; no group left.
      TypeError: scores that are not known yet (under jit), or options of another type.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.array([[1.0], [-9.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> scores = js.structured.group_scores(groups, js.scores.magnitude(params))
      >>> js.structured.select(groups, scores, 0.6)
      Drop(indices={'up[1]': array([0, 2])}, sizes={'up[1]': 3})
    """
    limits = _limits(round_to, min_keep, max_sparsity)
    if isinstance(sparsity, Mapping):
        _check_names("sparsity", sparsity, groups)
        scores = {name: x for name, x in scores.items() if name in sparsity}
    named = sparsity if isinstance(sparsity, Mapping) else {"sparsity": sparsity}
    for name, s in named.items():
        _checks.check_sparsity(s, name=name)
    chains = _chains(groups, scores, per_copy, limits, where)
    counts = [0] * len(chains)
    for chosen in _scopes(groups, chains, scope):
        several = [chains[i] for i in chosen]
        found = _fill(several, _total(several, sparsity))
        for i, count in zip(chosen, found, strict=True):
            counts[i] = count
    return _drop(chains, counts)


class Selected(NamedTuple):
    """What `select_to` chose.

    Attributes:
      drop: what goes.
      reached: its cost, at most the budget.
    """

    drop: Drop
    reached: float


def select_to(
    groups: Mapping[str, Group],
    scores: Mapping[str, Any],
    *,
    cost: Callable[[Drop], Any],
    budget: float,
    scope: Scope = "group",
    per_copy: bool = True,
    round_to: int = 1,
    min_keep: int = 1,
    max_sparsity: float | None = None,
    where: GroupWhere = None,
) -> Selected:
    """The fewest indices, from the lowest scores on, without which a budget is met.

    Indices go one unit after the other, each scope at the pace of its size: in the
    order in which a rising sparsity of `select` would remove them. A bisection finds
    the first place in that order where `cost` is within the budget; it asks for the
    cost some twenty times at most. One unit less would be beyond it, given that less
    never costs more.

    Args:
      groups: of `js.structured.groups`.
      scores: `[*copies, size]` by name, larger = keep. Groups without scores stay.
      cost: what is left when a `Drop` goes, for instance
        `lambda drop: js.structured.cost(trace, drop).parameters`.
      budget: what it may be at most, in the same unit.
      scope: as for `select`.
      per_copy: as for `select`.
      round_to: as for `select`.
      min_keep: as for `select`.
      max_sparsity: as for `select`.
      where: as for `select`.

    Returns:
      A `Selected`: the `Drop`, and its cost.

    Raises:
      ValueError: a budget that is not met with all removed that may be (the message has
        what can be reached); a cost that is NaN; as for `select`.
      TypeError: a cost that is no number; as for `select`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.array([[1.0], [-9.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> scores = js.structured.group_scores(groups, js.scores.magnitude(params))
      >>> left = lambda drop: 5 * (3 - len(drop.indices["up[1]"]))
      >>> found = js.structured.select_to(groups, scores, cost=left, budget=12)
      >>> found.drop.indices["up[1]"].tolist(), found.reached
      ([0], 10)
    """
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget must be a number, got {budget!r}.")
    if math.isnan(budget):
        raise ValueError("budget is NaN.")
    limits = _limits(round_to, min_keep, max_sparsity)
    chains = _chains(groups, scores, per_copy, limits, where)
    which, after = _pace(chains, _scopes(groups, chains, scope))

    def first(steps: int) -> Drop:
        counts = np.zeros(len(chains), np.int64)
        np.maximum.at(counts, which[:steps], after[:steps])
        return _drop(chains, counts)

    def costs(steps: int) -> Any:
        return _number(cost(first(steps)))

    low, high, reached = -1, len(which), costs(len(which))
    if not reached <= budget:
        raise ValueError(
            f"budget={budget}: without all that may go {reached} is left, of "
            f"{costs(0)}. Raise the budget, lower min_keep or round_to, raise "
            f"max_sparsity, or let more than these {len(chains)} groups take part."
        )
    while high - low > 1:
        middle = (low + high) // 2
        now = costs(middle)
        if now <= budget:
            high, reached = middle, now
        else:
            low = middle
    return Selected(first(high), reached)


def _number(x: Any) -> Any:
    if not isinstance(x, numbers.Real) and np.shape(x) != ():
        raise TypeError(f"cost(drop) must be one number, got {x!r}.")
    x = x if isinstance(x, numbers.Real) else np.asarray(x).item()
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"cost(drop) must be one number, got {x!r}.")
    if math.isnan(x):
        raise ValueError("cost(drop) is NaN.")
    return x


def dropped_fraction(drop: Drop) -> float:
    """Which fraction of the indices of its groups a specification removes.

    Args:
      drop: a specification.

    Returns:
      A number in [0, 1); each copy of a group counts its own indices. 0 for no groups.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> drop = js.structured.Drop({"up[1]": np.array([0, 2])}, {"up[1]": 8})
      >>> js.structured.dropped_fraction(drop)
      0.25
    """
    whole = sum(
        drop.sizes[name] * math.prod(np.shape(gone)[:-1])
        for name, gone in drop.indices.items()
    )
    return sum(np.size(gone) for gone in drop.indices.values()) / max(whole, 1)


class _Limits(NamedTuple):
    round_to: int
    min_keep: int
    most: float  # the fraction that may go


def _limits(round_to: int, min_keep: int, max_sparsity: float | None) -> _Limits:
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
    return _Limits(int(round_to), int(min_keep), float(most))


def _counts(limits: _Limits, size: int) -> np.ndarray:
    """The numbers of indices of a group that may go, ascending, 0 first."""
    # 0.7 * 10 is less than 7 in floating point.
    most = min(math.floor(limits.most * size + 1e-9), size - limits.min_keep)
    if size < limits.round_to or most <= 0:
        return np.zeros(1, np.int64)
    kept = np.arange(size // limits.round_to, 0, -1) * limits.round_to
    gone = size - kept
    return np.unique(np.append(gone[gone <= most], 0))


class _Chain(NamedTuple):
    """The indices of one group in the order in which they go.

    A step is what goes at once: one unit, or a block of them where counts are rounded.
    """

    name: str
    size: int
    copies: int
    order: np.ndarray  # [*copies, size], the first to go first
    after: np.ndarray  # [steps], how many are gone after each step
    score: np.ndarray  # [steps], ascending


def _chains(
    groups: Mapping[str, Group],
    scores: Mapping[str, Any],
    per_copy: bool,
    limits: _Limits,
    where: GroupWhere,
) -> list[_Chain]:
    _check_names("scores", scores, groups)
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


def _check_names(what: str, given: Iterable[str], groups: Mapping[str, Group]) -> None:
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
        pattern = re.compile(where)
        return lambda name, group: pattern.search(name) is not None
    if not callable(where):
        raise TypeError(
            "`where` must be None, a regular expression on the names of groups or a "
            f"predicate (name, group) -> bool; got {where!r}."
        )
    return where


def _chain(group: Group, scores: Any, per_copy: bool, limits: _Limits) -> _Chain:
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
    return _Chain(group.name, size, copies, order, after, score)


def _concrete(group: Group, scores: Any) -> np.ndarray:
    name, shape = group.name, (*group.copies, group.size)
    if not _checks.is_concrete(scores):
        raise TypeError(
            f"{name}: what goes changes shapes, so the scores have to be known: call "
            "select outside of jit."
        )
    x = np.asarray(scores)
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


def _scopes(
    groups: Mapping[str, Group], chains: list[_Chain], scope: Scope
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


def _sorted_steps(chains: list[_Chain]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All steps of a scope in the order in which they go.

    Args:
      chains: those that compete.

    Returns:
      For each step whose it is, how many of its indices are gone after it, and how many
      go in it, over all copies.
    """
    which = np.repeat(np.arange(len(chains)), [len(c.after) for c in chains])
    join = lambda parts: np.concatenate([np.zeros(0), *parts])
    score = join([c.score for c in chains])
    after = join([c.after for c in chains]).astype(np.int64)
    went = join([np.diff(c.after, prepend=0) * c.copies for c in chains])
    # By score; of equal ones the later group goes first, and each in its own order.
    order = np.lexsort((after, -which, score))
    return which[order], after[order], went[order].astype(np.int64)


def _total(chains: list[_Chain], sparsity: Any) -> int:
    """How many indices of a scope are to go, over all copies."""
    unit = math.gcd(*(c.copies for c in chains))
    sizes = [c.size * (c.copies // unit) for c in chains]
    if isinstance(sparsity, Mapping):
        each = [float(sparsity[c.name]) for c in chains]
        if len(set(each)) > 1:
            whole = math.fsum(map(operator.mul, each, sizes))
            return math.floor(whole + 0.5) * unit
        sparsity = sparsity[chains[0].name]
    return int(removed_count(sparsity, sum(sizes))) * unit


def _fill(chains: list[_Chain], total: int) -> list[int]:
    """How many indices of each go, to `total` at most over all copies."""
    which, after, went = _sorted_steps(chains)
    counts = [0] * len(chains)
    fits = int(np.searchsorted(np.cumsum(went), total, side="right"))
    for g, n in zip(which[:fits].tolist(), after[:fits].tolist(), strict=True):
        counts[g] = n
    left, closed = total - int(went[:fits].sum()), set()
    rest = zip(which[fits:], after[fits:], went[fits:], strict=True)
    for g, n, more in rest if left else ():
        if g in closed:
            continue
        if more > left:
            closed.add(g)  # what comes after it in its group cannot go without it
            if len(closed) == len(chains):
                break
            continue
        counts[g], left = int(n), left - int(more)
    return counts


def _pace(
    chains: list[_Chain], scopes: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """All steps in the order of the sparsity at which they go.

    Args:
      chains: all that take part.
      scopes: which of them compete.

    Returns:
      For each step whose it is, and how many of its indices are gone after it.
    """
    parts = []
    for chosen in scopes:
        several = [chains[i] for i in chosen]
        which, after, went = _sorted_steps(several)
        unit = math.gcd(*(c.copies for c in several))
        whole = sum(c.size * (c.copies // unit) for c in several)
        reached = (np.cumsum(went) / unit - 0.5) / whole
        parts.append((np.asarray(chosen)[which], after, reached))
    which, after, reached = (np.concatenate(x) for x in zip(*parts, strict=True))
    # Stable: within a scope the cumulative counts rise, so its order is kept.
    order = np.argsort(reached, kind="stable")
    return which[order], after[order]


def _drop(chains: list[_Chain], counts: Any) -> Drop:
    indices = {
        c.name: np.sort(c.order[..., : int(k)], axis=-1).astype(np.int64)
        for c, k in zip(chains, counts, strict=True)
    }
    return Drop(indices, {c.name: c.size for c in chains})
