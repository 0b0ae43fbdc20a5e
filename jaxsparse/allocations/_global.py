"""Allocations from scores, and the rounding that makes counts exact."""

import math

import jax

from jaxsparse import _checks, patterns
from jaxsparse._typing import PyTree, Where
from jaxsparse.tree import AxesRule, by_rules, leaves_with_paths, like, select


def from_global_scores(
    scores: PyTree,
    sparsity: float,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(scope="global"),
    where: Where = None,
    axes: AxesRule = None,
    min_keep: int = 1,
) -> PyTree:
    """Return the sparsity of each parameter when all weights compete for one budget.

    Selecting each parameter on its own with these sparsities gives the masks of the
    global scope. Use it to pass a global budget to a method that works layer by layer,
    or to inspect it.

    Args:
      scores: a tree of arrays, larger = keep.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      pattern: a pattern of the global scope.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      min_keep: how many units each layer keeps at least, as there.

    Returns:
      A tree of Python floats in [0, 1) with the structure of `scores`, 0.0 where not
      selected; one that loses everything (`min_keep=0`) gets the float64 just below 1.
      (It reads values, so it cannot run under jit.)

    Raises:
      ValueError: a pattern of another scope, or what `jaxsparse.patterns.masks` raises.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> scores = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 1.5]])}
      >>> js.allocations.from_global_scores(scores, 0.5)
      {'a': 0.5, 'b': 0.5}
    """
    _checks.check_pattern(patterns.Pattern, pattern)
    _checks.check_arrays(scores=scores)
    if getattr(pattern, "scope", None) != "global":
        raise ValueError(f"{pattern} does not compete globally: give scope='global'.")
    options = {"pattern": pattern, "where": where, "axes": axes}
    _checks.check_known("js.allocations.from_global_scores", scores=scores)
    masks = patterns.masks(scores, sparsity, **options, min_keep=min_keep)
    reached = patterns.sparsity_of(masks, scores)
    return jax.tree.map(_below_one, reached)


def round_to_weights(
    params: PyTree, sparsities: PyTree, *, where: Where = None
) -> PyTree:
    """Round sparsities so that their counts add up exactly.

    Each parameter removes a whole number of weights, so the sum of `floor(s_l * n_l +
    1/2)` may miss the total by half a weight per layer. This rounds each `s_l * n_l`
    down or up, by largest remainder, such that the sum is `floor(sum(s_l * n_l) +
    1/2)`.

    Args:
      params: the parameters; only their shapes are read.
      sparsities: a tree of numbers in [0, 1), as the other allocations return; or a
        mapping from paths or regular expressions, see `jaxsparse.tree.by_rules`.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      A tree of Python floats, each a whole number of weights over the size; one that
      loses everything gets the float64 just below 1.

    Raises:
      ValueError: another structure, or a sparsity outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"a": jnp.ones((1, 3)), "b": jnp.ones((1, 3)), "c": jnp.ones((1, 4))}
      >>> even = js.allocations.uniform(params, 0.5)
      >>> js.allocations.round_to_weights(params, even)["c"]
      0.5
      >>> sum(s * n for s, n in zip(
      ...     js.allocations.round_to_weights(params, even).values(), (3, 3, 4)))
      5.0
    """
    _checks.check_arrays(abstract=True, params=params)
    sparsities, where = by_rules(params, sparsities, where, name="sparsities")
    sparsities = like(sparsities, params, name="sparsities")
    named = leaves_with_paths(params)
    values = jax.tree.leaves(sparsities)
    selected = jax.tree.leaves(select(params, where))
    for (path, _), value in zip(named, values, strict=True):
        _checks.check_sparsity(value, name=f"{path}: sparsity")
        if isinstance(value, jax.ShapeDtypeStruct):
            raise TypeError(f"{path}: sparsities must be numbers, got {value}.")
    sizes = [math.prod(x.shape) for _, x in named]
    exact = [s * n for s, n in zip(values, sizes, strict=True)]
    taken = [i for i, take in enumerate(selected) if take]
    counts = {i: math.floor(exact[i] + 1e-9) for i in taken}
    missing = math.floor(sum(exact[i] for i in taken) + 0.5) - sum(counts.values())
    by_remainder = sorted(taken, key=lambda i: counts[i] - exact[i])
    for i in by_remainder[:missing]:
        counts[i] += 1
    return jax.tree.unflatten(
        jax.tree.structure(params),
        [
            _below_one(counts[i] / max(1, sizes[i])) if i in counts else float(value)
            for i, value in enumerate(values)
        ],
    )


def _below_one(sparsity: float) -> float:
    # A parameter that loses everything: the number below 1 counts the same.
    return min(sparsity, math.nextafter(1.0, 0.0))
