"""What is asked for: a sparsity as numbers of units to keep."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import count_dtype
from jaxsparse._typing import Array, PyTree, Sparsity
from jaxsparse.patterns._counts import removed_count
from jaxsparse.patterns._spec import NM, Pattern
from jaxsparse.patterns.nm import check_removable
from jaxsparse.tree import leaves_with_paths, like


def sparsities_of(scores: PyTree, sparsity: Sparsity, pattern: Pattern) -> list[Any]:
    """One sparsity a leaf."""
    if sparsity is None:
        if not isinstance(pattern, NM):
            raise ValueError(
                f"{pattern} needs a sparsity, the fraction of weights to remove."
            )
        sparsity = pattern.sparsity
    count = len(jax.tree.leaves(scores))
    if jax.tree_util.all_leaves([sparsity]):
        _checks.check_sparsity(sparsity)
        return [sparsity] * count
    if not isinstance(pattern, NM) and pattern.scope == "global":
        raise ValueError(
            "In the global scope all weights compete for one budget, so it takes one "
            "sparsity and finds each parameter's; got a tree or rules. Pass a number, "
            "or scope='layer'."
        )
    sparsity = like(sparsity, scores, name="sparsity", of="scores")
    for path, value in leaves_with_paths(sparsity):
        _checks.check_sparsity(value, name=f"{path}: sparsity")
    return jax.tree.leaves(sparsity)


def keep_of(path: str, n: int, sparsity, pattern: Pattern, min_keep: int) -> Array:
    """How many of `n` units stay in a group."""
    removed = removed_count(sparsity, n)
    if isinstance(pattern, NM):
        most = pattern.of - pattern.keep
        if isinstance(removed, int):
            check_removable(pattern, sparsity, path=path)
    else:
        most = max(0, n - min_keep)
    if isinstance(removed, int):  # of a number, for which nothing is compiled
        removed = min(removed, most)
    else:
        removed = jnp.minimum(removed, most)
    return jnp.asarray(n - removed, count_dtype(n))
