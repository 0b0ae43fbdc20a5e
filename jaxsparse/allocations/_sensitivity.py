"""How much each parameter alone costs, sparsity by sparsity."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.tree import AxesRule, leaves_with_paths, like, select


class Sensitivity(NamedTuple):
    """The loss of a model in which only one parameter is pruned.

    Attributes:
      dense: the loss of the model as it was.
      sparsities: the fractions that were removed.
      losses: by path the loss at each of them, float64 `[len(sparsities)]`.
    """

    dense: float
    sparsities: tuple[float, ...]
    losses: dict[str, np.ndarray]


def sensitivity(
    params: PyTree,
    scores: PyTree,
    loss_fn: Callable[[PyTree], Array],
    sparsities: Sequence[float],
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
) -> Sensitivity:
    """Measure the loss while one parameter at a time is pruned.

    Parameters whose loss rises early should keep more;
    `jaxsparse.report.plot_sensitivity` draws the curves. Li et al. (2017,
    arXiv:1608.08710, section 3.2) choose dense layers from such curves, Han et al.
    (2015, arXiv:1506.02626) thresholds.

    It calls the loss once for the dense model, and once for each parameter and
    sparsity; pass a jitted one. It holds one pruned copy of the parameters at a time.

    Args:
      params: the parameters.
      scores: a tree of the same structure, larger = keep, as
        `jaxsparse.scores.magnitude(params)`.
      loss_fn: `loss_fn(params)`, a scalar: the loss (or an accuracy) on held-out data.
      sparsities: the fractions to remove, each in [0, 1).
      pattern: which weights are removed together; not of the global scope.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.

    Returns:
      The losses, by path in the order of the parameters.

    Raises:
      ValueError: no sparsities, one outside [0, 1), a pattern of the global scope or
        with a sparsity of its own, or as for `jaxsparse.patterns.masks`.
      TypeError: a loss that is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"a": jnp.array([[4.0, 1.0]]), "b": jnp.array([[2.0, 2.0]])}
      >>> total = lambda p: sum(jnp.sum(w) for w in jax.tree.leaves(p))
      >>> found = js.allocations.sensitivity(
      ...     params, js.scores.magnitude(params), jax.jit(total), [0.5])
      >>> found.dense, {path: x.tolist() for path, x in found.losses.items()}
      (9.0, {'a': [8.0], 'b': [7.0]})
    """
    _checks.check_arrays(params=params)
    _checks.check_callable(1, loss_fn=loss_fn)
    _checks.check_pattern(patterns.Pattern, pattern)
    sparsities = _checked(sparsities)
    if getattr(pattern, "scope", None) == "global" or isinstance(pattern, patterns.NM):
        raise ValueError(
            f"{pattern} has no sparsity of one parameter alone. Take a pattern whose "
            "groups lie within a parameter, as js.Unstructured()."
        )
    scores = like(scores, params, name="scores")
    named, treedef = leaves_with_paths(params), jax.tree.structure(params)
    taken = jax.tree.leaves(select(params, where))
    dense = _number(loss_fn(params))
    losses = {
        path: np.empty(len(sparsities))
        for (path, _), take in zip(named, taken, strict=True)
        if take
    }
    for k, sparsity in enumerate(sparsities):
        masks = patterns.masks(
            scores, sparsity, pattern=pattern, where=where, axes=axes
        )
        pruned = jax.tree.leaves(patterns.apply(params, masks))
        for i, (path, _) in enumerate(named):
            if path in losses:
                leaves = [pruned[j] if j == i else w for j, (_, w) in enumerate(named)]
                losses[path][k] = _number(loss_fn(treedef.unflatten(leaves)))
    return Sensitivity(dense, sparsities, losses)


def _checked(sparsities: Sequence[float]) -> tuple[float, ...]:
    if isinstance(sparsities, str) or not isinstance(sparsities, Sequence | np.ndarray):
        raise TypeError(
            f"sparsities is a sequence of numbers in [0, 1), got "
            f"{_checks.shown(sparsities)}."
        )
    if not len(sparsities):
        raise ValueError("sparsities is empty: give at least one number in [0, 1).")
    for sparsity in sparsities:
        _checks.check_sparsity(sparsity, name="sparsities")
    return tuple(map(float, sparsities))


def _number(loss: Array) -> float:
    if np.shape(loss) != () or isinstance(loss, str):
        raise TypeError(
            f"loss_fn must return a scalar, got {_checks.shown(loss)}. Reduce it, as "
            "by a mean."
        )
    return float(loss)
