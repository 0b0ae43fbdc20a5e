"""Scores of whole channels, heads and experts that are no sums of weight scores."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.channels._score import slices_that_count
from jaxsparse.channels.gates import gate_slices, gated
from jaxsparse.channels.slices import Part, is_plain, paths_of
from jaxsparse.channels.sums import Reduce, combined, ordered_part_sum
from jaxsparse.coupling.grouping import Group
from jaxsparse.curvature import per_example_grads
from jaxsparse.linalg.factor import HIGHEST
from jaxsparse.tree import leaves_with_paths


def fpgm(
    groups: Mapping[str, Group],
    params: PyTree,
    *,
    reduce: Reduce = "sum",
    where: Where = None,
) -> dict[str, Array]:
    """Score channels by their distance from all others, `sum_j ||w_c - w_j||_2` (FPGM).

    A filter near the geometric median of the others can be replaced by them. He et al.
    (2019, arXiv:1811.00250). `w_c` is all of a kernel that produces channel c: the
    members with the role "output". In a group with copies the filters of one copy are
    compared.

    The distances come from the products of the centered filters, which need `size^2`
    numbers per copy instead of `size^2` differences. In float32, distances below about
    3e-4 of the filters' deviation are unreliable.

    Differs from Torch-Pruning, which compares `|w|^p` (two filters of opposite sign are
    equal there and far apart here), and adds the distances in the kernels that read c.

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are skipped.
      params: the parameters.
      reduce: how to combine the members: their sum, their mean, or the largest.
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
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 2))))
      >>> [round(x, 3) for x in js.channels.fpgm(groups, params)["up[1]"].tolist()]
      [6.0, 9.243, 5.243]
    """
    _checks.check_arrays(params=params)
    slices = slices_that_count(groups, params, where, roles=("output",))
    return combined(slices, params, _distances, reduce=reduce)


def _distances(part: Part, w: Array, shape: tuple[int, ...]) -> Array:
    """`[prod(shape)]`: the sum of the distances to the filters of the same copy."""
    wide = wide_dtype(w.dtype)
    others = [a for a in range(w.ndim) if a not in part.axes]
    by_place = w.transpose([*part.axes, *others]).reshape(part.labels.size, -1)
    by_place, labels = by_place.astype(wide), part.labels.ravel()
    if not is_plain(part, math.prod(shape)):
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
    """Score channels by the scales of their norms, `sum |gamma_c|` (network slimming).

    It is meant for networks that were trained with a penalty on the scales. Liu et al.
    (2017, arXiv:1708.06519).

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are skipped.
      params: the parameters.
      reduce: how to combine the norms of a group: their sum, their mean, or the
        largest.
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
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 2))))
      >>> js.channels.bn_scale(groups, params)["up[1]"]
      Array([0.5, 2. , 0. ], dtype=float32)
    """
    _checks.check_arrays(params=params)
    slices = slices_that_count(groups, params, where)
    magnitude = lambda part, x, shape: ordered_part_sum(part, jnp.abs(x), shape)
    return combined(slices, params, magnitude, reduce=reduce)


def gate_scores(
    groups: Mapping[str, Group],
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Any,
    *,
    chunk: int | None = None,
) -> dict[str, Array]:
    """Score channels by the loss's gradient at a gate, `E_x |dL(x) / d gate|`.

    A gate of 1 multiplies a channel or head where kernels read it: at the members with
    the role "input". Groups that no kernel reads (the width of queries and keys) have
    the gate on the kernels that produce them, on both sides of the product. Michel,
    Levy & Neubig (2019, arXiv:1905.10650), for heads, who then divide by the norm of a
    layer: see `normalize_norm`. The magnitude is taken for each example, before the
    mean, because the mean gradient is 0 at a minimum.

    The gates multiply parameters, so any model can have them. The cost is that of the
    gradients of single examples with respect to these parameters.

    Differs from the reference implementation, which takes the magnitude for each token
    and divides by the number of tokens, in the last layer by that of examples.

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are skipped.
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
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, x))
      >>> loss_fn = lambda params, x: jnp.mean(apply_fn(params, x))
      >>> js.channels.gate_scores(groups, loss_fn, params, x)
      {'up[1]': Array([2., 1.], dtype=float32)}
    """
    _checks.check_callable(2, loss_fn=loss_fn)
    _checks.check_arrays(params=params)
    slices = gate_slices(groups, params)
    paths = set(paths_of(slices))
    dtype = wide_dtype(*[x.dtype for p, x in leaves_with_paths(params) if p in paths])
    gates = {name: jnp.ones(s.shape, dtype) for name, s in slices.items()}

    def loss(both: PyTree, batch: Any) -> Array:
        return loss_fn(gated(slices, both["params"], both["gates"]), batch)

    grads = per_example_grads(
        loss,
        {"gates": gates, "params": params},
        batch,
        chunk=chunk,
        where={"gates": True, "params": False},
    )["gates"]
    return {name: jnp.mean(jnp.abs(grads[name]), axis=0) for name in slices}
