"""`group_scores`: the scores of weights, summed over what lives or dies together."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import _checks
from jaxsparse._sharded import explicit_mesh
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.structured._groups import Group
from jaxsparse.structured._slices import ROLES, Part, Slices, slices_of
from jaxsparse.tree import leaves_with_paths, nearest, select

Reduce = Literal["sum", "mean", "max"]
Measure = Callable[[Part, Array, tuple[int, ...]], Array]
"""`f(part, leaf, shape) -> [prod(shape)]`: what one member says of each index."""


def group_scores(
    groups: Mapping[str, Group],
    scores: PyTree,
    *,
    reduce: Reduce = "sum",
    where: Where = None,
) -> dict[str, Array]:
    """Scores of groups from scores of weights.

    For each member of a group (an axis of a parameter) the scores of all weights that
    have an index are added up; then come the members: `s[i] = reduce_m sum_{w in
    member m with index i} score(w)`. Any score will do: `js.scores.magnitude` or its
    square, `taylor`, an empirical Fisher, OBS. For `|sum w g|` over a slice (rather
    than `sum |w g|`) pass the signed products, and take the magnitude of the result.

    A group with copies (heads, experts, layers of a scan, groups of a convolution) is
    scored in each copy.

    Complexity: each parameter is read once for each of its axes that is in a group.

    Fang et al. (2023, arXiv:2301.12900). Differs from Torch-Pruning, whose mean counts
    a member as often as it is reached, whose norm scales take part and whose
    embeddings do not: here `where` says which do.

    Args:
      groups: of `js.structured.groups`. Those that are not prunable are passed over.
      scores: a tree like the parameters, larger = keep. In 16 bits or not, they are
        added up in float32 at least.
      reduce: of the members: their sum, their mean, or the largest.
      where: which parameters count, see `jaxsparse.tree.select`; kernels by default.
        `lambda path, leaf: True` is all.

    Returns:
      `[*copies, size]` by the groups' names, float32 (float64 for float64 scores).
      Groups of which no member counts are left out: nothing is known of them.

    Raises:
      ValueError: an unknown `reduce`, a tree that does not fit the groups, no group
        that is prunable and counts.
      TypeError: scores that are not real floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.array([[1.0], [-9.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> js.structured.group_scores(groups, js.scores.magnitude(params))
      {'up[1]': Array([ 5., 13.,  6.], dtype=float32)}
    """
    slices = slices_that_count(groups, scores, where)
    return combined(slices, scores, member_sum, reduce=reduce)


def slices_that_count(
    groups: Mapping[str, Group],
    tree: PyTree,
    where: Where,
    *,
    roles: Collection[str] = ROLES,
) -> dict[str, Slices]:
    """The slices of prunable groups in those parameters that count.

    Args:
      groups: groups by name; those that are not prunable are passed over.
      tree: like the parameters.
      where: which of them count.
      roles: which members count.

    Returns:
      By name, without groups of which no member counts.

    Raises:
      ValueError: there is none, or one lies in a parameter that is not there or of
        another shape.
      TypeError: a member that is not real floating-point.
    """
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
    shape = np.shape(x)
    sizes = [shape[a] if a < len(shape) else None for a in part.axes]
    if sizes != list(part.labels.shape):
        raise ValueError(
            f"{part.path}: group {name!r} expects sizes {list(part.labels.shape)} "
            f"along the axes {list(part.axes)}, got a leaf of shape {shape}. Were the "
            "groups made for another model?"
        )
    if taken[part.path]:
        _checks.check_floating(part.path, x)


class _Measured(NamedTuple):
    values: Array
    present: np.ndarray  # which indices the member has at all


def combined(
    slices: Mapping[str, Slices],
    tree: PyTree,
    measure: Measure,
    *,
    reduce: Reduce = "sum",
) -> dict[str, Array]:
    """What the members of each group say of its indices, together.

    Args:
      slices: the members that count.
      tree: like the parameters.
      measure: of one member.
      reduce: of all members.

    Returns:
      `[*copies, size]` by the groups' names, on every device.

    Raises:
      ValueError: an unknown `reduce`.
    """
    if reduce not in ("sum", "mean", "max"):
        raise ValueError(f"reduce={reduce!r}: expected 'sum', 'mean' or 'max'.")
    paths = {part.path for s in slices.values() for part in s.parts}
    leaves = {path: x for path, x in leaves_with_paths(tree) if path in paths}

    def all_groups(leaves: dict[str, Array]) -> dict[str, Array]:
        return {name: one(s, leaves) for name, s in slices.items()}

    def one(s: Slices, leaves: dict[str, Array]) -> Array:
        found = [
            _Measured(measure(part, leaves[part.path], s.shape), _present(part, s))
            for part in s.parts
        ]
        return _reduced(found, reduce).reshape(s.shape)

    mesh = explicit_mesh(list(leaves.values()))
    if mesh is None:
        return all_groups(leaves)
    # Sums over differently sharded axes cannot be added where shardings are types.
    plain = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in leaves.items()}
    everywhere = lambda _: NamedSharding(mesh, P())
    shardings: Any = jax.tree.map(everywhere, jax.eval_shape(all_groups, plain))
    automatic: Any = jax.sharding.auto_axes(all_groups, out_sharding=shardings)
    return automatic(leaves)


def _present(part: Part, s: Slices) -> np.ndarray:
    labels = part.labels[part.labels >= 0]
    return np.bincount(labels, minlength=math.prod(s.shape)) > 0


def _reduced(found: list[_Measured], reduce: Reduce) -> Array:
    dtype = wide_dtype(*[values.dtype for values, _ in found])
    arrays = [values.astype(dtype) for values, _ in found]
    present = np.stack([here for _, here in found])
    if reduce == "max":
        if not present.all():
            low = jnp.asarray(-jnp.inf, dtype)
            arrays = [
                jnp.where(here, x, low) for x, here in zip(arrays, present, strict=True)
            ]
        total = arrays[0]
        for x in arrays[1:]:
            total = jnp.maximum(total, x)
        zero = jnp.zeros((), dtype)
        return total if present.any(0).all() else jnp.where(present.any(0), total, zero)
    total = sum(arrays[1:], start=arrays[0])
    if reduce == "mean":
        total = total / jnp.asarray(np.maximum(present.sum(0), 1), dtype)
    return total


def member_sum(part: Part, x: Array, shape: tuple[int, ...]) -> Array:
    """The sum over all entries with an index, of one member.

    Args:
      part: where the indices are.
      x: the leaf.
      shape: `(*copies, size)`.

    Returns:
      `[prod(shape)]`, in float32 at least.
    """
    wide = wide_dtype(x.dtype)
    others = tuple(a for a in range(x.ndim) if a not in part.axes)
    by_place = jnp.sum(x, axis=others, dtype=wide).ravel()
    labels, total = part.labels.ravel(), math.prod(shape)
    if len(labels) == total and np.array_equal(labels, np.arange(total)):
        return by_place
    # What has no index gets a number that is out of range, which segment_sum drops.
    labels = np.where(labels < 0, total, labels)
    return jax.ops.segment_sum(by_place, labels, num_segments=total)


def wide_dtype(*dtypes: Any) -> np.dtype:
    """The widest of floating dtypes, float32 at least, under any promotion rules."""
    known = [np.dtype(np.float32), *map(np.dtype, dtypes)]
    return max(known, key=lambda dtype: dtype.itemsize)
