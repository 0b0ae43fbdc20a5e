"""`prune_schedule`: gradual pruning as the first member of an optax chain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxsparse import _calls, _checks, patterns, scores
from jaxsparse._loops import behind, when
from jaxsparse._parts import in_parts
from jaxsparse._typing import Array, Cadence, PyTree, Sparsity, Where
from jaxsparse.patterns.earlier_masks import score_shapes
from jaxsparse.patterns.selection import choose as choose_masks
from jaxsparse.schedules.horizon import as_cadence, check_horizon, evaluate
from jaxsparse.transforms._enforce import enforce_chain
from jaxsparse.transforms._first_masks import all_kept, check_masked, last_where_gone
from jaxsparse.transforms._leaks import most_leaked, regrew_in
from jaxsparse.transforms._mfac import forget_pruned
from jaxsparse.transforms._sparse_start import (
    Zeros,
    masks_of_zeros,
    warn_of_regrowth,
    warn_of_zeros,
)
from jaxsparse.transforms._state import PruneScheduleState, check_state
from jaxsparse.tree import AxesRule, by_rules, like
from jaxsparse.tree import select as select_by

_LOOK_FOR_LEAKS_EVERY = 100


class PruneSchedule(optax.GradientTransformationExtraArgs):
    """The result of `prune_schedule`: a transformation with two more methods."""

    _start: Callable[..., PruneScheduleState]

    def __new__(cls, init, update, start):
        """A transformation that can start at any step, with any masks."""
        self = super().__new__(cls, init, update)
        self._start = start
        return self

    def wrap(
        self, tx: optax.GradientTransformation, *, skip_updates: bool = False
    ) -> optax.GradientTransformationExtraArgs:
        """`enforce(optax.chain(self, tx))`, shorter.

        Without jit it is quicker too: `enforce` has to run an optimizer twice to find
        the schedule within.

        Args:
          tx: an optimizer.
          skip_updates: as for `enforce`.

        Returns:
          An optimizer that keeps pruned weights at zero.

        Example:
          >>> import optax, jaxsparse as js
          >>> tx = js.prune_schedule(0.9, every=100).wrap(optax.adam(1e-3))
        """
        return enforce_chain(self, tx, skip_updates)

    def adopt(
        self,
        opt_state: optax.OptState,
        params: PyTree,
        *,
        step: int = 0,
        masks: PyTree = None,
    ) -> optax.OptState:
        """Make the state of `self.wrap(tx)` from the state of a dense run of `tx`.

        Pruning can then begin in the middle of a training and keep the optimizer's
        moments.

        Args:
          opt_state: the state of `tx`, from a dense run or its checkpoint.
          params: the parameters of the same moment.
          step: where on the schedule to begin: 0, or the steps already trained if the
            schedule counts from the start of the dense run.
          masks: masks to begin with, of a model that is already sparse: `params` have
            to be zero where they are False.

        Returns:
          The state of `self.wrap(tx)`, which is that of `optax.chain(self, tx)`. It
          holds exact zeros of a model that is sparse already, as `zeros` of
          `prune_schedule` says, and warns if the schedule begins below the model's
          sparsity.

        Raises:
          ValueError: masks that do not fit `params`, or params that are not masked.

        Example:
          >>> import jax.numpy as jnp, optax, jaxsparse as js
          >>> params = {"w": jnp.array([[3.0, 1.0]])}
          >>> adam = optax.adam(1e-3)
          >>> dense_state = adam.init(params)
          >>> prune_schedule = js.prune_schedule(0.5, every=1)
          >>> state = prune_schedule.adopt(dense_state, params, step=1_000)
          >>> updates, state = prune_schedule.wrap(adam).update(params, state, params)
        """
        if masks is not None:
            masks = like(masks, params, name="masks")
            check_masked(params, masks)
        state: Any = self._start(params, step, masks)
        if masks is not None:
            opt_state = forget_pruned(opt_state, state.masks, jnp.ones((), bool))
        return (state, opt_state)


def prune_schedule(
    sparsity: Sparsity,
    *,
    every: int | Cadence,
    score: scores.Score | Callable[..., PyTree] = scores.magnitude,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    min_keep: int = 1,
    axis_name: patterns.AxisName | None = None,
    total_steps: int | None = None,
    zeros: Zeros = "hold",
) -> PruneSchedule:
    """Choose masks on a schedule, and hide pruned coordinates from the optimizer.

    In the steps of `every` it takes the schedule's sparsity, scores `(params,
    gradients)` and makes masks. In every step it zeroes the gradients of pruned
    weights, so that they leave clipping norms, moments and factored statistics. It
    stands FIRST in a chain, where it sees raw gradients; from there it cannot hold
    weights at zero, since the optimizer's step comes after it. So::

        tx = js.enforce(optax.chain(prune_schedule, optax.adam(1e-3)))  # all of it
        tx = prune_schedule.wrap(optax.adam(1e-3))                      # the same
        tx = optax.chain(prune_schedule, optax.adam(1e-3))              # literal: with
        params = js.apply_updates(params, updates, opt_state)           #   this call

    Gradual pruning is Zhu & Gupta (2017, arXiv:1710.01878). A step that does not change
    masks costs one select for each gradient.

    Differs from JaxPruner: the guarantee needs no call in the training loop; gradients
    are masked; N:M follows the schedule and runs along the input axes; the schedule is
    checked against the training's length; and it takes any optax optimizer, wrapper and
    pytree.

    Args:
      sparsity: a number, a schedule (step -> sparsity; optax's work too), or a tree of
        either with the structure of the parameters, as `js.allocations.erk(params,
        0.9)` or `jax.tree.map(lambda s: js.schedules.polynomial(final=s, ...), tree)`;
        or a mapping of either from paths or regular expressions: the first that matches
        counts, and what none matches stays dense (see `jaxsparse.tree.by_rules`).
      every: when masks change; a cadence of `jaxsparse.schedules`, a function step ->
        bool, or an integer, the number of steps from one change to the next.
      score: a function of `params`, or of `params, grads`, larger = keep; or a
        `jaxsparse.scores.Score`. It sees the parameters before the step, and what it
        asks for by name: `masks`, `step`, `sparsity`.
      pattern: which weights are removed together, and which compete.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      min_keep: how many units (weights, tiles or channels) each group and each layer
        keeps at least, as there.
      axis_name: where `update` runs under `jax.shard_map` on shards of the parameters:
        the mesh axes or the tree of `PartitionSpec`, as there. `init` may run outside.
        In the state `regrew` and `leaked` then cover all shards.
      total_steps: the length of the training, if known; then a schedule that would not
        end within it is an error too.
      zeros: how `init` and `adopt` treat exact zeros in kernels of a model that is
        sparse already. "hold" keeps them at zero until masks are first chosen, and
        warns; "train" lets them grow, for kernels that begin as an identity. Kernels of
        zeros alone are always trained.

    Returns:
      A gradient transformation with the methods `wrap` and `adopt`. Its state is a
      `PruneScheduleState`. Where the schedule is above 0 at step 0 and the score needs
      no gradients, `init` already makes masks (see `jaxsparse.init_sparse`).

    Raises:
      ValueError: here, for a sparsity outside [0, 1), and when the last change of masks
        comes before the schedule's target is reached; at `init`, for what
        `jaxsparse.patterns.masks` raises; at `update`, without `params`.

    Example:
      >>> import optax, jaxsparse as js
      >>> prune_schedule = js.prune_schedule(
      ...     js.schedules.polynomial(final=0.9, begin=1_000, end=10_000),
      ...     every=js.schedules.every(100, begin=1_000, end=10_000),
      ...     pattern=js.Unstructured(scope="global"),
      ...     total_steps=12_000)
      >>> tx = js.enforce(optax.chain(prune_schedule, optax.adam(1e-3)))
    """
    _checks.check_pattern(patterns.Pattern, pattern)
    _checks.check_where(where)
    _checks.check_axes(axes)
    _checks.check_positive_int(min_keep, name="min_keep", least=0)
    _checks.check_choice(("hold", "train"), zeros=zeros)
    cadence = as_cadence(every)
    if sparsity is None and not isinstance(pattern, patterns.NM):
        raise ValueError(f"{pattern} needs a sparsity, the fraction to remove.")
    check_horizon(sparsity, cadence, total_steps)
    scorer = scores.as_score(score)

    def at(params: PyTree, step: Any) -> tuple[PyTree, Where]:
        """The sparsity at a step, with rules as a tree, and what takes part."""
        values, taken = by_rules(params, sparsity, where)
        return evaluate(values, step), taken

    def ask(function: Any, given: tuple, params: PyTree, masks: PyTree, step: Any):
        """Calls a function of the score with what it asks for."""
        known = {"masks": masks, "step": step}
        if "sparsity" in _calls.asked_for(function, len(given)):
            value = at(score_shapes(params), step)[0]
            own = value is None and isinstance(pattern, patterns.NM)
            known["sparsity"] = pattern.sparsity if own else value
        return _calls.ask(function, *given, **known)

    def select(scored: PyTree, step: Any, of: Any = None) -> PyTree:
        if of is not None and any(map(jnp.iscomplexobj, jax.tree.leaves(scored))):
            scored, of = of(scored), None  # what takes part is told by real scores
        asked, taken = at(scored, step)
        return choose_masks(
            scored,
            asked,
            pattern=pattern,
            where=taken,
            axes=axes,
            min_keep=min_keep,
            axis_name=axis_name,
            of=of,
        )[0]

    def start(params: PyTree, step: int, masks: PyTree) -> PruneScheduleState:
        _checks.check_arrays(abstract=True, params=params)
        score_state = scorer.init(params)
        first = _initial_masks(params, score_state, step, masks)
        return PruneScheduleState(
            step=jnp.asarray(step, jnp.int32),
            masks=first,
            score_state=score_state,
            # Of NumPy's numbers, for which nothing is compiled.
            updated=jnp.asarray(np.zeros((), np.bool_)),
            regrew=jnp.asarray(np.zeros((), np.bool_)),
            leaked=jnp.asarray(np.zeros((), np.int32)),
            change=_no_change(params, score_state, first),
        )

    def _no_change(params: PyTree, score_state: Any, masks: PyTree) -> PyTree:
        if scorer.prune is None:
            return None
        select_now = lambda scored: select(scored, 0)

        def change(params: PyTree, state: Any, masks: PyTree) -> PyTree:
            given = (params, params, state, select_now)
            return ask(scorer.prune, given, params, masks, 0)[1]

        shapes = jax.eval_shape(change, params, score_state, masks)
        owners = dict(jax.tree_util.tree_leaves_with_path(params))
        return jax.tree_util.tree_map_with_path(
            lambda path, s: jnp.zeros_like(owners[path], dtype=s.dtype), shapes
        )

    def _initial_masks(
        params: PyTree, score_state: Any, step: int, adopted: PyTree
    ) -> PyTree:
        # Shapes do not depend on values, so this works for abstract parameters, and
        # says here what is wrong with the model.
        shapes = jax.eval_shape(lambda p: select(p, 0), score_shapes(params))
        masks = all_kept(shapes, params)
        leaves = jax.tree.leaves(params)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            return masks
        if adopted is not None:
            fit = lambda mask, like: jnp.array(
                jnp.broadcast_to(mask, like.shape), copy=True
            )
            masks = jax.tree.map(fit, adopted, masks)
        elif zeros == "hold":
            masks = masks_of_zeros(masks, params)
        values = by_rules(score_shapes(params), sparsity, where)[0]
        warn_of_regrowth(masks, params, values, cadence, step)
        if adopted is None and _starts_sparse(params):
            if score is scores.magnitude and pattern == patterns.Unstructured():
                asked, taken = at(score_shapes(params), 0)
                return in_parts(
                    scores.magnitude,
                    lambda scored, taken: patterns.masks(
                        scored, asked, where=taken, min_keep=min_keep, axes=axes
                    ),
                    params,
                    select_by(score_shapes(params), taken),
                )
            if scorer.first is not None:
                scored = ask(scorer.first, (params,), params, masks, 0)
                scored = jax.tree.map(last_where_gone, scored, masks)
            else:
                given = (params, None, score_state)
                scored = ask(scorer.score, given, params, masks, 0)
            _checks.check_like(params, scores=scored)
            return select(scored, 0)
        if adopted is None and zeros == "hold":
            warn_of_zeros(masks)
        return masks

    def _starts_sparse(params: PyTree) -> bool:
        leaves = jax.tree.leaves(params)
        if not leaves or any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            return False
        with jax.ensure_compile_time_eval():
            due = scorer.first is not None or bool(cadence(0))
            asked = jax.tree.leaves(at(score_shapes(params), 0)[0])
            positive = sparsity is None or any(float(s) > 0 for s in asked)
        known = scorer.first is not None or not scorer.needs_grads
        return due and positive and known

    def update_fn(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        del extra_args
        _checks.check_has_params(params)
        check_state(state)
        if updates is None and scorer.needs_grads:
            raise ValueError(
                "This score needs raw gradients, which the last member of a chain does "
                "not see. Put prune_schedule first and wrap the chain in js.enforce."
            )
        if state.updated is None:  # enforce has them already
            return _hide(updates, state.masks), state
        if updates is not None:
            _checks.check_like(params, updates=updates)
        patterns.check_masks(state.masks, params)
        # Masks have no derivative; without this, one could not differentiate through
        # a training step.
        frozen, grads = lax.stop_gradient((params, updates))
        given = (grads, state.score_state, frozen)
        score_state = ask(scorer.update, given, frozen, state.masks, state.step)

        def choose(carry, params, grads, score_state, step):
            old, _, change = carry
            select_now = lambda scored: select(scored, step)
            given = (params, grads, score_state)
            if score is scores.magnitude:  # which need not be held
                new = select(params, step, of=scores.magnitude)
            elif scorer.prune is None:
                scored = ask(scorer.score, given, params, old, step)
                _checks.check_like(params, scores=scored)
                new = select_now(scored)
            else:
                given = (*given, select_now)
                new, change = ask(scorer.prune, given, params, old, step)
            new = jax.tree.map(lambda n, o: n.reshape(o.shape), new, old)
            regrew = regrew_in(new, old, axis_name)
            # Then the new masks can lie where the old ones are.
            return behind(regrew, new), regrew, change

        def look_and_choose(carry, updated, params, grads, score_state, step):
            chosen, leaked = carry
            # Before the first step nothing has been projected yet.
            found = most_leaked(leaked, params, chosen[0], axis_name)
            leaked = jnp.where(step > 0, found, leaked)
            read = params, grads, score_state, step
            updated = behind(found, updated)  # which nothing below has to be held for
            return when(updated, choose, chosen, *read), leaked

        updated = jnp.asarray(cadence(state.step), bool)
        look = state.updated | (state.step % _LOOK_FOR_LEAKS_EVERY == 0)
        (masks, regrew, change), leaked = when(
            updated | look,
            look_and_choose,
            ((state.masks, jnp.zeros((), bool), state.change), state.leaked),
            *(updated, frozen, grads if scorer.needs_grads else None),
            *(score_state, state.step),
        )
        state = PruneScheduleState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            masks=masks,
            score_state=score_state,
            updated=updated,
            regrew=regrew,
            leaked=leaked,
            change=change,
        )
        return _hide(updates, masks), state

    return PruneSchedule(lambda params: start(params, 0, None), update_fn, start)


def _hide(grads: PyTree, masks: PyTree) -> PyTree:
    """Gradients without those of pruned coordinates."""

    def one(grad: Array, mask: Array) -> Array:
        if jnp.ndim(mask) == 0:  # not pruned
            return grad
        return jnp.where(mask, grad, jnp.zeros((), grad.dtype))

    return None if grads is None else jax.tree.map(one, grads, masks)
