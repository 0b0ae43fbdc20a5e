"""Trainings that score by magnitude: gradual pruning, or one cut and fine-tuning."""

from typing import Any

import optax

from jaxsparse import _checks, schedules
from jaxsparse._typing import Schedule, Where
from jaxsparse.patterns import Pattern, Unstructured
from jaxsparse.recipes._recipe import (
    Recipe,
    check_rates,
    check_sparsities,
    dense_before,
)


def gmp(
    total_steps: int,
    *,
    final: float = 0.9,
    init: float = 0.0,
    begin: float = 0.1,
    end: float = 0.75,
    interval: int | None = None,
    learning_rate: tuple[float, float] = (1e-3, 0.0),
    weight_decay: float = 0.0,
    hardness: float = 0.0,
    temperature: float = 2.0,
    pattern: Pattern = Unstructured(),
    where: Where = None,
) -> Recipe:
    """Prune any model gradually by magnitude while it trains.

    Zhu & Gupta (2017, arXiv:1710.01878): the model trains dense until `begin`; then
    every `interval` steps it removes the smallest weights of each layer, along `s =
    final + (init - final) (1 - (t - t_0) / (t_1 - t_0))^3`, many at first and few in
    the end; from `end` on the masks stay and the model recovers.

    The paper prunes every 100 to 1,000 steps, from a sparsity of 0, and says to stop
    before the learning rate has become small. It leaves the rest to the task: here the
    learning rate falls along a cosine, and `begin` and `end` are the fractions 0.1 and
    0.75 of the training.

    Args:
      total_steps: optimizer steps in the training.
      final: the sparsity in the end.
      init: the sparsity of the first cut.
      begin: the fraction of the training before the first cut.
      end: the fraction of the training at the last cut.
      interval: steps from one cut to the next; about a hundredth of the time between
        `begin` and `end` if left out, and 100 at most.
      learning_rate: its peak and its end.
      weight_decay: the weight decay of AdamW.
      hardness: the share of a dense teacher in the loss; none by default.
      temperature: the temperature of the distillation.
      pattern: which weights are removed together, and which compete.
      where: which parameters are pruned; see `jaxsparse.tree.select`.

    Returns:
      A `Recipe`.

    Raises:
      TypeError: steps that are no integers, fractions that are no numbers.
      ValueError: a sparsity outside [0, 1), `final < init`, fractions out of order, an
        interval that does not fit between them.

    Example:
      >>> import jaxsparse as js
      >>> recipe = js.recipes.gmp(10_000, final=0.9)
      >>> recipe.every.begin, recipe.every.interval, recipe.every.last()
      (1000, 65, 7500)
      >>> [round(float(recipe.sparsity(t)), 3) for t in (0, 2_000, 7_500)]
      [0.0, 0.355, 0.9]
      >>> tx = recipe.optimizer()
      >>> loss_fn = lambda logits, labels: recipe.loss(logits, labels=labels).mean()
    """
    _checks.check_positive_int(total_steps, name="total_steps")
    check_sparsities(init, final)
    _checks.check_number(begin=begin, end=end)
    if not 0 <= begin < end <= 1:
        raise ValueError(
            f"begin and end are fractions of the training, 0 <= begin < end <= 1; got "
            f"{begin:g} and {end:g}."
        )
    first, last = round(begin * total_steps), round(end * total_steps)
    last = min(last, total_steps - 1)
    if interval is None:
        interval = max(1, min(100, (last - first) // 100))
    _checks.check_positive_int(interval, name="interval")
    if last - first < interval:
        raise ValueError(
            f"{interval=}: no two cuts fall between the steps {first} and {last}. Take "
            "a smaller interval or more steps."
        )
    last -= (last - first) % interval  # the last cut is the one that reaches `final`
    return _by_magnitude(
        dense_before(first, init=init, final=final, end=last),
        schedules.every(interval, begin=first, end=last),
        total_steps=total_steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        hardness=hardness,
        temperature=temperature,
        pattern=pattern,
        where=where,
    )


def one_shot(
    total_steps: int,
    *,
    sparsity: float = 0.5,
    learning_rate: tuple[float, float] = (1e-4, 0.0),
    weight_decay: float = 0.0,
    hardness: float = 0.0,
    temperature: float = 2.0,
    pattern: Pattern = Unstructured(),
    where: Where = None,
) -> Recipe:
    """Cut once before the first step, then fine-tune the remaining weights.

    This is the oldest recipe (Han et al., 2015, arXiv:1506.02626, prune and retrain),
    for a trained model. The learning rate begins near the end of that of its training
    and falls along a cosine.

    `recipe.optimizer()` cuts by magnitude; start with `js.init_sparse(tx, params)`. To
    prune in another way, pass `recipe.optimizer(masks=pruned.masks)` the masks that
    `js.prune`, `js.oneshot.layerwise` or `js.solvers.obs` returned.

    Args:
      total_steps: optimizer steps in the fine-tuning.
      sparsity: the fraction to remove.
      learning_rate: its peak and its end.
      weight_decay: the weight decay of AdamW.
      hardness: the share of a dense teacher in the loss; none by default.
      temperature: the temperature of the distillation.
      pattern: which weights are removed together, and which compete.
      where: which parameters are pruned; see `jaxsparse.tree.select`.

    Returns:
      A `Recipe`.

    Raises:
      TypeError: steps that are no integer.
      ValueError: a sparsity outside [0, 1), a learning rate that rises.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> recipe = js.recipes.one_shot(100, sparsity=0.5)
      >>> params, masks = js.prune({"kernel": jnp.array([[3.0, 1.0]])}, 0.5)
      >>> tx = recipe.optimizer(masks=masks)
      >>> state = tx.init(params)
    """
    return _by_magnitude(
        schedules.constant(sparsity),
        schedules.at(0),
        total_steps=total_steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        hardness=hardness,
        temperature=temperature,
        pattern=pattern,
        where=where,
    )


def _by_magnitude(
    sparsity: Schedule,
    every: schedules.At | schedules.Every,
    *,
    total_steps: int,
    learning_rate: tuple[float, float],
    **settings: Any,
) -> Recipe:
    """A recipe without a Fisher matrix, whose learning rate falls along a cosine."""
    _checks.check_positive_int(total_steps, name="total_steps")
    _checks.check_pattern(Pattern, settings["pattern"])
    _checks.check_where(settings["where"])
    _checks.check_number(least=0, weight_decay=settings["weight_decay"])
    _checks.check_number(least=0, most=1, hardness=settings["hardness"])
    _checks.check_number(above=0, temperature=settings["temperature"])
    check_rates(learning_rate)
    peak, end = learning_rate
    _checks.check_number(least=0, end=end)
    _checks.check_number(above=0, peak=peak)
    if end > peak:
        raise ValueError(f"learning_rate falls: 0 <= end <= peak; got {learning_rate}.")
    rate = optax.cosine_decay_schedule(peak, total_steps, alpha=end / peak)
    return Recipe(sparsity, every, rate, total_steps, **settings)
