"""Gradual Optimal Brain Surgeon: a window of training gradients says what may go."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, curvature, patterns, scores
from jaxsparse._loops import when
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse._zeros import nonzero
from jaxsparse.curvature.block_sums import masked_sums
from jaxsparse.tree import AxesRule, leaves_with_paths, map_with_path, select


class GradientSums(NamedTuple):
    """Outer products of a training's last gradients, summed up in blocks.

    Attributes:
      recent: the sums of the last gradients, fewer than `window`.
      before: the sums of the `window` gradients before these.
    """

    recent: curvature.Sums
    before: curvature.Sums


class GradientWindow(NamedTuple):
    """The last gradients of a training.

    Attributes:
      grads: for each parameter that takes part `[window, *shape]`, a ring; None for
        the others.
      step: the number of gradients seen, int32.
    """

    grads: PyTree
    step: Array


def windowed_obs(
    *,
    window: int,
    block_size: int = 50,
    damping: float | Array | None = None,
    rel_damping: float | Array | None = None,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    dtype: Any = None,
    summed: bool = False,
) -> scores.Score:
    """Score by Optimal Brain Surgeon for `prune_schedule`, with its update of weights.

    The last `window` gradients of the training stand for the Fisher matrix, in blocks
    (`js.curvature.block_fisher`). In a step that chooses masks the scores are `w_q^2 /
    (2 [F^-1]_qq)`, for tiles `1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`, and the weights that are
    kept change by `-F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q`, Q the newly removed weights,
    together with the optimizer's own step. Gradual pruning as in Kurtic et al. (2022,
    oBERT, arXiv:2203.07259); see `js.recipes.obert_downstream` for the schedules::

        score = js.transforms.windowed_obs(window=256, damping=1e-7, pattern=pattern)
        prune_schedule = js.prune_schedule(schedule, every=..., score=score,
                                           pattern=pattern)
        tx = js.enforce(optax.chain(prune_schedule, optax.adamw(1e-4)))

    The update is made by `enforce` (or `wrap`, or `js.apply_updates`); a literal chain
    with `optax.apply_updates` leaves it out.

    Differs from the reference implementation, which stops the training at a pruning
    step and takes m = 1,024 fresh gradients of the same weights: this one takes the
    gradients of the last steps, some of slightly older weights, which cost nothing.
    Where that matters call `js.solvers.obs` between steps, and `adopt` its masks.

    Memory: `window` times the parameters that take part, and while it prunes
    `block_size + 1` times. For the 85 million weights in the blocks of BERT-base and
    1,024 gradients that is 348 GB; half of it with `dtype=jnp.bfloat16`. With `summed`
    each gradient's outer products are added to blocks and no gradient is kept. That
    takes `2 * (block_size + 1)` times the parameters, whatever the window: 35 GB with
    blocks of 50, 11 GB with blocks of 15. Asking for more memory than there is raises
    an error. A step that does not prune writes one gradient; with `summed` it reads and
    writes `block_size + 1` numbers a weight.

    Args:
      window: how many gradients to keep. Before that many have come, all of them are
        used. With `summed` the last `window` to twice as many count.
      block_size: the weights of a block.
      damping: added to the diagonal.
      rel_damping: instead of it a factor for the mean diagonal.
      pattern: that of `prune_schedule`.
      where: that of `prune_schedule`.
      axes: those of `prune_schedule`.
      dtype: the type of the stored gradients; the parameter's own by default.
      summed: whether to add up blocks instead of keeping gradients.

    Returns:
      A `Score`.

    Raises:
      ValueError: a window below 1, a damping that is not positive, a `dtype` with
        `summed`; at `init`, as for `js.curvature.block_fisher`, and too little
        memory, with the number of bytes needed (under `jit` a warning).

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> score = js.transforms.windowed_obs(window=4, block_size=2, damping=1e-4)
      >>> prune_schedule = js.prune_schedule(
      ...     0.5, every=js.schedules.at(3), score=score)
      >>> tx = prune_schedule.wrap(optax.sgd(0.0))
      >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
      >>> inputs = jnp.array([1.0, -1.0, 2.0, 0.5])       # both weights see the same
      >>> state = tx.init(params)
      >>> for x in inputs:
      ...     grads = {"kernel": jnp.full((2, 1), x)}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["kernel"].round(2).tolist()       # the other takes over
      [[0.0], [3.0]]
    """
    _checks.check_positive_int(window, name="window")
    estimator = curvature.block_estimator(
        block_size=block_size, pattern=pattern, axes=axes, where=where
    )
    curvature.check_one_damping(damping, rel_damping)

    _checks.check_bool(summed=summed)
    if summed and dtype is not None:
        raise ValueError("dtype is that of kept gradients: with summed=True none are.")
    memory = _sums(estimator, window) if summed else _ring(estimator, window, dtype)

    def init(params: PyTree) -> Any:
        taken = jax.tree.map(
            lambda w, take: w if take else None, params, select(params, where)
        )
        jax.eval_shape(estimator.init, params)
        _check_memory(taken, window, block_size, dtype, summed=summed)
        return memory.init(params, taken)

    def update(grads: PyTree, state: Any, params: PyTree) -> Any:
        return memory.update(grads, state, params)

    def fisher_of(params: PyTree, state: Any) -> curvature.BlockFisher:
        """Of the weights that are there: pruned ones are 0."""
        sums = memory.sums(params, state)
        return estimator.finalize(sums, damping=damping, rel_damping=rel_damping)

    def score_by(fisher: curvature.BlockFisher, params: PyTree) -> PyTree:
        if isinstance(pattern, patterns.Block | patterns.Balanced):
            rho = dict(leaves_with_paths(curvature.group_scores(fisher, params)[0]))
            none = lambda w: jnp.zeros_like(w, dtype=jnp.float32)
            return map_with_path(lambda p, w: rho[p] if p in rho else none(w), params)
        wide = jax.tree.map(_widen, params)
        return scores.obs(wide, curvature.inverse_diagonal(fisher), where=where)

    def score(params: PyTree, grads: PyTree, state: Any) -> PyTree:
        del grads
        return score_by(fisher_of(params, state), params)

    def prune(
        params: PyTree,
        grads: PyTree,
        state: Any,
        select: Callable[[PyTree], PyTree],
    ) -> tuple[PyTree, PyTree]:
        del grads
        fisher = fisher_of(params, state)
        masks = select(score_by(fisher, params))
        full = lambda mask, w: jnp.broadcast_to(mask, w.shape)
        kept = jax.tree.map(full, masks, params)
        alive = jax.tree.map(nonzero, params)
        removed = jax.tree.map(lambda k, a: ~k & a, kept, alive)
        staying = jax.tree.map(lambda k, a: k & a, kept, alive)
        return masks, curvature.eliminate(fisher, params, removed, kept=staying)

    return scores.Score(init, update, score, prune=prune)


class _Memory(NamedTuple):
    """What is kept of the gradients, and how it becomes sums of outer products."""

    init: Callable[[PyTree, PyTree], Any]
    update: Callable[[PyTree, Any, PyTree], Any]
    sums: Callable[[PyTree, Any], curvature.Sums]


def _ring(estimator: curvature.Estimator, window: int, dtype: Any) -> _Memory:
    """The gradients themselves."""

    def init(params: PyTree, taken: PyTree) -> GradientWindow:
        del params
        kind = lambda w: w.dtype if dtype is None else dtype
        ring = lambda w: jnp.zeros((window, *w.shape), kind(w))
        return GradientWindow(jax.tree.map(ring, taken), jnp.zeros((), jnp.int32))

    def update(grads: PyTree, state: GradientWindow, params: PyTree) -> GradientWindow:
        del params
        found = dict(leaves_with_paths(grads))
        row = state.step % window
        write = lambda path, ring: lax.dynamic_update_index_in_dim(
            ring, found[path].astype(ring.dtype), row, 0
        )
        rings = map_with_path(write, state.grads)
        return GradientWindow(rings, state.step + 1)

    def sums(params: PyTree, state: GradientWindow) -> curvature.Sums:
        found = dict(leaves_with_paths(params))

        def alive(path: str, g: Array) -> Array:
            return jnp.where(nonzero(found[path])[None], g, jnp.zeros((), g.dtype))

        none = estimator.init(params)
        together = estimator.update(none, map_with_path(alive, state.grads))
        return dataclasses.replace(together, count=jnp.clip(state.step, 1, window))

    return _Memory(init, update, sums)


def _sums(estimator: curvature.Estimator, window: int) -> _Memory:
    """Blocks of outer products of the last gradients, and of those before."""

    def init(params: PyTree, taken: PyTree) -> GradientSums:
        del taken
        # Twice, and not one copied: a step that donates its state gives both away.
        return GradientSums(estimator.init(params), estimator.init(params))

    def update(grads: PyTree, state: GradientSums, params: PyTree) -> GradientSums:
        del params
        found = dict(leaves_with_paths(grads))
        rows = {path: found[path][None] for path in state.recent.paths}
        recent = estimator.update(state.recent, rows)
        turn = lambda pair: (jax.tree.map(jnp.zeros_like, pair[1]), pair[0])
        recent, before = when(recent.count >= window, turn, (recent, state.before))
        return GradientSums(recent, before)

    def sums(params: PyTree, state: GradientSums) -> curvature.Sums:
        together = estimator.merge(state.before, state.recent)
        found = dict(leaves_with_paths(params))
        alive = tuple(
            masked_sums(s, found[layout.path] != 0, layout=layout)
            for s, layout in zip(together.sums, together.layouts, strict=True)
        )
        return dataclasses.replace(together, sums=alive)

    return _Memory(init, update, sums)


def _check_memory(
    taken: PyTree, window: int, block_size: int, dtype: Any, *, summed: bool
) -> None:
    """Says, before they are taken, how many bytes it is where they do not fit."""
    leaves = jax.tree.leaves(taken)
    weights = sum(math.prod(w.shape) for w in leaves)
    blocks = 2 * (block_size + 1) * 4 * weights
    if summed:
        known = all(map(_checks.is_concrete, leaves))
        name = f"windowed_obs: blocks of {block_size} for {weights:,} weights"
        _checks.check_fits(name, blocks, "Take a smaller block_size.", known=known)
        return
    advice = (
        f"Take fewer (window={max(1, window // 8)}), dtype=jnp.bfloat16, or "
        f"summed=True, which adds blocks up in {blocks / 1e9:.3g} GB."
    )
    _checks.check_window_fits("windowed_obs", taken, window, dtype, advice)


def _widen(w: Array) -> Array:
    low = jnp.issubdtype(w.dtype, jnp.floating) and w.dtype.itemsize < 4
    return w.astype(jnp.float32) if low else w
