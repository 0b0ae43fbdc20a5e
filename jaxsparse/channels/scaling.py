"""Each index's number at the entries of its slices, and multiplying them by it."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from jaxsparse._dtypes import as_wide
from jaxsparse._sharded import sharded_like
from jaxsparse._typing import Array, PyTree
from jaxsparse.channels.slices import Part, Slices, is_plain, others_of
from jaxsparse.tree import leaves_with_paths, map_with_path


def spread(
    slices: Mapping[str, Slices],
    vectors: Mapping[str, Array],
    ndims: Mapping[str, int],
    *,
    combine: Callable[[Array, Array], Array],
    fill: float,
) -> dict[str, Array]:
    """Each index's number at all entries of its slices."""
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
    if is_plain(part, flat.size):
        x = flat.reshape(labels.shape)
    else:
        if np.any(labels < 0):
            flat = jnp.append(flat, jnp.asarray(fill, flat.dtype))
            labels = np.where(labels < 0, flat.size - 1, labels)
        x = flat[labels]
    return jnp.expand_dims(x, others_of(part, ndim))


def factors_of(
    slices: Mapping[str, Slices], vectors: Mapping[str, Array], tree: PyTree
) -> dict[str, Array]:
    """What each parameter is multiplied by when each index's slices are."""
    ndims = {path: np.ndim(x) for path, x in leaves_with_paths(tree)}
    return spread(slices, vectors, ndims, combine=jnp.multiply, fill=1.0)


def scaled_updates(
    updates: PyTree, params: PyTree, factors: Mapping[str, Array]
) -> PyTree:
    """Updates `u'` such that `params + u' = factor * (params + u)`.

    Exactly 0.0 where the factor is 0, and `u` itself where it is 1. They take the
    parameter's dtype, without which neither would hold.
    """

    def move(u: Array, factor: Array, w: Array) -> Array:
        wide = as_wide(w)
        moved = (wide + u.astype(wide.dtype)) * factor.astype(wide.dtype)
        changed = jnp.where(factor == 0, -w, (moved - wide).astype(w.dtype))
        return jnp.where(factor == 1, u.astype(w.dtype), changed)

    return map_at(move, updates, factors, dict(leaves_with_paths(params)))


def map_at(
    f: Callable[..., Array],
    tree: PyTree,
    found: Mapping[str, Array],
    *others: Mapping[str, Array],
) -> PyTree:
    """`f(leaf, found, *others)` for the leaves whose path is in `found`."""

    def one(path: str, x: Array) -> Array:
        if path not in found:
            return x
        return sharded_like(f, x, found[path], *(other[path] for other in others))

    return map_with_path(one, tree)
