"""Saliency of channels from weights and gradients, and the weakest of all groups."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array, PyTree
from jaxsparse.channels.slices import Slices, wide_leaves
from jaxsparse.channels.sums import entry_counts, sums


class Criteria(NamedTuple):
    """The weight of each criterion in HESSO's saliency of a channel.

    x are the n entries of its slices, and g their gradients. Each criterion is first
    divided by its L2 norm over all channels of all groups.

    Attributes:
      magnitude: `||x||`.
      mean_magnitude: `||x|| / n`.
      cosine: `1 - cos(x, g)`.
      taylor: `|x . g|`.
      taylor_squared: `1/2 (x . g)^2`.
    """

    magnitude: float = 0.2
    mean_magnitude: float = 0.2
    cosine: float = 0.2
    taylor: float = 0.2
    taylor_squared: float = 0.2


def saliency(
    slices: Mapping[str, Slices],
    params: PyTree,
    grads: PyTree,
    *,
    criteria: Criteria,
) -> dict[str, Array]:
    """The weighted sum of the criteria."""
    x = wide_leaves(slices, params)
    held = wide_leaves(slices, grads)
    g = {path: held[path].astype(w.dtype) for path, w in x.items()}
    xx = sums(slices, {path: w * w for path, w in x.items()})
    xg = sums(slices, {path: w * g[path] for path, w in x.items()})
    gg = sums(slices, {path: w * w for path, w in g.items()})
    counts = entry_counts(slices, params)
    parts = {name: _criteria(xx[name], xg[name], gg[name], counts[name]) for name in xx}
    total = {name: jnp.zeros_like(s) for name, s in xx.items()}
    for k, weight in enumerate(criteria):
        squares = [jnp.sum(jnp.square(p[k])) for p in parts.values()]
        norm = jnp.sqrt(sum(squares, start=jnp.zeros((), squares[0].dtype)))
        norm = jnp.where(norm > 0, norm, jnp.ones_like(norm))
        total = {name: total[name] + weight * parts[name][k] / norm for name in parts}
    return total


def _criteria(xx: Array, xg: Array, gg: Array, counts: np.ndarray) -> list[Array]:
    """In the order of `Criteria`."""
    norm = jnp.sqrt(xx)
    lengths = norm * jnp.sqrt(gg)
    one, zero = jnp.ones_like(xx), jnp.zeros_like(xx)
    cosine = jnp.where(lengths > 0, xg / jnp.where(lengths > 0, lengths, one), zero)
    return [
        norm,
        norm / jnp.asarray(counts, xx.dtype),
        jnp.where(xx > 0, 1 - cosine, zero),  # what is zero is not missed
        jnp.abs(xg),
        jnp.square(xg) / 2,
    ]


def lowest(
    scores: Mapping[str, Array], count: Array, *, first: Mapping[str, Array]
) -> dict[str, Array]:
    """The `count` weakest indices over all groups.

    The r-th weakest ones of all copies of a group go together and count as one, with
    their mean score. The strongest of each group stays. Among equals the one with the
    lower index, in the earlier group, is kept.
    """
    ranks: dict[str, Array] = {}
    queue: list[Array] = []
    for name in reversed(list(scores)):  # a stable sort takes the later group first
        s = scores[name]
        size = s.shape[-1]
        s = jnp.where(jnp.isnan(s), jnp.full_like(s, jnp.finfo(s.dtype).min), s)
        s = jnp.where(first[name], jnp.full_like(s, -jnp.inf), s).reshape(-1, size)
        order = size - 1 - jnp.argsort(s[:, ::-1], axis=-1, stable=True)
        ranks[name] = jnp.argsort(order, axis=-1).reshape(scores[name].shape)
        mean = jnp.mean(jnp.take_along_axis(s, order, axis=-1), axis=0)
        queue.append(mean.at[-1].set(jnp.inf))
    place = jnp.argsort(jnp.argsort(jnp.concatenate(queue), stable=True))
    taken = place < jnp.asarray(count, place.dtype)
    result, start = {}, 0
    for name, rank in ranks.items():
        size = rank.shape[-1]
        result[name] = rank < jnp.sum(taken[start : start + size])
        start += size
    return {name: result[name] for name in scores}


def removed_by(
    slices: Mapping[str, Slices], sparsity: float, periods: int
) -> list[int]:
    """How many indices are gone after each period."""
    sizes = [s.shape[-1] for s in slices.values()]
    total = math.floor(float(sparsity) * sum(sizes) + 0.5)
    most = sum(sizes) - len(sizes)
    if total > most:
        raise ValueError(
            f"sparsity={sparsity!r} removes {total} of {sum(sizes)} indices, but each "
            f"of the {len(sizes)} groups keeps at least one: at most {most}."
        )
    return [math.floor(total * (p + 1) / periods + 0.5) for p in range(periods)]
