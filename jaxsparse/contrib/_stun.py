"""Clusters of experts that the router treats alike, and one expert for each (STUN)."""

import heapq
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._host import on_host
from jaxsparse._typing import Array, PyTree
from jaxsparse.experts.checks import at, check_labels, check_total, count_experts
from jaxsparse.experts.merging import group_means, merge_experts
from jaxsparse.tree import leaves_with_paths

Merge = tuple[float, int, int]
"""At which distance two clusters join, and the lowest expert of each."""


class MergedExperts(NamedTuple):
    """The merged experts of a layer and its narrowed router.

    Attributes:
      experts: a tree of arrays `[clusters, ...]`.
      router: the same for the router's rows.
    """

    experts: PyTree
    router: PyTree


def expert_distances(
    router: Array,
    coactivation: Array | None = None,
    *,
    router_weight: float = 1.0,
    coactivation_weight: float = 1.0,
) -> Array:
    """Measure how different experts are, from the router alone.

    `D_ij = router_weight * |r_i - r_j| - coactivation_weight * a_ij / mean(a)`, where
    `r_i` is the router's row for expert i and `a_ij` counts the tokens that were sent
    to both: experts of similar rows get similar tokens, and those that act together are
    redundant. Without `a` it is `router_weight * |r_i - r_j| / |R|`, with the Frobenius
    norm of the router, so that layers can be compared. Only `a` needs forward passes.
    Lee et al. (2024, arXiv:2409.06211).

    As in the reference implementation the mean is over all `E^2` entries, the diagonal
    being 0. The result differs where no two experts ever act together (a router that
    picks one): here the second term is 0, there it is NaN.

    Args:
      router: `[E, d]`; a flax kernel `[d, E]` is transposed.
      coactivation: `[E, E]`, `routed.T @ routed` for `routed` `[n, E]` of 0 and 1. Its
        diagonal is ignored.
      router_weight: the lambda_2 of the paper.
      coactivation_weight: the lambda_1 of the paper.

    Returns:
      `[E, E]`, symmetric, 0 on the diagonal; at least float32. Negative where experts
      act together often.

    Raises:
      ValueError: other shapes.
      TypeError: a router that is not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> router = jnp.array([[0.0, 3.0], [4.0, 0.0], [0.0, 3.0]])
      >>> together = jnp.array([[9, 0, 3], [0, 9, 0], [3, 0, 9]])
      >>> js.contrib.expert_distances(router, together)[0].tolist()
      [0.0, 5.0, -4.5]
    """
    _checks.check_arrays(router=router)
    _checks.check_all_numbers(router=router)
    if jnp.ndim(router) != 2:
        raise ValueError(
            f"router has shape {jnp.shape(router)}, expected [experts, d]: one row for "
            "each expert (a flax kernel [d, experts] is transposed)."
        )
    if not jnp.issubdtype(router.dtype, jnp.floating):
        raise TypeError(f"router must be floating point, got {router.dtype}.")
    n = router.shape[0]
    if coactivation is not None and jnp.shape(coactivation) != (n, n):
        raise ValueError(
            f"coactivation has shape {jnp.shape(coactivation)}, expected ({n}, {n}) "
            f"for a router with {n} rows. Is the router transposed?"
        )
    return _distances(router, coactivation, router_weight, coactivation_weight)


@jax.jit
def _distances(router: Array, together: Any, router_weight: Any, weight: Any) -> Array:
    r = as_wide(router)
    # Row by row: the differences of all pairs would be E times the router.
    apart = lambda row: jnp.sqrt(jnp.sum(jnp.square(r - row[None]), axis=1))
    distances = jax.lax.map(apart, r) * jnp.asarray(router_weight).astype(r.dtype)
    if together is None:
        norm = jnp.sqrt(jnp.sum(jnp.square(r)))
        return distances / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    a = jnp.asarray(together).astype(r.dtype)
    a = jnp.where(jnp.eye(a.shape[0], dtype=bool), jnp.zeros((), r.dtype), a)
    mean = jnp.abs(jnp.mean(a))
    a = a / jnp.where(mean > 0, mean, jnp.ones_like(mean))
    return distances - jnp.asarray(weight).astype(r.dtype) * a


