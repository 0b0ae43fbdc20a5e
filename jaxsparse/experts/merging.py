"""Merging the experts of an MoE: alignment, means, the router's weights (M-SMoE)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._host import on_host
from jaxsparse._typing import Array, PyTree
from jaxsparse.experts.checks import check_labels, count_experts
from jaxsparse.linalg.factor import HIGHEST
from jaxsparse.tree import leaves_with_paths, map_with_path


def align_experts(experts: PyTree, to: Any, *, hidden: Mapping[str, int]) -> PyTree:
    """Permute the hidden units of each expert to match those of another one.

    The order of an expert's hidden units is arbitrary, so units must be matched before
    experts are averaged unit by unit. The permutation `argmax_P sum_k <u_k, v_P(k)>`
    over the weights `u_k` of the leader's unit k and `v_P(k)` of the expert's (its gate
    and up columns, its down row, its biases, all in one) minimizes the Euclidean
    distance of the two experts; it is a linear sum assignment. The expert's outputs do
    not change. Li et al. (2023, arXiv:2310.01334); Ainsworth et al. (2022,
    arXiv:2209.04836).

    Differs from the reference implementation, which aligns each group to its first
    expert, not to its dominant one, and leaves biases out of the sum. Any expert may
    be named here.

    Args:
      experts: a tree of arrays `[E, ...]`.
      to: `[E]` integers: the expert that each is aligned to; those that name
        themselves stay as they are. `grouping.dominant[grouping.labels]`.
      hidden: by path in `experts`, the axis of the stacked array that the hidden units
        are on (1 or more, or negative). Arrays that are not named (an output bias)
        stay.

    Returns:
      The tree with permuted arrays. (The assignment is solved on the host, so it
      cannot run under jit. It costs `O(f^3)` for each expert.)

    Raises:
      ValueError: a path or an axis that does not exist, hidden axes of different
        sizes, experts that do not exist, weights that are not finite.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsparse as js
      >>> up = jnp.array([[[1.0, 2.0]], [[2.0, 1.0]]])    # [E, d, f]
      >>> down = jnp.array([[[3.0], [4.0]], [[4.0], [3.0]]])    # [E, f, d]
      >>> aligned = js.experts.align_experts(
      ...     {"up": up, "down": down}, np.array([0, 0]), hidden={"up": 2, "down": 1}
      ... )
      >>> aligned["up"].tolist(), aligned["down"][..., 0].tolist()
      ([[[1.0, 2.0]], [[1.0, 2.0]]], [[3.0, 4.0], [3.0, 4.0]])
    """
    _checks.check_arrays(experts=experts)
    _checks.check_mapping(hidden=hidden)
    from scipy import optimize  # slow to import, and needed here alone

    n = count_experts(experts)
    to = on_host(to)
    if to.shape != (n,) or to.dtype.kind not in "iu" or to.min() < 0 or to.max() >= n:
        raise ValueError(
            f"to must name an expert (0 to {n - 1}) for each of the {n} experts, got "
            f"{to}. For a Grouping pass grouping.dominant[grouping.labels]."
        )
    axes, size = _hidden_axes(experts, hidden)
    leaves = dict(leaves_with_paths(experts))
    units, unit_axes = [leaves[path] for path in axes], tuple(axes.values())
    order = np.tile(np.arange(size), (n, 1))
    for e, leader in enumerate(to):
        if leader != e:
            found = on_host(_similarity(units, unit_axes, leader, e))
            similarity = found.astype(np.float64)
            if not np.isfinite(similarity).all():
                raise ValueError(
                    f"Experts {leader} and {e} have no finite similarity: some of "
                    "their weights are NaN or infinite."
                )
            order[e] = optimize.linear_sum_assignment(similarity, maximize=True)[1]

    def permuted(path: str, x: Any) -> Any:
        if path not in axes:
            return x
        shape = [1] * x.ndim
        shape[0], shape[axes[path]] = n, size
        return jnp.take_along_axis(x, jnp.asarray(order.reshape(shape)), axes[path])

    return map_with_path(permuted, experts)


@jax.jit(static_argnames="axes")
def _similarity(xs: list[Array], axes: tuple[int, ...], leader: Any, e: Any) -> Array:
    """Inner products of the leader's hidden units (rows) with those of expert e."""

    def product(x: Array, axis: int) -> Array:
        units = lambda i: jnp.moveaxis(as_wide(x[i]), axis - 1, 0).reshape(
            x.shape[axis], -1
        )
        return jnp.matmul(units(leader), units(e).T, precision=HIGHEST)

    each = [product(x, axis) for x, axis in zip(xs, axes, strict=True)]
    precise = jnp.result_type(*(p.dtype for p in each))
    return jnp.sum(jnp.stack([p.astype(precise) for p in each]), axis=0)


