"""What the indices of groups are in the parameters: their norms, and scaling them.

The slices of an index are its entries in all members of its group. Which entries those
are is known before any number is: index arrays of the host, so that everything here
that works on parameters can be jitted.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse._sharded import explicit_mesh, sharded_like
from jaxsparse._typing import Array, PyTree
from jaxsparse.structured._drop import Drop
from jaxsparse.structured._groups import Group, Member
from jaxsparse.tree import leaves_with_paths, map_with_path, nearest, path_str

ROLES = ("input", "output", "batch", "other")
PRODUCERS = ("output", "batch", "other")


class Part(NamedTuple):
    """Where the indices of a group lie in one parameter.

    Attributes:
      path: the parameter's path.
      axes: those of its axes that tell which index, and which copy.
      labels: over those axes the place in the group's flat `[*copies, size]`, int32; -1
        where there is none.
    """

    path: str
    axes: tuple[int, ...]
    labels: np.ndarray


class Slices(NamedTuple):
    """The slices of a group.

    Attributes:
      shape: `(*copies, size)`.
      parts: one for each member that takes part.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def slices_of(
    groups: Mapping[str, Group], *, roles: Collection[str] = PRODUCERS
) -> dict[str, Slices]:
    """Finds the slices of groups.

    Args:
      groups: groups by name, all of them prunable.
      roles: which members take part, by what their axis is to a kernel. Without
        "input" they are the producers: what makes a channel, and not what reads it.

    Returns:
      The slices by the groups' names.

    Raises:
      ValueError: no groups, one that is not prunable, unknown roles, or a group without
        members of these roles.
    """
    if isinstance(roles, str) or not roles or set(roles) - set(ROLES):
        raise ValueError(f"roles={roles!r}: expected a tuple of some of {ROLES}.")
    if not groups:
        raise ValueError("groups: there are none.")
    found = {}
    for name, group in groups.items():
        if not group.prunable:
            why = "; ".join(map(str, group.reasons))
            raise ValueError(
                f"groups: {name!r} is not prunable ({why}). Pass the prunable ones, "
                "js.structured.groups(trace).prunable."
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

    Args:
      slices: of `slices_of`.
      params: the parameters. A tree without any leaf, as optax makes it to ask for the
        structure of a state, passes.

    Raises:
      ValueError: a parameter that is not there or has another shape, or a group all of
        whose members are hidden.
      TypeError: a parameter that is not real floating-point.
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
    shape = np.shape(w)
    have = tuple(shape[a] for a in part.axes if a < len(shape))
    if have != part.labels.shape:
        raise ValueError(
            f"{part.path}: group {name!r} expects sizes {part.labels.shape} along axes "
            f"{part.axes}, got a parameter of shape {shape}. Were the groups made for "
            "another model?"
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"{part.path}: expected real floating-point numbers, got {w.dtype}."
        )


def paths_of(slices: Mapping[str, Slices]) -> list[str]:
    """The parameters in which slices lie, each once."""
    return list(dict.fromkeys(p.path for s in slices.values() for p in s.parts))


def wide_leaves(slices: Mapping[str, Slices], tree: PyTree) -> dict[str, Array]:
    """The leaves that slices lie in, by path, in float32 at least."""
    leaves = dict(leaves_with_paths(tree))
    return {p: widen(leaves[p]) for p in paths_of(slices) if p in leaves}


def widen(w: Array) -> Array:
    """In float32, if it has less than that."""
    return w.astype(jnp.float32) if w.dtype.itemsize < 4 else w


def sums(
    slices: Mapping[str, Slices], entries: Mapping[str, Array]
) -> dict[str, Array]:
    """The sum over each index's slices.

    Args:
      slices: of `slices_of`.
      entries: arrays of the parameters' shapes, by path, for instance squares. Those
        that are missing count nothing.

    Returns:
      `[*copies, size]` by the groups' names, on every device.
    """
    # The widest there is, at least float32; not promoted, which could be forbidden.
    dtypes = [jnp.dtype(jnp.float32), *(x.dtype for x in entries.values())]
    dtype = max(dtypes, key=lambda kind: kind.itemsize)

    def all_groups(entries: dict[str, Array]) -> dict[str, Array]:
        result = {}
        for name, s in slices.items():
            total = jnp.zeros(math.prod(s.shape), dtype)
            for part in s.parts:
                if part.path in entries:
                    total = _add_part(total, part, entries[part.path].astype(dtype))
            result[name] = total.reshape(s.shape)
        return result

    used = {p: entries[p] for p in paths_of(slices) if p in entries}
    mesh = explicit_mesh(list(used.values()))
    if mesh is None:
        return all_groups(used)
    # Sums over differently sharded axes cannot be added where shardings are types.
    plain = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in used.items()}
    everywhere = lambda _: NamedSharding(mesh, P())
    shardings: Any = jax.tree.map(everywhere, jax.eval_shape(all_groups, plain))
    automatic: Any = jax.sharding.auto_axes(all_groups, out_sharding=shardings)
    return automatic(used)


