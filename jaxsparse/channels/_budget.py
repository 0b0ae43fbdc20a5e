"""`drop_to_budget`: the fewest indices that have to go for a cost within a budget."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxsparse import _checks
from jaxsparse._host import on_host
from jaxsparse.channels._chains import (
    Chain,
    GroupWhere,
    Scope,
    chains_of,
    drop_after,
    limits_of,
    scopes_of,
    sorted_steps,
)
from jaxsparse.coupling.drop import Drop
from jaxsparse.coupling.grouping import Group


class Selected(NamedTuple):
    """The result of `drop_to_budget`.

    Attributes:
      drop: the channels to remove.
      reached: its cost, at most the budget.
    """

    drop: Drop
    reached: float


def drop_to_budget(
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
    """Remove as few of the lowest-scoring channels as needed to meet a budget.

    Channels are removed one unit after another, in the order in which a rising sparsity
    of `drop_lowest` would remove them; each scope at the pace of its size. A bisection
    finds the first place in that order where `cost` is within the budget, with about
    twenty calls of `cost`. Removing one unit fewer would exceed the budget, if removing
    fewer units never lowers the cost.

    Args:
      groups: from `js.coupling.groups`.
      scores: `[*copies, size]` by name, larger = keep. Groups without scores stay.
      cost: the cost that remains after a `Drop`, for instance `lambda drop:
        js.narrowing.cost(trace, drop).parameters`.
      budget: the largest allowed cost, in the same unit.
      scope: as for `drop_lowest`.
      per_copy: as for `drop_lowest`.
      round_to: as for `drop_lowest`.
      min_keep: as for `drop_lowest`.
      max_sparsity: as for `drop_lowest`.
      where: as for `drop_lowest`.

    Returns:
      A `Selected`: the `Drop`, and its cost.

    Raises:
      ValueError: a budget that is not met with all removed that may be (the message has
        what can be reached); a cost that is NaN; as for `drop_lowest`.
      TypeError: a cost that is not a number; as for `drop_lowest`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.array([[1.0], [-9.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> scores = js.channels.channel_scores(groups, js.scores.magnitude(params))
      >>> left = lambda drop: 5 * (3 - len(drop.indices["up[1]"]))
      >>> found = js.channels.drop_to_budget(groups, scores, cost=left, budget=12)
      >>> found.drop.indices["up[1]"].tolist(), found.reached
      ([0], 10)
    """
    _checks.check_callable(1, cost=cost)
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget must be a number, got {budget!r}.")
    if math.isnan(budget):
        raise ValueError("budget is NaN. Pass the largest cost that may be left.")
    limits = limits_of(round_to, min_keep, max_sparsity)
    chains = chains_of(groups, scores, per_copy, limits, where)
    which, after = _pace(chains, scopes_of(groups, chains, scope))

    def first(steps: int) -> Drop:
        counts = np.zeros(len(chains), np.int64)
        np.maximum.at(counts, which[:steps], after[:steps])
        return drop_after(chains, counts)

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
    x = x if isinstance(x, numbers.Real) else on_host(x).item()
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"cost(drop) must be one number, got {x!r}.")
    if math.isnan(x):
        raise ValueError("cost(drop) is NaN, so it cannot be compared with the budget.")
    return x


def _pace(
    chains: list[Chain], scopes: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """All steps in the order of the sparsity at which they go."""
    parts = []
    for chosen in scopes:
        several = [chains[i] for i in chosen]
        which, after, went = sorted_steps(several)
        unit = math.gcd(*(c.copies for c in several))
        whole = sum(c.size * (c.copies // unit) for c in several)
        reached = (np.cumsum(went) / unit - 0.5) / whole
        parts.append((np.asarray(chosen)[which], after, reached))
    which, after, reached = (np.concatenate(x) for x in zip(*parts, strict=True))
    # Stable: within a scope the cumulative counts rise, so its order is kept.
    order = np.argsort(reached, kind="stable")
    return which[order], after[order]
