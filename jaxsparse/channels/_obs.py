"""Channels of a whole model by optimal brain surgery: scores, choice, compensation.

`js.solvers.channel_errors` and its siblings work on one matrix. Here the columns of all
kernels that read a group are found, and what they say is put together.
"""

import collections
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks, solvers
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.calibration import Statistics
from jaxsparse.calibration.first_nan import check_params
from jaxsparse.calibration.statistics import check_statistics
from jaxsparse.channels._score import slices_that_count
from jaxsparse.channels._select import drop_lowest
from jaxsparse.channels.slices import Part
from jaxsparse.coupling import Drop, Group
from jaxsparse.coupling.grouping import check_groups
from jaxsparse.curvature import factor_gram
from jaxsparse.tree import (
    MatrixView,
    from_matrices,
    leaves_with_paths,
    map_with_path,
    to_matrices,
)


def obs_errors(
    groups: Mapping[str, Group],
    params: PyTree,
    stats: Statistics,
    *,
    where: Where = None,
    rel_damping: float = 0.01,
) -> dict[str, Array]:
    """Return the least error of the kernels that read a channel if it is removed.

    The score is `sum_k min_W' tr((W' - W) (G_k + damping I) (W' - W)^T)` over the
    kernels k that read the channel, where each kernel may change all its other columns.
    It equals `js.solvers.channel_errors` and costs one triangular solve for a channel,
    not a factorization. OBSPA (Wang et al. 2024, arXiv:2403.18955), SlimGPT (Ling et
    al. 2024, arXiv:2412.18110).

    These scores presume `obs_refit`; without it other scores choose better.

    Differs from OBSPA, which adds up `w^2 / [H^-1]_jj` also where a channel has several
    columns (a head); here the columns of a channel are removed together.

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are skipped.
      params: the parameters.
      stats: from `js.calibration.run` with `gram=True`, of all kernels that read them.
      where: which kernels count; all with statistics by default.
      rel_damping: the damping relative to the mean diagonal of each Gram matrix.

    Returns:
      `[*copies, size]` by the groups' names, larger = keep, for
      `js.channels.drop_lowest`.

    Raises:
      ValueError: a kernel without statistics or without a gram, or that the model
        scales or changes before it is contracted; NaN or Inf in it; channels with
        different numbers of columns.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.eye(3), "down": jnp.array([[1.0], [2.0], [1.0]])}
      >>> apply_fn = lambda p, x: (x @ p["up"]) @ p["down"]
      >>> x = jnp.array([[1.0, 0, 1], [0, 1, 0], [2, 1, 2], [1, 1, 1]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> groups = js.coupling.groups(trace)
      >>> stats = js.calibration.run(trace, params, [x])
      >>> scores = js.channels.obs_errors(groups, params, stats, rel_damping=1e-3)
      >>> (scores["up[1]"] > 0.01).tolist()    # the first and the last are the same
      [False, True, False]
    """
    _check(groups, params, stats)
    factors = _Factors(stats, rel_damping)
    found = {}
    for name, readers in _readers(groups, params, stats, where).items():
        shape = (*groups[name].copies, groups[name].size)
        total = jnp.zeros(int(np.prod(shape)), jnp.float32)
        for reader in readers:
            for at, w, labels in reader.matrices():
                which, blocks = _blocks(name, reader.path, labels)
                errors = solvers.channel_errors(
                    w, factors.of(reader.path, at), blocks=blocks
                )
                total = total.astype(errors.dtype).at[which].add(errors)
        found[name] = total.reshape(shape)
    return found