def cluster_experts(
    distances: PyTree, *, clusters: int, threshold: float = math.inf, at_least: int = 1
) -> PyTree:
    """Cluster experts by complete linkage, to a total over layers.

    It joins the two clusters whose most distant members are nearest, until `clusters`
    remain. Over several layers the merges of all are taken in the order of their
    distances, so one threshold holds for all layers and each keeps what its experts
    need. Lee et al. (2024, arXiv:2409.06211).

    Differs from the reference implementation. The reference visits pairs of experts,
    the nearest first, and joins their clusters if no member of one is farther than the
    threshold from the pair's expert in the other. It does not compare other members;
    without a threshold it is single linkage, where clusters grow into chains. It then
    searches for the threshold that gives the total, which need not exist. Distances of
    merges by complete linkage only grow, so here the total is exact without a search.

    Args:
      distances: `[E, E]`, symmetric, of either sign, as `expert_distances` makes; or a
        tree of them, one for each layer. The diagonal is ignored.
      clusters: the number of clusters to keep, over all layers together.
      threshold: clusters with members that far apart or farther never join, so more
        than `clusters` may remain.
      at_least: the least number to keep in each layer; no fewer than the router picks
        for a token.

    Returns:
      For each layer `[E]` integers, the cluster of each expert, numbered by their
      lowest expert; a tree like `distances`. (It reads values, so it cannot run under
      jit. It costs `O(E^3)`.)

    Raises:
      ValueError: distances that are not square, symmetric and finite; fewer clusters
        than `at_least` in each layer, or more than experts.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> place = np.array([0.0, 1.0, 5.0, 5.5])
      >>> distances = abs(place[:, None] - place)
      >>> js.contrib.cluster_experts(distances, clusters=2).tolist()
      [0, 0, 1, 1]
      >>> layers = {"a": distances, "b": 20 * distances}
      >>> found = js.contrib.cluster_experts(layers, clusters=5)
      >>> {name: labels.tolist() for name, labels in found.items()}
      {'a': [0, 0, 0, 0], 'b': [0, 1, 2, 3]}
    """
    _checks.check_arrays(distances=distances)
    named = leaves_with_paths(distances)
    layers = [_checked(path, d) for path, d in named]
    sizes = [len(d) for d in layers]
    check_total("clusters", clusters, sizes, at_least)
    by_layer = [
        [(height, layer, a, b) for height, a, b in _merges(d)[: len(d) - at_least]]
        for layer, d in enumerate(layers)
    ]
    owner = [np.arange(n) for n in sizes]
    merges = heapq.merge(*by_layer, key=lambda merge: merge[:2])
    for _, (height, layer, a, b) in zip(
        range(sum(sizes) - clusters), merges, strict=False
    ):
        if height >= threshold:
            break
        owner[layer][owner[layer] == b] = a
    number = lambda o: np.unique(o, return_inverse=True)[1].astype(np.int32)
    return jax.tree.unflatten(jax.tree.structure(distances), map(number, owner))


def _merges(distances: np.ndarray) -> list[Merge]:
    """All merges by complete linkage, nearest first; among equals, the lower index."""
    n = len(distances)
    far = distances.copy()
    np.fill_diagonal(far, np.inf)
    merges = []
    for _ in range(n - 1):
        a, b = divmod(int(np.argmin(far)), n)
        merges.append((float(far[a, b]), a, b))
        # Their own entries are infinite, and so are those of clusters that are gone.
        far[a] = far[:, a] = np.maximum(far[a], far[b])
        far[b] = far[:, b] = np.inf
    return merges


def _checked(path: str, distances: Any) -> np.ndarray:
    d = np.array(on_host(distances), np.float64)
    if d.ndim != 2 or d.shape[0] != d.shape[1] or not d.size:
        raise ValueError(
            f"distances{at(path)} has shape {d.shape}, expected [experts, experts]."
        )
    np.fill_diagonal(d, 0)
    scale = np.abs(d).max()
    if not np.isfinite(scale) or not np.allclose(d, d.T, rtol=0, atol=1e-5 * scale):
        raise ValueError(
            f"distances{at(path)} must be finite and symmetric; it has "
            f"{(~np.isfinite(d)).sum()} entries that are not finite, and differs from "
            f"its transpose by up to {np.abs(d - d.T).max()}. For distances of one "
            "direction take the maximum: np.maximum(d, d.T)."
        )
    return np.maximum(d, d.T)