def _add_part(total: Array, part: Part, x: Array) -> Array:
    x = jnp.sum(x, axis=_others(part, x.ndim)).ravel()
    labels = part.labels.ravel()
    if _is_plain(labels, total.size):
        return total + x
    beyond = np.where(labels < 0, total.size, labels)
    return total.at[beyond].add(x, mode="drop")


def _others(part: Part, ndim: int) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a not in part.axes)


def _is_plain(labels: np.ndarray, size: int) -> bool:
    return len(labels) == size and np.array_equal(labels, np.arange(size))


def squared_norms(slices: Mapping[str, Slices], params: PyTree) -> dict[str, Array]:
    """The squared L2 norm of each index's slices.

    Args:
      slices: of `slices_of`.
      params: the parameters.

    Returns:
      `[*copies, size]` by the groups' names, in float32 at least.
    """
    return sums(slices, {p: w * w for p, w in wide_leaves(slices, params).items()})


def spread(
    slices: Mapping[str, Slices],
    vectors: Mapping[str, Array],
    ndims: Mapping[str, int],
    *,
    combine: Callable[[Array, Array], Array],
    fill: float,
) -> dict[str, Array]:
    """Each index's number at all entries of its slices.

    Args:
      slices: of `slices_of`.
      vectors: `[*copies, size]` by the groups' names.
      ndims: the ranks of the parameters, by path; those that are missing are left out.
      combine: of the numbers of two groups that share a parameter.
      fill: where a group has no index; neutral to `combine`.

    Returns:
      By path an array that broadcasts to the parameter.
    """
    result: dict[str, Array] = {}
    for name, s in slices.items():
        flat = vectors[name].ravel()
        for part in s.parts:
            if part.path in ndims:
                x = _at_entries(flat, part, ndims[part.path], fill)
                before = result.get(part.path)
                result[part.path] = x if before is None else combine(before, x)
    return result


def _at_entries(flat: Array, part: Part, ndim: int, fill: float) -> Array:
    labels = part.labels
    if _is_plain(labels.ravel(), flat.size):
        x = flat.reshape(labels.shape)
    else:
        if np.any(labels < 0):
            flat = jnp.append(flat, jnp.asarray(fill, flat.dtype))
            labels = np.where(labels < 0, flat.size - 1, labels)
        x = flat[labels]
    return jnp.expand_dims(x, _others(part, ndim))


def factors_of(
    slices: Mapping[str, Slices], vectors: Mapping[str, Array], tree: PyTree
) -> dict[str, Array]:
    """What each parameter is multiplied by when each index's slices are.

    Args:
      slices: of `slices_of`.
      vectors: `[*copies, size]` by the groups' names.
      tree: parameters or gradients.

    Returns:
      By path an array that broadcasts to the leaf.
    """
    ndims = {path: np.ndim(x) for path, x in leaves_with_paths(tree)}
    return spread(slices, vectors, ndims, combine=jnp.multiply, fill=1.0)


def scaled_updates(
    updates: PyTree, params: PyTree, factors: Mapping[str, Array]
) -> PyTree:
    """Updates `u'` such that `params + u' = factor * (params + u)`.

    Exactly 0.0 where the factor is 0, and `u` itself where it is 1. They take the
    parameter's dtype, without which neither would hold.

    Args:
      updates: what would be added to the parameters.
      params: the parameters.
      factors: of `factors_of`; other leaves are left as they are.

    Returns:
      A tree like `updates`.
    """
    leaves = dict(leaves_with_paths(params))

    def one(path: str, u: Array) -> Array:
        if path not in factors:
            return u
        return sharded_like(move, [u], leaves[path], factors[path])[0]

    def move(us: list[Array], w: Array, factor: Array) -> list[Array]:
        wide = widen(w)
        moved = (wide + us[0].astype(wide.dtype)) * factor.astype(wide.dtype)
        changed = jnp.where(factor == 0, -w, (moved - wide).astype(w.dtype))
        return [jnp.where(factor == 1, us[0].astype(w.dtype), changed)]

    return map_with_path(one, updates)


def scale_slices(
    slices: Mapping[str, Slices], vectors: Mapping[str, Array], params: PyTree
) -> PyTree:
    """Multiplies each index's slices by its number; exactly 0.0 where that is 0.

    Args:
      slices: of `slices_of`.
      vectors: `[*copies, size]` by the groups' names.
      params: the parameters.

    Returns:
      A tree like `params`.
    """
    factors = factors_of(slices, vectors, params)

    def one(path: str, w: Array) -> Array:
        if path not in factors:
            return w
        return sharded_like(scale, [w], factors[path])[0]

    def scale(ws: list[Array], factor: Array) -> list[Array]:
        wide, kind = widen(ws[0]), ws[0].dtype
        scaled = (wide * factor.astype(wide.dtype)).astype(kind)
        return [jnp.where(factor == 0, jnp.zeros((), kind), scaled)]

    return map_with_path(one, params)