def obs_greedy(
    groups: Mapping[str, Group],
    params: PyTree,
    stats: Statistics,
    sparsity: float,
    *,
    at_once: int | None = 1,
    where: Where = None,
    rel_damping: float = 0.01,
) -> Drop:
    """Choose channels one after another, given those already removed.

    It applies `js.solvers.remove_channels` to all kernels at once that read the same
    input, and updates the inverse by a Schur complement after each step. Groups that
    are read through different inputs (a residual stream), and groups of which one
    matrix holds several copies (the width of heads), have no inverse of their own:
    their lowest `obs_errors` are removed at once.

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are skipped.
      params: the parameters.
      stats: from `js.calibration.run` with `gram=True`.
      sparsity: the fraction of each group's channels to remove.
      at_once: how many channels to remove in a step; None for all.
      where: which kernels count; all with statistics by default.
      rel_damping: the damping relative to the mean diagonal of each Gram matrix.

    Returns:
      A `Drop`. `obs_refit` returns the weights that compensate for it.

    Raises:
      ValueError: as `obs_errors`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.eye(3), "down": jnp.array([[1.0], [2.0], [0.5]])}
      >>> apply_fn = lambda p, x: (x @ p["up"]) @ p["down"]
      >>> x = jnp.array([[1.0, 0, 1], [0, 1, 0], [2, 1, 2], [1, 1, 1]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> groups = js.coupling.groups(trace)
      >>> stats = js.calibration.run(trace, params, [x])
      >>> js.channels.obs_greedy(groups, params, stats, 0.3).indices["up[1]"]
      array([2])
    """
    _check(groups, params, stats)
    _checks.check_known("js.channels.obs_greedy", params=params)
    factors = _Factors(stats, rel_damping)
    readers = _readers(groups, params, stats, where)
    drop = Drop({}, {})
    together: dict[str, Group] = {}
    for name, own in readers.items():
        stacked = _stacked(groups[name], own, stats)
        if stacked is None:
            together[name] = groups[name]
            continue
        gone = []
        for at, w, labels in stacked:
            which, blocks = _blocks(name, own[0].path, labels)
            removed = solvers.remove_channels(
                w,
                factors.of(own[0].path, at),
                sparsity,
                blocks=blocks,
                at_once=at_once,
            )
            gone.append(which[np.asarray(removed.step) >= 0] % groups[name].size)
        shape = (*groups[name].copies, -1)
        found = np.asarray(gone, np.int64).reshape(shape)
        drop.indices[name] = np.sort(found, axis=-1)
        drop.sizes[name] = groups[name].size
    if together:
        scores = obs_errors(
            together, params, stats, where=where, rel_damping=rel_damping
        )
        rest = drop_lowest(together, scores, sparsity)
        drop.indices.update(rest.indices)
        drop.sizes.update(rest.sizes)
    return drop


def obs_refit(
    groups: Mapping[str, Group],
    params: PyTree,
    stats: Statistics,
    drop: Drop,
    *,
    where: Where = None,
    rel_damping: float = 0.01,
) -> PyTree:
    """Refit the kernels that read dropped channels, by least squares.

    Each kernel that reads dropped channels gets the least-squares weights on the inputs
    that it keeps; its columns of dropped channels become 0. All other parameters stay.
    `js.narrowing.narrow` then removes the channels.

    Args:
      groups: from `js.coupling.groups`.
      params: the dense parameters.
      stats: from `js.calibration.run` with `gram=True`.
      drop: the channels to remove.
      where: which kernels are changed; all with statistics by default.
      rel_damping: the damping relative to the mean diagonal of each Gram matrix.

    Returns:
      Parameters of the same shapes.

    Raises:
      ValueError: as `obs_errors`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.eye(3), "down": jnp.array([[1.0], [2.0], [0.5]])}
      >>> apply_fn = lambda p, x: (x @ p["up"]) @ p["down"]
      >>> x = jnp.array([[1.0, 0, 1], [0, 1, 0], [2, 1, 2], [1, 1, 1]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> groups = js.coupling.groups(trace)
      >>> stats = js.calibration.run(trace, params, [x])
      >>> drop = js.channels.obs_greedy(groups, params, stats, 0.3)
      >>> new = js.channels.obs_refit(groups, params, stats, drop, rel_damping=0.0)
      >>> new["down"].round(2).ravel().tolist()
      [1.5, 2.0, 0.0]
    """
    _check(groups, params, stats)
    _checks.check_is(Drop, "js.channels.drop_lowest(...)", drop=drop)
    dropped = {n: groups[n] for n, gone in drop.indices.items() if np.size(gone)}
    if not dropped:
        return params
    factors = _Factors(stats, rel_damping)
    kernels: dict[str, _Reader] = {}
    keep: dict[str, np.ndarray] = {}
    for name, readers in _readers(dropped, params, stats, where).items():
        stays = np.ones((*groups[name].copies, groups[name].size), bool)
        gone = np.asarray(drop.indices[name])
        gone = np.broadcast_to(gone, (*stays.shape[:-1], gone.shape[-1]))
        np.put_along_axis(stays, gone, False, axis=-1)
        flat = np.append(stays.ravel(), True)  # where the label is -1
        for reader in readers:
            kernels[reader.path] = reader
            here = flat[reader.labels]
            keep[reader.path] = keep.get(reader.path, True) & here
    new = {}
    for path, reader in kernels.items():
        solved = [
            solvers.refit_channels(w, factors.of(path, at), jnp.asarray(keep[path][at]))
            for at, w, _ in reader.matrices()
        ]
        shape = (*reader.view.batch, reader.view.d_out, reader.view.d_in)
        matrices = jnp.stack([one.w for one in solved]).reshape(shape)
        new[path] = from_matrices(matrices, reader.view)
    return map_with_path(new.get, params)


def _check(groups: Any, params: PyTree, stats: Any) -> None:
    check_statistics(stats)
    check_groups(groups)
    _checks.check_arrays(params=params)


