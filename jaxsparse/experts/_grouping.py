"""Which experts of an MoE become one: how alike they look to the router (M-SMoE)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._host import on_host
from jaxsparse._typing import Array, PyTree
from jaxsparse.experts.checks import at, check_total
from jaxsparse.linalg.factor import HIGHEST
from jaxsparse.tree import leaves_with_paths


class Grouping(NamedTuple):
    """A grouping of a layer's experts: which of them are merged.

    Attributes:
      labels: `[E]` integers, the group of each expert.
      dominant: `[groups]` integers, the expert that leads each group, ascending;
        `dominant[labels]` is the leader of each expert.
    """

    labels: np.ndarray
    dominant: np.ndarray


def router_similarity(logits: Array) -> Array:
    """Compare experts by the router: cosines of their logits over tokens.

    `cos_ij = l_i . l_j / (|l_i| |l_j|)`, with the logits `l_i` of expert i for all
    tokens; the mean is not subtracted. Li et al. (2023, arXiv:2310.01334).

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
      >>> js.experts.router_similarity(logits)[0, :2].round(5).tolist()
      [1.0, 1.0]
    """
    _checks.check_arrays(logits=logits)
    _checks.check_all_numbers(logits=logits)
    if jnp.ndim(logits) < 2:
        raise ValueError(
            f"logits has shape {jnp.shape(logits)}, expected [..., tokens, experts]."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating point, got {logits.dtype}.")
    x = as_wide(logits)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-2, keepdims=True))
    x = x / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    return jnp.einsum("...ni,...nj->...ij", x, x, precision=HIGHEST)


def group_experts(
    usage: PyTree, similarity: PyTree, *, groups: int, at_least: int = 1
) -> Any:
    """Choose dominant experts, and assign each other expert to one of them.

    The experts of all layers compete by their share of their layer's tokens. The
    `groups` most used experts dominate, so a layer with even usage keeps more of them.
    Every other expert joins the most similar dominant expert of its layer. Li et al.
    (2023, arXiv:2310.01334).

    Differs from the reference implementation, whose threshold is strict: with ties it
    finds fewer groups than were asked for. Here the number is exact, and among equals
    the earlier layer and the lower index come first.

    Args:
      usage: how many tokens each expert got, `[E]`; or a tree of such arrays, one for
        each layer.
      similarity: `[E, E]`, larger = more alike, as `router_similarity` makes; a tree of
        the same structure.
      groups: the number of experts to keep over all layers together.
      at_least: the least number to keep in each layer, whatever its usage. As many as
        the router picks for a token is a good choice where the router is narrowed too.

    Returns:
      A `Grouping`; for a tree of layers a tree of them. (It reads values, so it cannot
      run under jit.)

    Raises:
      ValueError: fewer groups than `at_least` in each layer, more than experts, usage
        that is negative or NaN, NaN similarities, shapes that do not fit.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> cos = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
      >>> found = js.experts.group_experts(np.array([70, 10, 20]), cos, groups=2)
      >>> found.labels.tolist(), found.dominant.tolist()
      ([0, 0, 1], [0, 2])
    """
    _checks.check_arrays(usage=usage, similarity=similarity)
    _checks.same_structure(similarity, usage, name="similarity", of="usage")
    shares = [_share(p, u) for p, u in leaves_with_paths(usage)]
    alike = [np.asarray(on_host(s), np.float64) for s in jax.tree.leaves(similarity)]
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
    usage = np.asarray(on_host(usage), np.float64)
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
