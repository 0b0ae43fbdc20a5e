"""Dynamic sparse training: masks that move while their count stays."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _calls, _checks, patterns, scores
from jaxsparse._loops import when
from jaxsparse._typing import Array, Cadence, PyTree, Schedule, Sparsity, Where
from jaxsparse.patterns.earlier_masks import score_shapes
from jaxsparse.patterns.selection import choose as choose_masks
from jaxsparse.schedules.horizon import as_cadence, evaluate
from jaxsparse.transforms._first_masks import last_where_gone
from jaxsparse.transforms._prune_schedule import PruneSchedule, prune_schedule
from jaxsparse.transforms._sparse_start import first_choice
from jaxsparse.transforms._state import DropAndGrowState
from jaxsparse.tree import AxesRule, by_rules, select


def drop_and_grow(
    sparsity: Sparsity,
    *,
    every: int | Cadence,
    grow: scores.Score | Callable[..., PyTree],
    key: Array,
    drop_fraction: float | Schedule = 0.3,
    score: Callable[..., PyTree] = scores.magnitude,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    min_keep: int = 1,
    axis_name: patterns.AxisName | None = None,
    total_steps: int | None = None,
    track: bool = False,
) -> PruneSchedule:
    """Move sparse masks: drop the lowest weights, and grow as many elsewhere.

    It begins with random masks. In the steps of `every`, in each group of weights that
    compete (a layer, by default) of which `k` are kept, the `floor(f * k)` of the
    lowest `score` are dropped, and as many that are not kept grow, those of the highest
    `grow`; a weight that was just dropped may win again and then keeps its value. All
    counts stay what `sparsity` says. Weights that grow begin at 0, with their moments
    reset, under `jaxsparse.enforce`.

    It stands where `jaxsparse.prune_schedule` stands: first in a chain, under
    `enforce`, with any optimizer and wrapper. `rigl`, `set_` and `snfs` are made of it.
    To grow by the gradient of several batches, accumulate them:
    `optax.MultiSteps(tx, every_k_schedule=n)` around all of it.

    Mocanu et al. (2018, arXiv:1707.04780), Evci et al. (2020, arXiv:1911.11134).

    Args:
      sparsity: as for `prune_schedule`: a number, a schedule, a tree (as
        `js.allocations.erk(params, 0.9)` makes) or rules. Where a schedule rises, more
        is dropped than grows.
      every: when masks change; a cadence, a function step -> bool, or an integer.
      grow: a score, larger = grow first; a function of `params` or `params, grads`, or
        a `jaxsparse.scores.Score`, that may ask for `masks`, `step` and `sparsity` by
        name.
      key: a typed key, `jax.random.key(seed)`, from which the first masks are drawn.
      drop_fraction: the fraction of kept weights that a change drops, in (0, 1], or a
        schedule step -> fraction: `optax.cosine_decay_schedule(0.3, end)` as RigL has
        it, `optax.exponential_decay(0.3, ...)`, or `lambda step: 0.3 * rate(step) /
        rate(0)` for a learning rate `rate`.
      score: a function of `params`, larger = stay.
      pattern: which weights are dropped and grow together, and which compete. For `NM`
        the weights of a whole layer compete for staying, and each group fills its free
        places in the order in which weights grow.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      min_keep: the least number of units that each group and each layer keeps.
      axis_name: of shards under `jax.shard_map`, as there.
      total_steps: the length of the training, if known.
      track: remember which weights were ever active, one bool a weight, for `explored`.

    Returns:
      A gradient transformation with the methods `wrap` and `adopt`, as
      `prune_schedule`; its state is a `PruneScheduleState`.

    Raises:
      ValueError: a drop fraction outside (0, 1]; at `init`, one by which no parameter
        drops a weight; under `enforce`, a member before it that keeps statistics, which
        hides the gradients; or as for `prune_schedule`.
      TypeError: `grow` or `score` that is no score; a `key` that is not a random key.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> method = js.transforms.drop_and_grow(
      ...     0.5, every=1, key=jax.random.key(0), drop_fraction=0.5,
      ...     grow=lambda params, grads: js.scores.magnitude(grads))
      >>> tx = method.wrap(optax.sgd(0.1))
      >>> params, state = js.init_sparse(tx, {"w": jnp.arange(1.0, 9.0).reshape(2, 4)})
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(jnp.sum(js.masks_of(state)["w"]))
      4
    """
    _checks.check_key(key)
    _checks.check_score(score)
    _checks.check_bool(track=track)
    _checks.check_pattern(patterns.Pattern, pattern)
    if not callable(drop_fraction):
        _checks.check_number(above=0, most=1, drop_fraction=drop_fraction)
    cadence, growing = as_cadence(every), scores.as_score(grow)
    within = isinstance(pattern, patterns.NM)

    def fraction(step: Any) -> Any:
        return drop_fraction(step) if callable(drop_fraction) else drop_fraction

    def stays(params: PyTree, masks: PyTree, step: Any) -> PyTree:
        """The masks of weights that are not dropped."""
        values, taken = by_rules(score_shapes(params), sparsity, where)
        asked = evaluate(values, step)
        scored = _calls.ask(score, params, masks=masks, step=step, sparsity=asked)
        _checks.check_like(params, scores=scored)
        if asked is None and within:
            asked = pattern.sparsity
        stay = choose_masks(
            jax.tree.map(last_where_gone, scored, masks),
            asked,
            pattern=patterns.Unstructured() if within else pattern,
            where=taken,
            axes=axes,
            min_keep=min_keep,
            axis_name=axis_name,
            free=fraction(step),
        )[0]
        return jax.tree.map(jnp.logical_and, stay, masks)

    def init(params: PyTree) -> DropAndGrowState:
        state = growing.init(params)
        never = lambda w: jnp.zeros_like(w, dtype=bool)
        return DropAndGrowState(state, jax.tree.map(never, params) if track else None)

    def update(grads, state, params, *, masks, step, sparsity):
        given = {"masks": masks, "step": step, "sparsity": sparsity}
        inner = _calls.ask(growing.update, grads, state.grow, params, **given)
        ever = state.ever
        if track:
            either = functools.partial(jax.tree.map, jnp.logical_or)
            ever = when(jnp.asarray(cadence(step), bool), either, ever, masks)
        return DropAndGrowState(inner, ever)

    def choose(params, grads, state, *, masks, step, sparsity):
        given = {"masks": masks, "step": step, "sparsity": sparsity}
        stay = stays(params, masks, step)
        grown = _calls.ask(growing.score, params, grads, state.grow, **given)
        _checks.check_like(params, scores=grown)
        return jax.tree.map(_highest_where_kept, grown, stay)

    def first(params: PyTree) -> PyTree:
        step = first_choice(cadence, 0)
        values, taken = by_rules(score_shapes(params), sparsity, where)
        if step is not None and not within:
            with jax.ensure_compile_time_eval():
                asked, part = evaluate(values, step), float(fraction(step))
            kept = _kept_counts(params, asked, select(score_shapes(params), taken))
            _check_drops(part, kept if _by_layer(pattern) else [sum(kept)], step)
        return scores.random(params, key=key)

    return prune_schedule(
        sparsity,
        every=cadence,
        score=scores.Score(init, update, choose, growing.needs_grads, first=first),
        pattern=pattern,
        where=where,
        axes=axes,
        min_keep=min_keep,
        axis_name=axis_name,
        total_steps=total_steps,
    )


def _by_layer(pattern: patterns.Pattern) -> bool:
    return getattr(pattern, "scope", "layer") != "global"


def _kept_counts(params: PyTree, sparsity: PyTree, taken: PyTree) -> list[int]:
    """How many weights of each parameter that takes part are kept."""
    if jax.tree_util.all_leaves([sparsity]):
        sparsity = jax.tree.map(lambda _: sparsity, params)
    triples = zip(*map(jax.tree.leaves, (params, sparsity, taken)), strict=True)
    return [
        w.size - int(patterns.removed_count(float(s), w.size))
        for w, s, take in triples
        if take
    ]


def _check_drops(fraction: float, kept: list[int], step: int) -> None:
    """Raises where a drop fraction would never move a mask."""
    most = max(kept, default=0)
    if not 0 < fraction <= 1 or math.floor(fraction * most) == 0:
        raise ValueError(
            f"drop_fraction is {fraction:g} in step {step}, when masks first change: "
            f"of at most {most:,} kept weights that compete none would be dropped, and "
            "none grow. It has to be in (0, 1] and large enough for one weight."
        )


def _highest_where_kept(score: Array, mask: Array) -> Array:
    return jnp.where(mask, jnp.inf, score) if jnp.ndim(mask) else score