class _Reader(NamedTuple):
    """A kernel that reads a group."""

    path: str
    view: MatrixView  # how it is read as matrices
    leaf: Any
    # `[*batch, d_in]`, of each column the place in the group's flat `[*copies, size]`,
    # -1 for none
    labels: np.ndarray

    def matrices(self) -> Iterator[tuple[tuple[int, ...], Array, np.ndarray]]:
        """For each matrix its place in the batch, itself and its columns' labels."""
        whole = to_matrices(self.leaf, self.view)
        for at in np.ndindex(self.view.batch):
            yield at, whole[at], self.labels[at]


class _Factors:
    """Factors of gram matrices, one for all kernels of the same input."""

    def __init__(self, stats: Statistics, rel_damping: float):
        self.stats, self.rel_damping = stats, rel_damping
        self.known: dict[Any, Any] = {}
        self.names = {path: name for path, name, _ in stats.kernels}

    def of(self, path: str, at: tuple[int, ...]) -> Any:
        key = self.names[path], at
        if key not in self.known:
            gram = self.stats.of(path).gram
            if gram is None:
                raise ValueError(
                    f"{path}: its statistics are without a gram; run "
                    "js.calibration.run(..., gram=True)."
                )
            self.known[key] = factor_gram(gram[at], rel_damping=self.rel_damping)
        return self.known[key]


def _readers(
    groups: Mapping[str, Group], params: PyTree, stats: Statistics, where: Where
) -> dict[str, list[_Reader]]:
    known = set(stats.paths)
    named = leaves_with_paths(params)
    check_params([path for path, _ in named], [leaf for _, leaf in named], known)
    counts = (lambda path, _: path in known) if where is None else where
    slices = slices_that_count(groups, params, counts, roles=("input",))
    leaves = dict(named)
    found: dict[str, list[_Reader]] = collections.defaultdict(list)
    for name, own in slices.items():
        # An index may lie in several places of one kernel's inputs.
        labels: dict[str, np.ndarray] = {}
        for part in own.parts:
            if part.path not in known:
                raise ValueError(
                    f"{part.path}: reads {name} but has no statistics; there are some "
                    f"of {list(stats.paths)[:8]}."
                )
            stats.check_plain(part.path)
            here = _columns(part, stats.view(part.path))
            labels[part.path] = np.maximum(labels.get(part.path, -1), here)
        for path, here in labels.items():
            reader = _Reader(path, stats.view(path), leaves[path], here)
            found[name].append(reader)
    return dict(found)


def _columns(part: Part, view: MatrixView) -> np.ndarray:
    """The labels of a kernel's columns, `[*batch, d_in]`."""
    taken = [axis in part.axes for axis in range(len(view.shape))]
    shape = [n if own else 1 for n, own in zip(view.shape, taken, strict=True)]
    expanded = part.labels.reshape(shape)
    sizes = [
        view.split[a] if own else 1
        for parts, own in zip(view.parts, taken, strict=True)
        for a in parts
    ]
    ordered = expanded.reshape(sizes).transpose(view.order)
    batch, outputs = len(view.axes.batch), len(view.axes.output)
    ordered = ordered[(*[slice(None)] * batch, *[0] * outputs)]
    inputs = tuple(view.split[a] for a in view.axes.input)
    whole = np.broadcast_to(ordered, (*view.batch, *inputs))
    return whole.reshape(*view.batch, view.d_in)


def _blocks(name: str, path: str, labels: np.ndarray) -> tuple[np.ndarray, Any]:
    """The labels that one matrix has, and the columns of each."""
    which = np.unique(labels[labels >= 0])
    columns = [np.flatnonzero(labels == label) for label in which]
    if len({len(c) for c in columns}) > 1:
        raise ValueError(
            f"{name}: its indices have between {min(map(len, columns))} and "
            f"{max(map(len, columns))} columns in {path}; they must be as many for all."
        )
    return which, np.stack(columns)


def _stacked(
    group: Group, readers: list[_Reader], stats: Statistics
) -> list[tuple[tuple[int, ...], Array, np.ndarray]] | None:
    """The matrices of all readers one above the other, if they read one input."""
    names = {
        name for path, name, _ in stats.kernels if path in {r.path for r in readers}
    }
    first = readers[0]
    alike = all(np.array_equal(r.labels, first.labels) for r in readers)
    copies = int(np.prod(group.copies, dtype=int))
    places = [np.unique(x[x >= 0]) for _, _, x in first.matrices()]
    whole = all(len(p) == group.size for p in places) and len(places) == copies
    if len(names) != 1 or not alike or not whole:
        return None
    # In the order of the copies.
    order = np.argsort([p[0] for p in places], kind="stable")
    rows = zip(*(r.matrices() for r in readers), strict=True)
    joined = [
        (row[0][0], jnp.concatenate([w for _, w, _ in row]), row[0][2]) for row in rows
    ]
    return [joined[i] for i in order]
