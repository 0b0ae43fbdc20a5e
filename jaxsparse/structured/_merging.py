"""Merging the experts of an MoE: usage, similarity, alignment, means (M-SMoE)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import leaves_with_paths, map_with_path

HIGHEST = lax.Precision.HIGHEST


class Grouping(NamedTuple):
    """Which experts of a layer become one.

    Attributes:
      labels: `[E]` integers, the group of each expert.
      dominant: `[groups]` integers, the expert that leads each group, ascending;
        `dominant[labels]` is the leader of each expert.
    """

    labels: np.ndarray
    dominant: np.ndarray


def router_similarity(logits: Array) -> Array:
    """How alike experts look to the router: cosines of their logits over tokens.

    `cos_ij = l_i . l_j / (|l_i| |l_j|)`, with the logits `l_i` of expert i for all
    tokens; no mean is taken off. Li et al. (2023, arXiv:2310.01334).

    Differs from the reference implementation, which maps it to `(cos + 1) / 2` (no
    matter for the order).

    Args:
      logits: `[..., n, E]`, over the same tokens for all experts.

    Returns:
      `[..., E, E]`, at least float32; 0 for an expert whose logits are all 0.

    Raises:
      ValueError: fewer than two axes.
      TypeError: logits that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> logits = jnp.array([[1.0, 2.0, -1.0], [2.0, 4.0, 0.5]])
      >>> js.structured.router_similarity(logits)[0, :2].round(5).tolist()
      [1.0, 1.0]
    """
    if jnp.ndim(logits) < 2:
        raise ValueError(
            f"logits has shape {jnp.shape(logits)}, expected [..., tokens, experts]."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating point, got {logits.dtype}.")
    x = wide(logits)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-2, keepdims=True))
    x = x / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    return jnp.einsum("...ni,...nj->...ij", x, x, precision=HIGHEST)


def group_experts(
    usage: PyTree, similarity: PyTree, *, groups: int, at_least: int = 1
) -> Any:
    """Dominant experts, and which of them each other expert joins.

    The experts of all layers compete by their share of their layer's tokens; the
    `groups` most used dominate, so that a layer where usage is even keeps more of them.
    Every other expert joins the dominant one of its layer that is most similar. Li et
    al. (2023, arXiv:2310.01334).

    Differs from the reference implementation, whose threshold is strict: with ties it
    finds fewer groups than were asked for. Here the number is exact, and among equals
    the earlier layer and the lower index come first.

    Args:
      usage: how many tokens each expert got, `[E]`; or a tree of such arrays, one for
        each layer.
      similarity: `[E, E]`, larger = more alike, as `router_similarity` makes; a tree of
        the same structure.
      groups: how many experts are to remain over all layers together.
      at_least: how many remain in each layer, whatever its usage. As many as the
        router picks for a token is a good choice where the router is narrowed too.

    Returns:
      A `Grouping`; for a tree of layers a tree of them. (It reads values, so it cannot
      run under jit.)

    Raises:
      ValueError: fewer groups than `at_least` in each layer, more than experts, usage
        that is negative or NaN, NaN similarities, shapes that do not fit.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> cos = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
      >>> found = js.structured.group_experts(np.array([70, 10, 20]), cos, groups=2)
      >>> found.labels.tolist(), found.dominant.tolist()
      ([0, 0, 1], [0, 2])
    """
    _checks.same_structure(similarity, usage, name="similarity", of="usage")
    shares = [_share(p, u) for p, u in leaves_with_paths(usage)]
    alike = [np.asarray(s, np.float64) for s in jax.tree.leaves(similarity)]
    for (path, _), u, s in zip(leaves_with_paths(usage), shares, alike, strict=True):
        if s.shape != (len(u), len(u)) or np.isnan(s).any():
            raise ValueError(
                f"similarity{at(path)} must be a matrix of {len(u)} by {len(u)} "
                f"numbers, one for each two experts, without NaN; got shape {s.shape} "
                f"with {np.isnan(s).sum()} NaN."
            )
    sizes = [len(u) for u in shares]
    check_total("groups", groups, sizes, at_least)
    most_used = [np.argsort(-u, kind="stable") for u in shares]
    taken = [at_least] * len(sizes)
    rest = sorted(
        (-u[e], layer)
        for layer, (u, order) in enumerate(zip(shares, most_used, strict=True))
        for e in order[at_least:]
    )
    for _, layer in rest[: groups - sum(taken)]:
        taken[layer] += 1
    found = [
        _join(s, np.sort(order[:n]))
        for s, order, n in zip(alike, most_used, taken, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(usage), found)


def _share(path: str, usage: Any) -> np.ndarray:
    usage = np.asarray(usage, np.float64)
    if usage.ndim != 1 or not usage.size or not np.all(usage >= 0):
        raise ValueError(
            f"usage{at(path)} must be one number of at least 0 for each expert, "
            f"without NaN; got an array of shape {usage.shape}, {usage}."
        )
    total = usage.sum()
    return usage / total if total > 0 else usage


def _join(similarity: np.ndarray, dominant: np.ndarray) -> Grouping:
    labels = np.argmax(similarity[:, dominant], axis=1)
    labels[dominant] = np.arange(len(dominant))
    return Grouping(labels.astype(np.int32), dominant.astype(np.int32))


def align_experts(experts: PyTree, to: Any, *, hidden: Mapping[str, int]) -> PyTree:
    """Permutes the hidden units of each expert to match those of another one.

    The order of an expert's hidden units is arbitrary, so that a mean of two experts
    unit by unit has no meaning before they are matched. The permutation
    `argmax_P sum_k <u_k, v_P(k)>` over the weights `u_k` of the leader's unit k and
    `v_P(k)` of the expert's (its gate and up columns, its down row, its biases, all in
    one) makes the Euclidean distance of the two experts least; it is a linear sum
    assignment. What an expert computes does not change. Li et al. (2023,
    arXiv:2310.01334); Ainsworth et al. (2022, arXiv:2209.04836).

    Differs from the reference implementation, which aligns all experts to expert 0,
    before it is known who joins whom, and leaves biases out of the sum. For expert 0
    pass `np.zeros(E, int)`.

    Args:
      experts: a tree of arrays `[E, ...]`.
      to: `[E]` integers: the expert that each is aligned to; those that name
        themselves stay as they are. `grouping.dominant[grouping.labels]`.
      hidden: by path in `experts`, the axis of the stacked array that the hidden units
        are on (1 or more, or negative). What is not named (an output bias) stays.

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
      >>> aligned = js.structured.align_experts(
      ...     {"up": up, "down": down}, np.array([0, 0]), hidden={"up": 2, "down": 1}
      ... )
      >>> aligned["up"].tolist(), aligned["down"][..., 0].tolist()
      ([[[1.0, 2.0]], [[1.0, 2.0]]], [[3.0, 4.0], [3.0, 4.0]])
    """
    from scipy import optimize  # slow to import, and needed here alone

    n = count_experts(experts)
    to = np.asarray(to)
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
            similarity = np.asarray(
                _similarity(units, unit_axes, leader, e), np.float64
            )
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
        units = lambda i: jnp.moveaxis(wide(x[i]), axis - 1, 0).reshape(
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
    """One expert for each group: the mean of its members, by usage.

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
      >>> js.structured.merge_experts(experts, np.array([0, 0, 1]), usage=usage)
      {'up': Array([[2.], [7.]], dtype=float32)}
    """
    n = count_experts(experts)
    labels, groups = check_labels(labels, n)
    if usage is None:
        usage = jnp.ones(n, jnp.float32)
    if jnp.shape(usage) != (n,):
        raise ValueError(f"usage has shape {jnp.shape(usage)}, expected ({n},).")
    if _checks.is_concrete(usage) and not float(np.min(usage)) >= 0:
        raise ValueError(f"usage must be at least 0, got {usage}.")
    return _merge(experts, usage, labels, np.arange(groups)[:, None] == labels)


@jax.jit
def _merge(experts: PyTree, usage: Array, labels: Array, member: Array) -> PyTree:
    n, groups = labels.shape[0], member.shape[0]
    weight = jnp.where(member, wide(jnp.asarray(usage))[None], -1)
    leader = jnp.argmax(weight, axis=1)  # the most used of each group
    weight = jnp.maximum(weight, 0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    share = weight / jnp.where(total > 0, total, jnp.ones_like(total))

    def merged(x: Any) -> Array:
        y = wide(x)
        off = (y - y[leader[labels]]).reshape(n, -1)
        mean = jnp.matmul(share.astype(y.dtype), off, precision=HIGHEST)
        return (y[leader] + mean.reshape(groups, *y.shape[1:])).astype(x.dtype)

    return jax.tree.map(merged, experts)


def merge_gates(gates: Array, labels: Any) -> Array:
    """The weight of each merged expert: the sum of its members' weights.

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
      >>> js.structured.merge_gates(gates, np.array([0, 1, 0])).tolist()
      [[0.75, 0.25]]
    """
    if jnp.ndim(gates) < 1:
        raise ValueError("gates must be `[..., experts]`, got a scalar.")
    labels, groups = check_labels(labels, jnp.shape(gates)[-1])
    zeros = jnp.zeros((*gates.shape[:-1], groups), gates.dtype)
    return zeros.at[..., labels].add(gates)


def wide(x: Array) -> Array:
    """At least float32: means of 16-bit weights are taken in it."""
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)


def count_experts(experts: PyTree) -> int:
    """The size of the leading axis that all leaves have in common."""
    sizes = {path: jnp.shape(x)[:1] for path, x in leaves_with_paths(experts)}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(
            f"Every array needs the experts on its first axis, got first axes of "
            f"{ {path: s[0] if s else None for path, s in sizes.items()} }. Move them "
            "there (a router kernel `[d, E]` is transposed), and leave out what has "
            "no experts."
        )
    return next(iter(sizes.values()))[0]


def check_labels(labels: Any, n: int) -> tuple[np.ndarray, int]:
    """The labels as numpy integers, and how many groups they have."""
    if not _checks.is_concrete(labels):
        raise ValueError("labels decide about shapes, so they cannot be traced.")
    labels = np.asarray(labels)
    integer = labels.dtype.kind in "iu"
    groups = int(labels.max()) + 1 if integer and labels.size else 0
    if not integer or labels.shape != (n,) or {*labels.tolist()} != {*range(groups)}:
        raise ValueError(
            f"labels must be {n} integers, the group of each expert, and use every "
            f"number from 0 to the highest; got {labels}. "
            "np.unique(labels, return_inverse=True)[1] renumbers groups."
        )
    return labels, groups


def check_total(name: str, total: Any, sizes: list[int], at_least: Any) -> None:
    """Raises unless so many experts can remain in layers of these sizes."""
    _checks.check_positive_int(total, name=name)
    _checks.check_positive_int(at_least, name="at_least")
    if not sizes:
        raise ValueError("There are no layers: the tree has no leaves.")
    if at_least > min(sizes):
        raise ValueError(
            f"at_least is {at_least}, but a layer has {min(sizes)} experts."
        )
    if not at_least * len(sizes) <= total <= sum(sizes):
        raise ValueError(
            f"{name} is {total}, expected from {at_least * len(sizes)} (at_least="
            f"{at_least} in each of {len(sizes)} layers) to {sum(sizes)} (all experts)."
        )


def at(path: str) -> str:
    return f"[{path!r}]" if path else ""