def _hidden_axes(
    experts: PyTree, hidden: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    leaves = dict(leaves_with_paths(experts))
    if not hidden or not set(hidden) <= set(leaves):
        raise ValueError(
            f"hidden must give the axis of the hidden units by path, for some of "
            f"{sorted(leaves)}; got {dict(hidden)}."
        )
    axes = {}
    for path, axis in hidden.items():
        _checks.check_positive_int(axis, name=f"hidden[{path!r}]", least=-99)
        ndim = leaves[path].ndim
        if not -ndim <= axis < ndim or axis % ndim == 0:
            raise ValueError(
                f"hidden[{path!r}] is {axis}, which is no axis of an array of shape "
                f"{leaves[path].shape} other than the experts' (0)."
            )
        axes[path] = axis % ndim
    sizes = {path: leaves[path].shape[axis] for path, axis in axes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The axes in hidden must have one size, got {sizes}.")
    return axes, next(iter(sizes.values()))


def merge_experts(
    experts: PyTree, labels: Any, *, usage: Array | None = None
) -> PyTree:
    """Merge each group of experts into one: their mean, weighted by usage.

    `W_g = sum_e f_e W_e / sum_e f_e` over the experts e of group g. Li et al. (2023,
    arXiv:2310.01334); without usage it is the mean. It is taken as the most used member
    plus the mean difference from it, so equal experts give exactly that expert.

    The router may stay as it is: see `merge_gates`.

    Differs from the reference implementation, which divides by `sum f_e + 1e-7`: that
    shrinks weights, and of a group that no token reached it leaves zeros. Here such a
    group keeps its first member.

    Args:
      experts: a tree of arrays `[E, ...]`; aligned, see `align_experts`.
      labels: `[E]` integers, the group of each expert, 0 to groups - 1.
      usage: `[E]`, how many tokens each expert got; None for the plain mean.

    Returns:
      A tree of arrays `[groups, ...]` of the same dtypes.

    Raises:
      ValueError: labels that are not one number for each expert or leave a group
        empty, usage of another shape or (in eager use) negative, arrays whose first
        axes differ.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsparse as js
      >>> experts = {"up": jnp.array([[1.0], [5.0], [7.0]])}
      >>> usage = jnp.array([3.0, 1.0, 1.0])
      >>> js.experts.merge_experts(experts, np.array([0, 0, 1]), usage=usage)
      {'up': Array([[2.], [7.]], dtype=float32)}
    """
    _checks.check_arrays(experts=experts)
    n = count_experts(experts)
    labels, groups = check_labels(labels, n)
    if usage is None:
        usage = jnp.ones(n, jnp.float32)
    if jnp.shape(usage) != (n,):
        raise ValueError(f"usage has shape {jnp.shape(usage)}, expected ({n},).")
    if _checks.is_concrete(usage) and not float(np.min(usage)) >= 0:
        raise ValueError(f"usage must be at least 0, got {usage}.")
    return group_means(experts, usage, labels, np.arange(groups)[:, None] == labels)


@jax.jit
def group_means(experts: PyTree, usage: Array, labels: Array, member: Array) -> PyTree:
    """The means of groups of experts, as `merge_experts` takes them."""
    n, groups = labels.shape[0], member.shape[0]
    weight = jnp.where(member, as_wide(jnp.asarray(usage))[None], -1)
    leader = jnp.argmax(weight, axis=1)  # the most used of each group
    weight = jnp.maximum(weight, 0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    share = weight / jnp.where(total > 0, total, jnp.ones_like(total))

    def merged(x: Any) -> Array:
        y = as_wide(x)
        off = (y - y[leader[labels]]).reshape(n, -1)
        mean = jnp.matmul(share.astype(y.dtype), off, precision=HIGHEST)
        return (y[leader] + mean.reshape(groups, *y.shape[1:])).astype(x.dtype)

    return jax.tree.map(merged, experts)


def merge_gates(gates: Array, labels: Any) -> Array:
    """Sum the gates of the members of each group.

    With a router that keeps its E outputs, a token that was sent to experts e with
    weights `p_e` now gets `sum_g (sum_{e in g} p_e) f_g(x)`: where the members of a
    group compute the same, outputs do not change. For a list of chosen experts use
    `labels[ids]` instead.

    Args:
      gates: `[..., E]`, what the router gives each expert, 0 where it is not chosen.
      labels: `[E]` integers, the group of each expert.

    Returns:
      `[..., groups]`.

    Raises:
      ValueError: labels that do not fit the gates or leave a group empty.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsparse as js
      >>> gates = jnp.array([[0.5, 0.25, 0.25]])
      >>> js.experts.merge_gates(gates, np.array([0, 1, 0])).tolist()
      [[0.75, 0.25]]
    """
    _checks.check_arrays(gates=gates)
    if jnp.ndim(gates) < 1:
        raise ValueError("gates must be `[..., experts]`, got a scalar.")
    labels, groups = check_labels(labels, jnp.shape(gates)[-1])
    zeros = jnp.zeros((*gates.shape[:-1], groups), gates.dtype)
    return zeros.at[..., labels].add(gates)
