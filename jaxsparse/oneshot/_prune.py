"""Score, select, apply: a trained model pruned in one call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _calls, _checks, patterns, scores
from jaxsparse._checks import check_positive_int
from jaxsparse._parts import in_parts
from jaxsparse._typing import PyTree, Sparsity, Where
from jaxsparse.patterns.earlier_masks import gone_before, score_shapes, targets
from jaxsparse.patterns.selection import check_further, choose
from jaxsparse.tracing import Trace
from jaxsparse.tree import AxesRule, by_rules, like, select


def prune(
    params: PyTree,
    sparsity: Sparsity = None,
    *,
    score: Callable[..., PyTree] = scores.magnitude,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    trace: Trace | None = None,
    steps: int = 1,
    min_keep: int = 1,
    masks: PyTree = None,
) -> patterns.Pruned:
    """Remove the weights with the lowest scores.

    With `steps > 1` it scores anew after each cut; after cut k of n the fraction `(1 -
    s) ** (k / n)` is left, as SynFlow prescribes. Removed weights stay removed.

    A model that is sparse already is pruned further with its `masks`; without them only
    scores by magnitude know which weights are gone::

        half = js.prune(params, 0.5)
        ...                                                       # fine-tune
        more = js.prune(params, 0.8, score=score, masks=half.masks)

    The pruned model is not faster: the parameters stay dense arrays with zeros in them,
    and a masked dense layer is neither faster nor smaller than before. To make a model
    faster and smaller, remove whole channels, heads, experts or blocks:
    `js.narrowing.narrow`.

    Args:
      params: a tree of arrays.
      sparsity: the total fraction to remove, in [0, 1), including earlier removals
        (`masks`). A number, a tree of numbers with the structure of `params` (see
        `jaxsparse.allocations`), or a mapping from paths or regular expressions, as
        `{"l0/kernel": 0.5, r"attn": 0.7}`; the first that matches counts, and
        parameters that none matches stay dense. May be left out for `NM`, which has its
        own.
      score: a function of `params`, larger = keep. For a score from gradients close
        over them: `lambda p: js.scores.taylor(p, jax.grad(loss)(p, batch))`. It may ask
        for `masks`, `step` (the number of the cut) and `sparsity` (after this cut) by
        name; see `jaxsparse.scores.Score`.
      pattern: which weights are removed together, and which compete.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      trace: what `jaxsparse.trace` found in the model. It states the kernels' axes,
        which N:M groups and tiles follow, and which parameters are kernels, by use and
        not by name. `where` and `axes` take precedence over it.
      steps: the number of cuts.
      min_keep: how many units (weights, tiles or channels) each group and each layer
        keeps at least; see `jaxsparse.patterns.masks`.
      masks: the masks of earlier pruning; see `jaxsparse.patterns.masks`. Parameters
        that take no part keep their masks.

    Returns:
      The pruned parameters and their masks.

    Raises:
      ValueError: as for `jaxsparse.patterns.masks`, with the parameter's path.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> kernel = jnp.array([[3.0, -1.0], [2.0, -4.0]])
      >>> params = {"kernel": kernel, "bias": jnp.ones(2)}
      >>> pruned = js.prune(params, 0.5)
      >>> pruned.params["kernel"].tolist(), pruned.params["bias"].tolist()
      ([[3.0, 0.0], [0.0, -4.0]], [1.0, 1.0])
    """
    _checks.check_score(score)
    _checks.check_arrays(params=params)
    if not jax.tree.leaves(params):
        raise TypeError("params: expected a tree of arrays, got one without arrays.")
    _checks.check_pattern(patterns.Pattern, pattern)
    check_positive_int(steps, name="steps")
    if trace is not None:
        _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
        where = trace.where if where is None else where
        axes = trace.axes if axes is None else axes
    if sparsity is None and isinstance(pattern, patterns.NM):
        sparsity = pattern.sparsity
    shapes = score_shapes(params)
    sparsity, where = by_rules(shapes, sparsity, where)
    options = {"pattern": pattern, "where": where, "axes": axes, "min_keep": min_keep}
    selected = gone = None
    if masks is not None:
        masks = like(masks, params, name="masks")
        check_further(params, masks, sparsity, **options)
        params = patterns.apply(params, masks)
        selected = select(shapes, where)
        gone = gone_before(masks, params, pattern, selected, axes)
    every = jnp.asarray(np.True_)
    for cut, target in enumerate(targets(gone, sparsity, steps, pattern, selected)):
        apart = score is scores.magnitude and pattern == patterns.Unstructured()
        if masks is None and apart:
            masks = in_parts(
                scores.magnitude,
                lambda scored, taken, target=target: choose(
                    scored, target, **{**options, "where": taken}
                )[0],
                params,
                select(shapes, where),
            )
        else:
            so_far = jax.tree.map(lambda _: every, params) if masks is None else masks
            scored = _calls.ask(score, params, masks=so_far, step=cut, sparsity=target)
            _checks.check_like(params, scores=scored)
            masks, _ = choose(scored, target, masks=masks, **options)
            # What is dispatched holds its arguments; without the scores there is memory
            # for what is left.
            jax.block_until_ready(masks)
            del scored
        params = patterns.apply(params, masks)
    return patterns.Pruned(params, masks)
