"""The masks that a schedule begins with: given ones, or all kept."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import patterns
from jaxsparse._checks import is_concrete
from jaxsparse._together import each
from jaxsparse._typing import Array, PyTree
from jaxsparse.transforms._state import leaked_weights
from jaxsparse.tree import leaves_with_paths


def check_masked(params: PyTree, masks: PyTree) -> None:
    """Raises where weights are not zero under the masks."""
    patterns.check_masks(masks, params)
    named = leaves_with_paths(params)
    counts = each(leaked_weights, [w for _, w in named], jax.tree.leaves(masks))
    for (path, _), leaked in zip(named, counts, strict=True):
        if is_concrete(leaked) and int(leaked):
            raise ValueError(
                f"{path}: {int(leaked)} weights are not zero under the adopted mask. "
                "Mask them first: params = js.patterns.apply(params, masks)."
            )


def all_kept(shapes: PyTree, params: PyTree) -> PyTree:
    """Masks of ones that follow their parameters' shardings where they have a shape."""
    leaves, treedef = jax.tree.flatten(shapes)
    pairs = zip(leaves, jax.tree.leaves(params), strict=True)
    like = {
        i: w for i, (s, w) in enumerate(pairs) if s.shape == jnp.shape(w) and s.shape
    }
    found = dict(zip(like, each(_ones_like, list(like.values())), strict=True))
    small = lambda shape: jnp.asarray(np.ones(shape, np.bool_))
    return treedef.unflatten([
        found[i] if i in found else small(s.shape) for i, s in enumerate(leaves)
    ])


def _ones_like(w: Array) -> Array:
    return jnp.ones_like(w, dtype=bool)


def last_where_gone(score: Array, mask: Array) -> Array:
    """Scores of which those of exact zeros that are held come last."""
    return jnp.where(mask, score, -jnp.inf) if jnp.ndim(mask) else score
