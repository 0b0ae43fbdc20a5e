"""Scores of whole channels, heads and experts that are no sums of weight scores."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.calibration import Statistics
from jaxsparse.curvature import per_example_grads
from jaxsparse.scores import bias_compensation
from jaxsparse.scores import flap as weight_flap
from jaxsparse.structured._drop import Drop
from jaxsparse.structured._groups import Group
from jaxsparse.structured._score import (
    Reduce,
    combined,
    member_sum,
    slices_that_count,
    wide_dtype,
)
from jaxsparse.structured._slices import Part, Slices, factors_of
from jaxsparse.tree import (
    MatrixView,
    leaves_with_paths,
    map_with_path,
    nearest,
    to_matrices,
)

HIGHEST = lax.Precision.HIGHEST


def fpgm(
    groups: Mapping[str, Group],
    params: PyTree,
    *,
    reduce: Reduce = "sum",
    where: Where = None,
) -> dict[str, Array]:
    """FPGM: how far an index's filter is from all others, `sum_j ||w_c - w_j||_2`.

    What is near the geometric median of the filters can be replaced by the others. He
    et al. (2019, arXiv:1811.00250). `w_c` is all of a kernel that makes index c: the
    members with the role "output". In a group with copies the filters of one copy are
    compared.

    The distances come from the products of the filters, about their mean: memory for
    `size^2` numbers a copy, and not for `size^2` differences. What is nearer than about
    3e-4 of the filters' deviation has, in float32, a distance of that order.

    Differs from Torch-Pruning, which compares `|w|^p`: two filters of opposite sign are
    equal there and far apart here.

    Args:
      groups: of `js.structured.groups`. Those that are not prunable are passed over.
      params: the parameters.
      reduce: of the members: their sum, their mean, or the largest.
      where: which parameters count, see `jaxsparse.tree.select`; kernels by default.

    Returns:
      `[*copies, size]` by the groups' names, float32 at least, larger = keep. Groups
      that no kernel makes are left out.

    Raises:
      ValueError: parameters that do not fit the groups, or nothing to score.
      TypeError: kernels that are not real floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> up = jnp.array([[0.0, 3.0, 0.0], [0.0, 4.0, 1.0]])
      >>> params = {"up": up, "down": jnp.ones((3, 1))}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((2, 2))))
      >>> [round(x, 3) for x in js.structured.fpgm(groups, params)["up[1]"].tolist()]
      [6.0, 9.243, 5.243]
    """
    slices = slices_that_count(groups, params, where, roles=("output",))
    return combined(slices, params, _distances, reduce=reduce)


def _distances(part: Part, w: Array, shape: tuple[int, ...]) -> Array:
    """`[prod(shape)]`: the sum of the distances to the filters of the same copy."""
    wide = wide_dtype(w.dtype)
    others = [a for a in range(w.ndim) if a not in part.axes]
    by_place = w.transpose([*part.axes, *others]).reshape(part.labels.size, -1)
    by_place, labels = by_place.astype(wide), part.labels.ravel()
    if not np.array_equal(labels, np.arange(math.prod(shape))):
        # One more row, of zeros, for indices that have fewer places than others.
        by_place = jnp.pad(by_place, ((0, 1), (0, 0)))
        by_place = by_place[_places(labels, math.prod(shape))]
    filters = by_place.reshape(-1, shape[-1], by_place.size // math.prod(shape))
    filters = filters - jnp.mean(filters, axis=1, keepdims=True)
    gram = jnp.einsum("cid,cjd->cij", filters, filters, precision=HIGHEST)
    norm = jnp.diagonal(gram, axis1=1, axis2=2)
    squared = norm[:, :, None] + norm[:, None, :] - 2 * gram
    return jnp.sum(jnp.sqrt(jnp.maximum(squared, 0)), axis=2).ravel()


def _places(labels: np.ndarray, total: int) -> np.ndarray:
    """For each label its places, `[total, most]`; `len(labels)` where it has fewer."""
    inside = np.flatnonzero(labels >= 0)
    order = inside[np.argsort(labels[inside], kind="stable")]
    count = np.bincount(labels[inside], minlength=total)
    start = np.cumsum(count) - count
    table = np.full((total, max(int(count.max()), 1)), len(labels))
    rows = labels[order]
    table[rows, np.arange(len(order)) - start[rows]] = order
    return table


def bn_scale(
    groups: Mapping[str, Group],
    params: PyTree,
    *,
    reduce: Reduce = "sum",
    where: Where = r"scale$",
) -> dict[str, Array]:
    """Network slimming: the magnitude of the scales of norms, `sum |gamma_c|`.

    It says something of networks that were trained with a penalty on the scales. Liu
    et al. (2017, arXiv:1708.06519).

    Args:
      groups: of `js.structured.groups`. Those that are not prunable are passed over.
      params: the parameters.
      reduce: of the norms of one group: their sum, their mean, or the largest.
      where: which parameters are scales; see `jaxsparse.tree.select`.

    Returns:
      `[*copies, size]` by the groups' names, larger = keep. Groups without a scale are
      left out.

    Raises:
      ValueError: parameters that do not fit the groups, or no scale in any.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((2, 3)), "scale": jnp.array([0.5, -2.0, 0.0]),
      ...           "down": jnp.ones((3, 1))}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"] * params["scale"][None]) @ params["down"]
      >>> groups = js.structured.groups(js.trace(apply_fn, params, jnp.ones((2, 2))))
      >>> js.structured.bn_scale(groups, params)["up[1]"]
      Array([0.5, 2. , 0. ], dtype=float32)
    """
    slices = slices_that_count(groups, params, where)
    magnitude = lambda part, x, shape: member_sum(part, jnp.abs(x), shape)
    return combined(slices, params, magnitude, reduce=reduce)


def gate_scores(
    groups: Mapping[str, Group],
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Any,
    *,
    chunk: int | None = None,
) -> dict[str, Array]:
    """`E_x |dL(x) / d gate|`: how much the loss listens to an index, for each example.

    A gate of 1 multiplies what a channel or head gives to those that read it: the
    members with the role "input". Groups that no kernel reads (the width of queries and
    keys, which meet each other) have it on the kernels that make them, on both sides of
    the product. Michel, Levy & Neubig (2019, arXiv:1905.10650), for heads, who then
    divide by the norm of a layer: see `normalize_norm`. The magnitude is taken for each
    example, before the mean; that of the mean would be 0 at a minimum.

    The gates are numbers that multiply parameters, so that any model can have them. It
    costs the gradients of single examples with respect to those parameters.

    Differs from the reference implementation, which takes the magnitude for each token
    and divides by the number of tokens, in the last layer by that of examples.

    Args:
      groups: of `js.structured.groups`. Those that are not prunable are passed over.
      loss_fn: `loss_fn(params, batch) -> scalar`, called with batches of one example.
      params: the parameters.
      batch: a tree of arrays whose leading axis numbers the examples.
      chunk: how many examples are differentiated at once, which bounds the memory; all
        by default. On a mesh it has to divide their number.

    Returns:
      `[*copies, size]` by the groups' names, float32 at least, larger = keep.

    Raises:
      ValueError: parameters that do not fit the groups, an empty batch, a loss that is
        no scalar; gradients that are NaN or Inf (in eager use).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.eye(2), "down": jnp.array([[1.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return (x @ params["up"]) @ params["down"]
      >>> x = jnp.array([[1.0, 1.0], [-3.0, 0.0]])
      >>> groups = js.structured.groups(js.trace(apply_fn, params, x))
      >>> loss_fn = lambda params, x: jnp.mean(apply_fn(params, x))
      >>> js.structured.gate_scores(groups, loss_fn, params, x)
      {'up[1]': Array([2., 1.], dtype=float32)}
    """
    slices = _gated(groups, params)
    gated = _paths(slices)
    dtype = wide_dtype(*[x.dtype for p, x in leaves_with_paths(params) if p in gated])
    gates = {name: jnp.ones(s.shape, dtype) for name, s in slices.items()}

    def loss(both: PyTree, batch: Any) -> Array:
        factors = factors_of(slices, both["gates"], params)
        gate = lambda path, w: _times(w, factors[path]) if path in factors else w
        return loss_fn(map_with_path(gate, both["params"]), batch)

    grads = per_example_grads(
        loss,
        {"gates": gates, "params": params},
        batch,
        chunk=chunk,
        where={"gates": True, "params": False},
    )["gates"]
    return {name: jnp.mean(jnp.abs(grads[name]), axis=0) for name in slices}


def _times(w: Array, factor: Array) -> Array:
    # In float32 at least, so that the derivative by the gate is summed in it.
    wide = wide_dtype(w.dtype)
    return (w.astype(wide) * factor.astype(wide)).astype(w.dtype)


def _gated(groups: Mapping[str, Group], params: PyTree) -> dict[str, Slices]:
    every = lambda path, leaf: True
    members = {n: {m.role for m in g.members} for n, g in groups.items() if g.prunable}
    read = {n: groups[n] for n, roles in members.items() if "input" in roles}
    made = {
        n: groups[n]
        for n, roles in members.items()
        if "input" not in roles and "output" in roles
    }
    found: dict[str, Slices] = {}
    for part, role in ((read, "input"), (made, "output")):
        if part or not (read or made):
            found |= slices_that_count(part or groups, params, every, roles=(role,))
    return {name: found[name] for name in groups if name in found}


def _paths(slices: Mapping[str, Slices]) -> set[str]:
    return {part.path for s in slices.values() for part in s.parts}


def flap(
    groups: Mapping[str, Group],
    params: PyTree,
    stats: Statistics,
    *,
    where: Where = None,
) -> dict[str, Array]:
    """FLAP: `sum Var[x_j] * ||W_:j||^2` over the kernels that read an index.

    What their outputs lose, to second order and but for correlations, when the index's
    inputs j are replaced by their means, which biases can hold (`flap_compensation`).
    An et al. (2023, arXiv:2312.11983). The paper's adaptive search is `standardize`,
    then `select_to(..., scope="global")` to a budget of parameters.

    Differs from the reference implementation as `js.scores.flap` does. A head's score
    is the sum over its inputs; there they are squared before.

    Args:
      groups: of `js.structured.groups`. Those that are not prunable are passed over.
      params: the parameters.
      stats: of `js.calibration.run`, for all kernels that read these groups; it may be
        without grams.
      where: which kernels count, see `jaxsparse.tree.select`.

    Returns:
      `[*copies, size]` by the groups' names, larger = keep. Groups that no kernel reads
      are left out.

    Raises:
      ValueError: a kernel that counts has no statistics, or those of another shape;
        parameters that do not fit the groups.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.eye(2), "down": jnp.array([[1.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return (x @ params["up"]) @ params["down"]
      >>> x = jnp.array([[1.0, 5.0], [-3.0, 5.0]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> groups = js.structured.groups(trace)
      >>> stats = js.calibration.run(trace, params, [x], gram=False)
      >>> js.structured.flap(groups, params, stats)
      {'up[1]': Array([4., 0.], dtype=float32)}
    """
    slices = slices_that_count(groups, params, where, roles=("input",))
    readers = _paths(slices)
    spread = weight_flap(params, stats, where=lambda path, _: path in readers)

    def channels(part: Part, x: Array, shape: tuple[int, ...]) -> Array:
        # Each weight has its channel's score, so that it comes once for each output.
        return member_sum(part, x, shape) / stats.view(part.path).d_out

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
    """Biases that hold the means of what goes: `b + sum_{j removed} W_:j E[x_j]`.

    With them the output of each kernel that reads removed inputs keeps its mean over
    the calibration data. An et al. (2023, arXiv:2312.11983). Use it before the
    parameters are masked or narrowed, with the same `drop`.

    Args:
      groups: of `js.structured.groups`.
      params: the parameters, not pruned yet.
      stats: of `js.calibration.run`, for all kernels that read the dropped groups.
      drop: what goes, of `select`; or indices by the groups' names.
      bias: the path of the bias of each kernel: a mapping, or a function of the
        kernel's path. By default the last word of the path becomes "bias".
      missing: what to do for a kernel without one: "error", or "skip" it. (FLAP gives
        every layer a bias; a model has to have it before it is traced.)

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
      >>> groups = js.structured.groups(trace)
      >>> stats = js.calibration.run(trace, params, [x], gram=False)
      >>> drop = {"up[1]": [1]}
      >>> js.structured.flap_compensation(groups, params, stats, drop)["down"]["bias"]
      Array([10.], dtype=float32)
    """
    if missing not in ("error", "skip"):
        raise ValueError(f"missing={missing!r}: expected 'error' or 'skip'.")
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
                f"{path}: it reads channels that go, and has no bias to hold their "
                f"means: there is no {target!r}. The nearest: "
                f"{nearest(target, list(leaves))}. Name it with `bias`, add one to the "
                "model, or pass missing='skip'."
            )
        if path not in stats.paths:
            raise ValueError(
                f"{path}: it reads channels that go, and its inputs have no "
                f"statistics; there are those of {list(stats.paths)[:4]}."
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
    for name in indices:
        if name not in groups:
            raise ValueError(
                f"{name}: drop names it, and there is no such group; the nearest: "
                f"{nearest(name, list(groups))}."
            )
    dropped = {n: groups[n] for n, gone in indices.items() if np.size(gone)}
    readers = {n: g for n, g in dropped.items() if _is_read(g)}
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
            ndim = len(shapes[part.path])
            others = tuple(a for a in range(ndim) if a not in part.axes)
            here = np.expand_dims(flat[part.labels], others)
            found[part.path] = found.get(part.path, np.zeros((), bool)) | here
    return found


def _is_read(group: Group) -> bool:
    return any(m.role == "input" for m in group.members)


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
