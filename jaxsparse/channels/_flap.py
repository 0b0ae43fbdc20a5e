"""FLAP: channels whose inputs vary little go, and biases hold their means."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.calibration import Statistics
from jaxsparse.calibration.statistics import check_statistics
from jaxsparse.channels._chains import check_names
from jaxsparse.channels._score import slices_that_count
from jaxsparse.channels.slices import Part, others_of, paths_of
from jaxsparse.channels.sums import combined, ordered_part_sum
from jaxsparse.coupling.drop import Drop
from jaxsparse.coupling.grouping import Group, check_groups
from jaxsparse.scores import bias_compensation
from jaxsparse.scores import flap as weight_flap
from jaxsparse.tree import (
    MatrixView,
    leaves_with_paths,
    map_with_path,
    nearest,
    to_matrices,
)


def flap_scores(
    groups: Mapping[str, Group],
    params: PyTree,
    stats: Statistics,
    *,
    where: Where = None,
) -> dict[str, Array]:
    """Score channels by FLAP, `sum Var[x_j] * ||W_:j||^2` over their readers.

    The score is the error of their outputs, to second order and ignoring correlations,
    when the channel's inputs j are replaced by their means, which biases can supply
    (`flap_compensation`). An et al. (2023, arXiv:2312.11983). The paper's adaptive
    search is `standardize`, then `drop_to_budget(..., scope="global")` to a budget of
    parameters.

    Differs from the reference implementation as `js.scores.flap` does. A head's score
    is the sum over its inputs; the reference squares them first.

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are skipped.
      params: the parameters.
      stats: from `js.calibration.run`, for all kernels that read these groups; it may
        be without grams.
      where: which kernels count, see `jaxsparse.tree.select`.

    Returns:
      `[*copies, size]` by the groups' names, larger = keep. Groups that no kernel reads
      are left out.

    Raises:
      ValueError: a kernel that counts has no statistics, or statistics of another
        shape; parameters that do not fit the groups.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.eye(2), "down": jnp.array([[1.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return (x @ params["up"]) @ params["down"]
      >>> x = jnp.array([[1.0, 5.0], [-3.0, 5.0]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> groups = js.coupling.groups(trace)
      >>> stats = js.calibration.run(trace, params, [x], gram=False)
      >>> js.channels.flap_scores(groups, params, stats)["up[1]"].round(3)
      Array([4., 0.], dtype=float32)
    """
    check_statistics(stats)
    _checks.check_arrays(params=params)
    slices = slices_that_count(groups, params, where, roles=("input",))
    readers = set(paths_of(slices))
    spread = weight_flap(params, stats, where=lambda path, _: path in readers)

    def channels(part: Part, x: Array, shape: tuple[int, ...]) -> Array:
        # Each weight has its channel's score, so that it comes once for each output.
        return ordered_part_sum(part, x, shape) / stats.view(part.path).d_out

    return combined(slices, spread, channels)


def flap_compensation(
    groups: Mapping[str, Group],
    params: PyTree,
    stats: Statistics,
    drop: Drop | Mapping[str, np.ndarray],
    *,
    bias: Mapping[str, str] | Callable[[str], str] | None = None,
    missing: Literal["error", "skip"] = "error",
) -> PyTree:
    """Add the mean output of removed channels to biases, `b + sum_j W_:j E[x_j]`.

    With these biases the output of each kernel that reads removed inputs keeps its mean
    over the calibration data. An et al. (2023, arXiv:2312.11983). Use it before the
    parameters are masked or narrowed, with the same `drop`.

    Args:
      groups: from `js.coupling.groups`.
      params: the parameters, not pruned yet.
      stats: from `js.calibration.run`, for all kernels that read the dropped groups.
      drop: the channels to remove, from `drop_lowest`; or the channels by the groups'
        names.
      bias: the path of the bias of each kernel: a mapping, or a function of the
        kernel's path. By default the last word of the path becomes "bias".
      missing: what to do for a kernel without a bias: "error", or "skip" it. (FLAP
        gives every layer a bias; a model must have it before it is traced.)

    Returns:
      The parameters with other biases.

    Raises:
      ValueError: a kernel without a bias, one that does not fit it, without statistics;
        a drop of other groups.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> down = {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.zeros(1)}
      >>> params = {"up": jnp.eye(2), "down": down}
      >>> def apply_fn(params, x):
      ...     y = (x @ params["up"]) @ params["down"]["kernel"]
      ...     return y + params["down"]["bias"][None]
      >>> x = jnp.array([[1.0, 5.0], [-3.0, 5.0]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> groups = js.coupling.groups(trace)
      >>> stats = js.calibration.run(trace, params, [x], gram=False)
      >>> drop = {"up[1]": [1]}
      >>> js.channels.flap_compensation(groups, params, stats, drop)["down"]["bias"]
      Array([10.], dtype=float32)
    """
    check_statistics(stats)
    _checks.check_arrays(params=params)
    _checks.check_choice(("error", "skip"), missing=missing)
    if not isinstance(drop, Drop):
        _checks.check_mapping(made_by="or js.channels.drop_lowest(...)", drop=drop)
    indices = drop.indices if isinstance(drop, Drop) else drop
    removed = _removed(groups, params, indices)
    leaves = dict(leaves_with_paths(params))
    added: dict[str, Array] = {}
    for path, gone in removed.items():
        target = _bias_of(path, bias)
        if target not in leaves:
            if missing == "skip":
                continue
            raise ValueError(
                f"{path}: it reads channels of {_groups_of(path, groups, indices)} "
                "that go, and has no bias to hold their means: there is no "
                f"{target!r}. The nearest: {nearest(target, list(leaves))}. Name it "
                "with `bias`, add one to the model, or pass missing='skip'."
            )
        if path not in stats.paths:
            raise ValueError(
                f"{path}: it reads channels of {_groups_of(path, groups, indices)} "
                "that go, and its inputs have no statistics; there are those of "
                f"{list(stats.paths)[:4]}."
            )
        view = stats.view(path)
        _check_bias(groups, path, target, view, leaves)
        kept = jnp.asarray(to_matrices(np.broadcast_to(~gone, view.shape), view))
        lost = bias_compensation(
            to_matrices(leaves[path], view), stats.of(path).mean, kept
        )
        lost = _as_bias(lost, view, jnp.shape(leaves[target]))
        added[target] = added[target] + lost if target in added else lost

    def one(path: str, b: Array) -> Array:
        if path not in added:
            return b
        wide = wide_dtype(b.dtype, added[path].dtype)
        return (b.astype(wide) + added[path].astype(wide)).astype(b.dtype)

    return map_with_path(one, params)


def _removed(
    groups: Mapping[str, Group], params: PyTree, indices: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """By kernel that reads something of it, which entries go; broadcasts to it."""
    check_groups(groups)
    for name, gone in indices.items():
        integers = np.issubdtype(np.asarray(gone).dtype, np.integer)
        if np.size(gone) and (np.ndim(gone) < 1 or not integers):
            raise TypeError(
                f"{name}: drop must hold integer indices, as js.channels.drop_lowest "
                f"gives; got {_checks.shown(gone)}."
            )
    check_names("drop", indices, groups)
    dropped = {n: groups[n] for n, gone in indices.items() if np.size(gone)}
    is_read = lambda group: any(m.role == "input" for m in group.members)
    readers = {n: g for n, g in dropped.items() if is_read(g)}
    if not readers:
        return {}
    every = lambda path, leaf: True
    slices = slices_that_count(readers, params, every, roles=("input",))
    shapes = {path: np.shape(x) for path, x in leaves_with_paths(params)}
    found: dict[str, np.ndarray] = {}
    for name, s in slices.items():
        gone = np.zeros(s.shape, bool)
        chosen = np.asarray(indices[name])
        if chosen.min() < 0 or chosen.max() >= s.shape[-1]:
            raise ValueError(
                f"{name}: has the indices 0 to {s.shape[-1] - 1}, got {chosen.min()} "
                f"to {chosen.max()}."
            )
        chosen = np.broadcast_to(chosen, (*s.shape[:-1], chosen.shape[-1]))
        np.put_along_axis(gone, chosen, True, axis=-1)
        flat = np.append(gone.ravel(), False)  # where the label is -1
        for part in s.parts:
            others = others_of(part, len(shapes[part.path]))
            here = np.expand_dims(flat[part.labels], others)
            found[part.path] = found.get(part.path, np.zeros((), bool)) | here
    return found


def _groups_of(
    path: str, groups: Mapping[str, Group], indices: Mapping[str, Any]
) -> list[str]:
    """The dropped groups that a kernel reads."""
    reads = lambda m: m.path == path and m.role == "input"
    return [name for name in indices if any(map(reads, groups[name].members))]


def _bias_of(path: str, bias: Mapping[str, str] | Callable[[str], str] | None) -> str:
    beside = "/".join([*path.split("/")[:-1], "bias"])
    if bias is None:
        return beside
    return bias.get(path, beside) if isinstance(bias, Mapping) else bias(path)


def _check_bias(
    groups: Mapping[str, Group],
    path: str,
    target: str,
    view: MatrixView,
    leaves: Mapping[str, Any],
) -> None:
    outputs = [
        {m.path for m in g.members}
        for g in groups.values()
        if any(m.path == path and m.role == "output" for m in g.members)
    ]
    size = math.prod(view.batch) * view.d_out
    shape = jnp.shape(leaves[target])
    if math.prod(shape) != size or (outputs and not any(target in o for o in outputs)):
        raise ValueError(
            f"{path}: {target!r} of shape {shape} is not the bias of its {size} "
            "outputs. Name it with `bias`."
        )


def _as_bias(lost: Array, view: MatrixView, shape: tuple[int, ...]) -> Array:
    """`[*batch, d_out]` in the order in which the kernel's axes are."""
    held = (*view.axes.batch, *view.axes.output)
    lost = lost.reshape([view.split[a] for a in held])
    return lost.transpose(sorted(range(len(held)), key=held.__getitem__)).reshape(shape)