def medoids(experts: PyTree, labels: Any) -> Array:
    """Return the member of each cluster that is closest to the mean of all.

    Distances are Euclidean over all weights of an expert. To keep one member of each
    cluster, drop all indices that are not medoids: they are the entries of a `Drop`.

    Differs from the reference implementation, where rounding decides between the two
    members of a pair, which are equally far: here distances that agree to a part in
    1e5 are equal, and the lower index is taken.

    Args:
      experts: a tree of arrays `[E, ...]`.
      labels: `[E]` integers, the cluster of each expert, as `cluster_experts` makes.

    Returns:
      `[clusters]` integers.

    Raises:
      ValueError: labels that are not one number for each expert or leave a cluster
        empty, arrays whose first axes differ.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsparse as js
      >>> experts = {"up": jnp.array([[0.0], [1.0], [4.0], [7.0]])}
      >>> js.contrib.medoids(experts, np.array([0, 0, 0, 1])).tolist()
      [1, 3]
    """
    _checks.check_arrays(experts=experts)
    n = count_experts(experts)
    labels, clusters = check_labels(labels, n)

    return _medoids(experts, labels, np.arange(clusters)[:, None] == labels)


@jax.jit
def _medoids(experts: PyTree, labels: Array, member: Array) -> Array:
    n = labels.shape[0]
    experts = jax.tree.map(as_wide, experts)
    means = group_means(experts, jnp.ones(n, jnp.float32), labels, member)
    to_mean = lambda x, mean: jnp.sum(jnp.square(x - mean[labels]).reshape(n, -1), 1)
    each = jax.tree.leaves(jax.tree.map(to_mean, experts, means))
    precise = jnp.result_type(*(d.dtype for d in each))
    distance = jnp.sum(jnp.stack([d.astype(precise) for d in each]), axis=0)
    distance = jnp.where(member, distance[None], jnp.inf)
    nearest = jnp.min(distance, axis=1, keepdims=True)
    return jnp.argmax(distance <= nearest * (1 + 1e-5), axis=1)


def merge_clusters(
    experts: PyTree, router: PyTree, labels: Any, *, average_up_to: int = 0
) -> MergedExperts:
    """Merge each cluster into one expert, and narrow the router.

    A layer that has `average_up_to` clusters or fewer gets the means of their experts
    and of their router rows; a layer with more keeps the medoid of each cluster with
    its row (`medoids`). Lee et al. (2024, arXiv:2409.06211), where it balances two
    errors: means are closer to all members, and members are experts that were trained.

    Differs from the reference implementation: biases of the router are averaged, while
    the reference sets the bias of a mean to 0. Like the reference, it matches hidden
    units by position; to average matched units, call `align_experts` first.

    Args:
      experts: a tree of arrays `[E, ...]`.
      router: a tree of arrays `[E, ...]`: its rows, its biases. A flax kernel `[d, E]`
        goes in and comes out transposed.
      labels: `[E]` integers, the cluster of each expert, as `cluster_experts` makes.
      average_up_to: the largest number of clusters whose members are averaged. 0 (the
        default of the reference implementation) always keeps medoids.

    Returns:
      A `MergedExperts`; the cluster with label 0 comes first.

    Raises:
      ValueError: as for `medoids`; a router with another number of experts.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsparse as js
      >>> experts = {"up": jnp.array([[0.0], [1.0], [5.0]])}
      >>> rows, labels = jnp.array([[1.0], [3.0], [9.0]]), np.array([0, 0, 1])
      >>> js.contrib.merge_clusters(experts, rows, labels).router.tolist()
      [[1.0], [9.0]]
      >>> mean = js.contrib.merge_clusters(experts, rows, labels, average_up_to=2)
      >>> mean.experts["up"].tolist(), mean.router.tolist()
      ([[0.5], [5.0]], [[2.0], [9.0]])
    """
    _checks.check_arrays(experts=experts, router=router)
    _checks.check_all_numbers(router=router)
    n = count_experts(experts)
    if count_experts(router) != n:
        raise ValueError(
            f"The router has {count_experts(router)} rows for {n} experts. A kernel "
            "`[d, experts]` has to be transposed."
        )
    _, clusters = check_labels(labels, n)
    if clusters <= average_up_to:
        return MergedExperts(
            merge_experts(experts, labels), merge_experts(router, labels)
        )
    kept = medoids(experts, labels)
    take = lambda x: jnp.asarray(x)[kept]
    return MergedExperts(jax.tree.map(take, experts), jax.tree.map(take, router))