def entry_counts(slices: Mapping[str, Slices], params: PyTree) -> dict[str, np.ndarray]:
    """How many entries each index's slices have.

    Args:
      slices: of `slices_of`.
      params: the parameters, or their shapes.

    Returns:
      `[*copies, size]` by the groups' names, on the host.
    """
    shapes = {path: np.shape(x) for path, x in leaves_with_paths(params)}
    result = {}
    for name, s in slices.items():
        total = np.zeros(math.prod(s.shape), np.int64)
        for part in s.parts:
            if part.path in shapes:
                shape = shapes[part.path]
                each = math.prod(shape[a] for a in _others(part, len(shape)))
                here = part.labels[part.labels >= 0]
                total += each * np.bincount(here, minlength=total.size)
        result[name] = total.reshape(s.shape)
    return result


def nesting(
    slices: Mapping[str, Slices], params: PyTree, *, disjoint: bool = False
) -> list[str]:
    """An order of groups in which each set of slices comes before those that hold it.

    Args:
      slices: of `slices_of`.
      params: the parameters, or their shapes.
      disjoint: whether no slices may hold others.

    Returns:
      The groups' names, the smallest slices first.

    Raises:
      ValueError: two indices whose slices share some entries, and neither lies in the
        other; or share any, if they have to be disjoint.
    """
    counts = entry_counts(slices, params)
    order = sorted(slices, key=lambda name: float(counts[name].mean()))
    shapes = {path: np.shape(x) for path, x in leaves_with_paths(params)}
    rank = {name: i for i, name in enumerate(order)}
    shared: dict[tuple[str, str], np.ndarray] = {}
    for (a, p), (b, q) in _meetings(slices, rank):
        if p.path not in shapes:
            continue
        if a == b or disjoint or not set(p.axes) & set(q.axes):
            if _meet(p, q):
                raise ValueError(_OVERLAP.format(a, b, p.path))
            continue
        shape = shapes[p.path]
        found = shared.setdefault((a, b), np.zeros((0, 3), np.int64))
        shared[a, b] = np.concatenate([found, _common(p, q, shape)])
    for (a, b), rows in shared.items():
        pairs, place = np.unique(rows[:, :2], axis=0, return_inverse=True)
        common = np.bincount(place.ravel(), rows[:, 2], minlength=len(pairs))
        if np.any(common != counts[a].ravel()[pairs[:, 0]]):
            raise ValueError(_OVERLAP.format(a, b, "their parameters"))
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


def drop_of(marked: Mapping[str, Any]) -> Drop:
    """The indices that are marked, as a specification.

    All copies of a group lose equally many, as few as the one with the fewest marks,
    and the lower indices first.

    Args:
      marked: bools `[*copies, size]` by the groups' names.

    Returns:
      A `Drop`; groups that lose nothing are not in it.
    """
    indices, sizes = {}, {}
    for name, x in marked.items():
        x = np.asarray(x, bool)
        k = int(x.sum(-1).min())
        if k:
            first = np.argsort(~x, axis=-1, kind="stable")[..., :k]
            indices[name] = np.sort(first, axis=-1).astype(np.int32)
            sizes[name] = x.shape[-1]
    return Drop(indices, sizes)


def zero_indices(
    params: PyTree,
    groups: Mapping[str, Group],
    *,
    roles: Collection[str] = PRODUCERS,
) -> Drop:
    """The indices whose slices are all exactly zero: what a training has emptied.

    After `js.transforms.prox_group_lasso` or `js.transforms.wgsef_prox`, for
    `js.structured.narrow`. A group that is zero as a whole keeps its first index.

    Args:
      params: the parameters, with values.
      groups: groups by name, all of them prunable.
      roles: which members have to be zero; those of the training.

    Returns:
      A `Drop`. All copies of a group lose equally many, those of the copy with the
      fewest zeros.

    Raises:
      ValueError: groups that are not prunable or not of these parameters.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.array([[1.0, 0.0, 2.0]]), "down": jnp.ones((3, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((2, 1))))
      >>> js.structured.zero_indices(params, groups.prunable)
      Drop(indices={'up[1]': array([1], dtype=int32)}, sizes={'up[1]': 3})
    """
    slices = slices_of(groups, roles=roles)
    check_params(slices, params)
    leaves = dict(leaves_with_paths(params))
    used = {
        p: (leaves[p] != 0).astype(jnp.float32) for p in paths_of(slices) if p in leaves
    }
    marked = {name: np.array(n == 0) for name, n in sums(slices, used).items()}
    for x in marked.values():
        x[x.all(-1), 0] = False
    return drop_of(marked)
