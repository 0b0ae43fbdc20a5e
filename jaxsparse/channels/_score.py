"""`channel_scores`: the scores of weights, summed over what lives or dies together."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.channels.slices import ROLES, Part, Slices, check_fits, slices_of
from jaxsparse.channels.sums import Reduce, combined, ordered_part_sum
from jaxsparse.coupling.grouping import Group, check_groups
from jaxsparse.tree import leaves_with_paths, nearest, select


def channel_scores(
    groups: Mapping[str, Group],
    scores: PyTree,
    *,
    reduce: Reduce = "sum",
    absolute: bool = False,
    where: Where = None,
) -> dict[str, Array]:
    """Turn scores of weights into scores of channels.

    For each member of a group (an axis of a parameter) the scores of all weights of a
    channel are added up; then the members are reduced: `s[i] = reduce_m sum_{w in
    member m with index i} score(w)`. Any score will do: `js.scores.magnitude` or its
    square, `taylor`, an empirical Fisher, OBS.

    For `|sum w g|` over a slice (rather than `sum |w g|`) pass the signed products.
    With `absolute` the magnitude of each member's sum is taken before the members come
    together, as LLM-Pruner's "vectorize" and Torch-Pruning's multivariable Taylor do;
    without it `jnp.abs` of the result is the Taylor term of the whole group.

    A group with copies (heads, experts, layers of a scan, groups of a convolution) is
    scored in each copy.

    Scores of sharded parameters equal those of one device, bit for bit, so the same
    channels are chosen. Each parameter is read a few times for each of its axes that is
    in a group.

    Fang et al. (2023, arXiv:2301.12900). Differs from Torch-Pruning, whose mean counts
    a member as often as it is reached, which counts norm scales, and which leaves out
    embeddings: here `where` says which parameters count.

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are skipped.
      scores: a tree like the parameters, larger = keep. In 16 bits or not, they are
        added up in float32 at least.
      reduce: how to combine the members: their sum, mean, product or maximum, or
        "first", which takes only the first member (the one that produces the channel).
      absolute: takes the magnitude of each member's sum.
      where: which parameters count, see `jaxsparse.tree.select`; kernels by default.
        `lambda path, leaf: True` is all.

    Returns:
      `[*copies, size]` by the groups' names, float32 (float64 for float64 scores).
      Groups without a member that counts are left out.

    Raises:
      ValueError: an unknown `reduce`, a tree that does not fit the groups, no group
        that is prunable and counts.
      TypeError: scores that are not real floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.array([[1.0], [-9.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> js.channels.channel_scores(groups, js.scores.magnitude(params))
      {'up[1]': Array([ 5., 13.,  6.], dtype=float32)}
    """
    _checks.check_arrays(scores=scores)
    slices = slices_that_count(groups, scores, where)
    options: Any = {"reduce": reduce, "absolute": absolute}
    return combined(slices, scores, ordered_part_sum, **options)


def slices_that_count(
    groups: Mapping[str, Group],
    tree: PyTree,
    where: Where,
    *,
    roles: Collection[str] = ROLES,
) -> dict[str, Slices]:
    """The slices of prunable groups in those parameters that count."""
    check_groups(groups)
    prunable = {name: group for name, group in groups.items() if group.prunable}
    if not prunable:
        raise ValueError(
            f"groups: none of the {len(groups)} is prunable; print them to see why."
        )
    leaves = dict(leaves_with_paths(tree))
    taken = dict(leaves_with_paths(select(tree, where)))
    found = {}
    for name, whole in slices_of(prunable, roles=ROLES).items():
        pairs = zip(groups[name].members, whole.parts, strict=True)
        parts = [part for member, part in pairs if member.role in roles]
        for part in parts:
            _check(name, part, leaves, taken)
        parts = tuple(part for part in parts if taken[part.path])
        if parts:
            found[name] = Slices(whole.shape, parts)
    if not found:
        raise ValueError(
            f"groups: none of the {len(prunable)} prunable ones has a member with a "
            f"role in {tuple(roles)} among the parameters that `where` selects: "
            f"{[path for path, take in taken.items() if take][:8]}."
        )
    return found


def _check(name: str, part: Part, leaves: Mapping[str, Any], taken: Mapping) -> None:
    if part.path not in leaves:
        raise ValueError(
            f"{part.path}: group {name!r} lies in it, and the tree has no such leaf; "
            f"the nearest: {nearest(part.path, list(leaves))}. It must have the "
            "structure of the parameters that were traced."
        )
    x = leaves[part.path]
    check_fits(name, part, np.shape(x))
    if taken[part.path]:
        _checks.check_floating(part.path, x)
