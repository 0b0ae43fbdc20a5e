"""Gradual Optimal Brain Surgeon: a window of training gradients says what may go."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, curvature, patterns, scores
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse._zeros import nonzero
from jaxsparse.tree import AxesRule, leaves_with_paths, map_with_path, select


class GradientWindow(NamedTuple):
    """The last gradients of a training.

    Attributes:
      grads: for each parameter that takes part `[window, *shape]`, a ring; None for
        the others.
      step: how many gradients came, int32.
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
) -> scores.Score:
    """Optimal Brain Surgeon for `prune_schedule`, with its update of the weights.

    The last `window` gradients of the training stand for the Fisher matrix, in blocks
    (`js.curvature.block_fisher`). In a step that chooses masks the scores are `w_q^2 /
    (2 [F^-1]_qq)`, for tiles `1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`, and the weights that are
    kept change by `-F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q`, Q what is newly removed, together
    with the optimizer's own step. Gradual pruning as in Kurtic et al. (2022, oBERT,
    arXiv:2203.07259); see `js.recipes.obert_downstream` for the schedules::

        score = js.transforms.windowed_obs(window=256, damping=1e-7, pattern=pattern)
        prune_schedule = js.prune_schedule(schedule, every=..., score=score,
                                           pattern=pattern)
        tx = js.enforce(optax.chain(prune_schedule, optax.adamw(1e-4)))

    The update is made by `enforce` (or `wrap`, or `js.apply_updates`); a literal chain
    with `optax.apply_updates` leaves it out.

    Differs from the reference implementation, which stops the training at a pruning
    step and takes m = 1,024 fresh gradients of the same weights: here they are those of
    the last steps, some of slightly older weights, and cost nothing. Where that matters
    call `js.solvers.obs` between steps, and `adopt` its masks.

    Memory: `window` times the parameters that take part (half with `dtype=
    jnp.bfloat16`), and while it prunes `block_size + 1` times. A quiet step writes one
    gradient.

    Args:
      window: how many gradients to keep. Until there are so many, those that came are
        used.
      block_size: the weights of a block.
      damping: added to the diagonal.
      rel_damping: instead of it a factor for the mean diagonal.
      pattern: that of `prune_schedule`.
      where: that of `prune_schedule`.
      axes: those of `prune_schedule`.
      dtype: in which to keep gradients; the parameter's own by default.

    Returns:
      A `Score`.

    Raises:
      ValueError: a window below 1, a damping that is not positive; at `init`, what
        `js.curvature.block_fisher` raises.

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

    def init(params: PyTree) -> GradientWindow:
        jax.eval_shape(estimator.init, params)

        def ring(w: Array, taken: bool) -> Array | None:
            if not taken:
                return None
            kind = w.dtype if dtype is None else dtype
            return jnp.zeros((window, *w.shape), kind)

        grads = jax.tree.map(ring, params, select(params, where))
        return GradientWindow(grads, jnp.zeros((), jnp.int32))

    def update(grads: PyTree, state: GradientWindow, params: PyTree) -> GradientWindow:
        del params
        found = dict(leaves_with_paths(grads))
        row = state.step % window
        write = lambda path, ring: lax.dynamic_update_index_in_dim(
            ring, found[path].astype(ring.dtype), row, 0
        )
        rings = map_with_path(write, state.grads)
        return GradientWindow(rings, state.step + 1)

    def fisher_of(params: PyTree, state: GradientWindow) -> curvature.BlockFisher:
        """Of the weights that are there: pruned ones are 0."""
        found = dict(leaves_with_paths(params))

        def alive(path: str, g: Array) -> Array:
            return jnp.where(nonzero(found[path])[None], g, jnp.zeros((), g.dtype))

        sums = estimator.init(params)
        sums = estimator.update(sums, map_with_path(alive, state.grads))
        seen = jnp.clip(state.step, 1, window)
        sums = dataclasses.replace(sums, count=seen)
        return estimator.finalize(sums, damping=damping, rel_damping=rel_damping)

    def score_by(fisher: curvature.BlockFisher, params: PyTree) -> PyTree:
        if isinstance(pattern, patterns.Block):
            rho = dict(leaves_with_paths(curvature.group_scores(fisher, params)[0]))
            none = lambda w: jnp.zeros_like(w, dtype=jnp.float32)
            return map_with_path(lambda p, w: rho[p] if p in rho else none(w), params)
        wide = jax.tree.map(_widen, params)
        return scores.obs(wide, curvature.inverse_diagonal(fisher), where=where)

    def score(params: PyTree, grads: PyTree, state: GradientWindow) -> PyTree:
        del grads
        return score_by(fisher_of(params, state), params)

    def prune(
        params: PyTree,
        grads: PyTree,
        state: GradientWindow,
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


def _widen(w: Array) -> Array:
    low = jnp.issubdtype(w.dtype, jnp.floating) and w.dtype.itemsize < 4
    return w.astype(jnp.float32) if low else w
