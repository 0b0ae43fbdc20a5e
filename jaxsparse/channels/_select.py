"""`drop_lowest`: which indices of which groups go, to a sparsity."""

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsparse import _checks
from jaxsparse.channels._chains import (
    Chain,
    GroupWhere,
    Scope,
    chains_of,
    check_names,
    drop_after,
    limits_of,
    scopes_of,
    sorted_steps,
)
from jaxsparse.coupling.drop import Drop
from jaxsparse.coupling.grouping import Group
from jaxsparse.patterns import removed_count


def drop_lowest(
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
    """Choose the lowest-scoring channels.

    The count rule holds within a group, or within each scope: of n channels that
    compete, `floor(s * n + 1/2)` are removed. Of equal scores the lower index (the
    earlier group) is kept.

    Copies (heads, experts, layers of a scan) lose equally many channels each, and each
    its own. The unit that competes is therefore one channel of every copy: the r-th
    unit of a group has the mean over the copies of each copy's r-th lowest score, and
    counts as many channels as there are copies. Counts of a scope are in units of their
    greatest common divisor.

    `round_to`, `min_keep` and `max_sparsity` come first. Where a group may lose no
    more, or its next unit is larger than the rest of the count, the scope continues
    with other groups. If limits prevent an exact count, it removes at most one unit
    fewer than requested, never more. `dropped_fraction(drop)` is the fraction that it
    reached.

    It runs on the host, in O(n log n).

    Differs from Torch-Pruning (Fang et al. 2023, arXiv:2301.12900), which removes all
    scores up to a threshold (more where some are equal), and removes the same channels
    in each group or head (`per_copy=False`).

    Args:
      groups: from `js.coupling.groups`.
      scores: `[*copies, size]` by name, larger = keep. Groups without scores stay.
      sparsity: the fraction of channels to remove, or one for each group; groups that a
        mapping does not name keep all channels. In a scope of several groups the sum of
        their shares is removed. A layer's density d of single weights becomes channels
        by `1 - sqrt(d)` (PreCropping, arXiv:2203.02549).
      scope: which channels compete: the channels of a "group", all of them ("global";
        scores need a common scale, see `normalize_mean`), the channels of "isomorphic"
        groups (equal `Group.key`; Fang et al. 2024, arXiv:2407.04616), or of groups for
        which a function has the same value.
      per_copy: whether each copy loses channels of its own. If not, the copies' scores
        are averaged and all copies lose the same channels.
      round_to: rounds the number of kept channels up to a multiple of this. A group
        with fewer channels is left alone.
      min_keep: how many channels each group (in each copy) keeps at least.
      max_sparsity: the largest fraction of each group that may be removed.
      where: which groups take part.

    Returns:
      A `Drop` with an entry for every group that took part, empty where it loses no
      channel.

    Raises:
      ValueError: scores of an unknown group, of a group that is not prunable, of
        another shape, or NaN; a sparsity outside [0, 1); options out of range; no group
        left.
      TypeError: scores that are not known yet (under jit), or options of another type.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.array([[1.0], [-9.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> scores = js.channels.channel_scores(groups, js.scores.magnitude(params))
      >>> js.channels.drop_lowest(groups, scores, 0.6)
      Drop(indices={'up[1]': array([0, 2])}, sizes={'up[1]': 3})
    """
    limits = limits_of(round_to, min_keep, max_sparsity)
    if isinstance(sparsity, Mapping):
        check_names("sparsity", sparsity, groups)
        scores = {name: x for name, x in scores.items() if name in sparsity}
    named = sparsity if isinstance(sparsity, Mapping) else {"sparsity": sparsity}
    for name, s in named.items():
        _checks.check_sparsity(s, name=name)
    chains = chains_of(groups, scores, per_copy, limits, where)
    counts = [0] * len(chains)
    for chosen in scopes_of(groups, chains, scope):
        several = [chains[i] for i in chosen]
        found = _fill(several, _total(several, sparsity))
        for i, count in zip(chosen, found, strict=True):
            counts[i] = count
    return drop_after(chains, counts)


def dropped_fraction(drop: Drop) -> float:
    """Return the fraction of the channels of its groups that a `Drop` removes.

    Args:
      drop: the channels to remove.

    Returns:
      A number in [0, 1); each copy of a group counts its own channels. 0 for no groups.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> drop = js.coupling.Drop({"up[1]": np.array([0, 2])}, {"up[1]": 8})
      >>> js.channels.dropped_fraction(drop)
      0.25
    """
    _checks.check_is(Drop, "js.channels.drop_lowest(...)", drop=drop)
    whole = sum(
        drop.sizes[name] * math.prod(np.shape(gone)[:-1])
        for name, gone in drop.indices.items()
    )
    return sum(np.size(gone) for gone in drop.indices.values()) / max(whole, 1)


def _total(chains: list[Chain], sparsity: Any) -> int:
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


def _fill(chains: list[Chain], total: int) -> list[int]:
    """How many indices of each go, to `total` at most over all copies."""
    which, after, went = sorted_steps(chains)
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
