"""Score, select, apply: a trained model pruned in one call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import patterns
from jaxsparse._checks import check_positive_int
from jaxsparse._typing import PyTree, Sparsity, Where
from jaxsparse.scores import magnitude
from jaxsparse.tracing import Trace
from jaxsparse.tree import AxesRule


def prune(
    params: PyTree,
    sparsity: Sparsity = None,
    *,
    score: Callable[[PyTree], PyTree] = magnitude,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    trace: Trace | None = None,
    steps: int = 1,
    min_keep: int = 1,
) -> patterns.Pruned:
    """Removes the weights with the lowest scores.

    With `steps > 1` it scores anew after each cut; after cut k of n the fraction
    `(1 - s) ** (k / n)` is left, as SynFlow prescribes. What is removed stays removed.

    Args:
      params: a tree of arrays.
      sparsity: the fraction to remove, in [0, 1); a number or a tree of numbers with
        the structure of `params` (see `jaxsparse.allocations`). May be left out for
        `NM`, which has its own.
      score: a function of `params`, larger = keep. For a score from gradients close
        over them: `lambda p: js.scores.taylor(p, jax.grad(loss)(p, batch))`.
      pattern: what lives or dies together, and who competes with whom.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      trace: what `jaxsparse.trace` found in the model. It states the kernels' axes,
        which N:M groups and tiles follow, and which parameters are kernels, by use and
        not by name. `where` and `axes` come before it.
      steps: in how many cuts.
      min_keep: how many units (weights, tiles or channels) each group and each layer
        keeps at least; see `jaxsparse.patterns.masks`.

    Returns:
      The pruned parameters and their masks.

    Raises:
      ValueError: what `jaxsparse.patterns.masks` raises, with the parameter's path.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> kernel = jnp.array([[3.0, -1.0], [2.0, -4.0]])
      >>> params = {"kernel": kernel, "bias": jnp.ones(2)}
      >>> pruned = js.prune(params, 0.5)
      >>> pruned.params["kernel"].tolist(), pruned.params["bias"].tolist()
      ([[3.0, 0.0], [0.0, -4.0]], [1.0, 1.0])
    """
    check_positive_int(steps, name="steps")
    if trace is not None:
        where = trace.where if where is None else where
        axes = trace.axes if axes is None else axes
    masks = None
    for cut in range(1, steps + 1):
        scores = score(params)
        if masks is not None:
            scores = jax.tree.map(_sink, scores, masks)
        masks = patterns.masks(
            scores,
            _after(sparsity, cut / steps),
            pattern=pattern,
            where=where,
            axes=axes,
            min_keep=min_keep,
        )
        del scores  # before there is memory for what is left
        params = patterns.apply(params, masks)
    return patterns.Pruned(params, masks)


def _after(sparsity: Sparsity, progress: float) -> Any:
    if progress == 1 or sparsity is None:
        return sparsity
    return jax.tree.map(lambda s: 1 - (1 - s) ** progress, sparsity)


def _sink(scores, mask):
    """What is removed already comes last, whatever its new score."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    return jnp.where(mask, scores, -jnp.inf)
