"""What the indices of groups are in the parameters.

The slices of an index are its entries in all members of its group. Which entries those
are is known before any number is: index arrays of the host, so that what works on the
parameters (`_sums.py`, `_scaling.py`) can be jitted.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse._dtypes import as_wide, wide_dtype
from jaxsparse._typing import Array, PyTree
from jaxsparse.coupling.grouping import Group, Member, check_groups
from jaxsparse.tree import leaves_with_paths, nearest, path_str

ROLES = ("input", "output", "batch", "other")
PRODUCERS = ("output", "batch", "other")


class Part(NamedTuple):
    """Where the indices of a group lie in one parameter."""

    path: str
    axes: tuple[int, ...]  # those of its axes that tell which index, and which copy
    # Over those axes the place in the group's flat `[*copies, size]`, int32; -1 where
    # there is none
    labels: np.ndarray


class Slices(NamedTuple):
    """The slices of a group."""

    shape: tuple[int, ...]  # `(*copies, size)`
    parts: tuple[Part, ...]  # one for each member that takes part


def slices_of(
    groups: Mapping[str, Group], *, roles: Collection[str] = PRODUCERS
) -> dict[str, Slices]:
    """Finds the slices of groups."""
    check_groups(groups)
    if isinstance(roles, str) or not roles or set(roles) - set(ROLES):
        raise ValueError(f"roles={roles!r}: expected a tuple of some of {ROLES}.")
    if not groups:
        raise ValueError(
            "groups: there are none. js.coupling.groups(trace) finds those of a model."
        )
    found = {}
    for name, group in groups.items():
        if not group.prunable:
            why = "; ".join(map(str, group.reasons))
            raise ValueError(
                f"groups: {name!r} is not prunable ({why}). Pass the prunable ones, "
                "js.coupling.groups(trace).prunable."
            )
        parts = tuple(_part(m, group) for m in group.members if m.role in roles)
        if not parts:
            has = sorted({m.role for m in group.members})
            raise ValueError(
                f"groups: {name!r} has no member with a role in {tuple(roles)}, only "
                f"{has}. Leave the group out or choose other roles."
            )
        found[name] = Slices((*group.copies, group.size), parts)
    return found


def _part(member: Member, group: Group) -> Part:
    along = [*member.copies, (member.axis, member.index)]
    axes = tuple(sorted({axis for axis, _ in along}))

    def over_axes(axis: int, index: np.ndarray) -> np.ndarray:
        return index.reshape([-1 if a == axis else 1 for a in axes])

    labels, missing = np.zeros((1,) * len(axes), np.int64), np.zeros((), bool)
    for size, (axis, index) in zip((*group.copies, group.size), along, strict=True):
        here = over_axes(axis, index)
        labels, missing = labels * size + here, missing | (here < 0)
    return Part(member.path, axes, np.where(missing, -1, labels).astype(np.int32))


def check_params(slices: Mapping[str, Slices], params: PyTree) -> None:
    """Raises unless slices are those of these parameters.

    Leaves that `optax.masked` or `optax.partition` hide, and None, may be missing.
    """
    leaves = dict(leaves_with_paths(params))
    if not leaves:
        return
    hidden = _hidden(params)
    for name, s in slices.items():
        for part in s.parts:
            if part.path in leaves:
                _check_part(name, part, leaves[part.path])
            elif not any(f"{part.path}/".startswith(h) for h in hidden):
                close = nearest(part.path, list(leaves))
                raise ValueError(
                    f"groups: {name!r} lies in {part.path!r}, which the parameters "
                    f"have not; nearest: {close}. Trace a function of what the "
                    "optimizer trains: js.trace(lambda params, x: model.apply("
                    "{'params': params, **rest}, x), params, x)."
                )
        if not any(part.path in leaves for part in s.parts):
            raise ValueError(
                f"groups: all members of {name!r} are hidden from this "
                "transformation. Leave the group out."
            )


def _hidden(params: PyTree) -> list[str]:
    gone = lambda x: x is None or isinstance(x, optax.MaskedNode)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=gone)
    return [f"{path_str(path)}/" for path, x in leaves if gone(x)]


def _check_part(name: str, part: Part, w: Any) -> None:
    check_fits(name, part, np.shape(w))
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"{part.path}: expected real floating-point numbers for group {name!r}, "
            f"got {w.dtype}."
        )


def check_fits(name: str, part: Part, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless a part of a group fits the parameter's shape."""
    have = tuple(shape[a] for a in part.axes if a < len(shape))
    if have != part.labels.shape:
        raise ValueError(
            f"{part.path}: group {name!r} expects sizes {part.labels.shape} along the "
            f"axes {part.axes}, got a parameter of shape {shape}. Were the groups made "
            "for another model?"
        )


def paths_of(slices: Mapping[str, Slices]) -> list[str]:
    """The parameters in which slices lie, each once."""
    return list(dict.fromkeys(p.path for s in slices.values() for p in s.parts))


def others_of(part: Part, ndim: int) -> tuple[int, ...]:
    """The axes of a parameter that do not tell which index."""
    return tuple(a for a in range(ndim) if a not in part.axes)


def is_plain(part: Part, size: int) -> bool:
    """Whether a part has each place of its group once, in their order."""
    labels = part.labels.ravel()
    return len(labels) == size and np.array_equal(labels, np.arange(size))


def wide_leaves(slices: Mapping[str, Slices], tree: PyTree) -> dict[str, Array]:
    """The leaves that slices lie in, by path, in float32 at least."""
    leaves = dict(leaves_with_paths(tree))
    return {p: as_wide(leaves[p]) for p in paths_of(slices) if p in leaves}


def dtype_of(slices: Mapping[str, Slices], tree: PyTree) -> np.dtype:
    """The widest dtype of the leaves that slices lie in, float32 at least."""
    leaves = dict(leaves_with_paths(tree))
    return wide_dtype(*(leaves[p].dtype for p in paths_of(slices) if p in leaves))
