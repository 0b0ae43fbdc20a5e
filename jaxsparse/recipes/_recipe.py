"""What a recipe holds, and the optimizer and loss that follow from it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxsparse import _checks, losses, schedules, scores, transforms
from jaxsparse._typing import Array, PyTree, Schedule, Where
from jaxsparse.patterns import Pattern
from jaxsparse.tree import AxesRule


class Recipe(NamedTuple):
    """A training as values: when and what to prune, and how fast to learn meanwhile.

    `recipe.optimizer()` and `recipe.loss(...)` are made of the fields, so
    `recipe._replace(temperature=5.5)` changes both. Or hand the fields to
    `jaxsparse.prune_schedule`, `jaxsparse.losses.distill` and an optimizer yourself.

    Attributes:
      sparsity: step -> sparsity; 0 before the first cut.
      every: the steps in which masks change.
      learning_rate: step -> learning rate.
      total_steps: the length of the training.
      where: which parameters are pruned.
      pattern: which weights are removed together.
      weight_decay: the weight decay of AdamW.
      temperature: the temperature of the distillation, see `jaxsparse.losses.distill`.
      hardness: the teacher's share of the loss; 0 trains on the labels alone.
      block_size: weights in a block of the Fisher matrix; None for a recipe that scores
        by magnitude.
      damping: added to the Fisher's diagonal, with `F = (1/m) sum_i g_i g_i^T`.
      gradients: how many gradients `m` each cut takes.
      examples_per_gradient: the size of the mini-batch that each of them averages.
    """

    sparsity: Schedule
    every: schedules.At | schedules.Every
    learning_rate: Schedule
    total_steps: int
    where: Where
    pattern: Pattern
    weight_decay: float
    temperature: float
    hardness: float
    block_size: int | None = None
    damping: float | None = None
    gradients: int | None = None
    examples_per_gradient: int | None = None

    def optimizer(
        self,
        inner: Callable[[Schedule], optax.GradientTransformation] | None = None,
        *,
        score: Any = None,
        masks: PyTree = None,
        axes: AxesRule = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Make the optimizer that prunes on the recipe's schedule.

        It is `js.prune_schedule(...).wrap(inner(learning_rate))`: pruned weights are
        exactly 0 after each `optax.apply_updates`.

        Args:
          inner: the optimizer of a learning rate; `optax.adamw` with the recipe's
            weight decay if left out. For SGD `lambda rate: optax.sgd(rate, 0.9)`; the
            recipe's weight decay is not added to it.
          score: a score to use instead of the recipe's. The score of a recipe with a
            Fisher matrix is `jaxsparse.transforms.windowed_obs(summed=True)`, whose
            blocks take `2 * (block_size + 1)` numbers a weight;
            `jaxsparse.scores.magnitude` takes none.
          masks: fixed masks, as `jaxsparse.prune` and `jaxsparse.oneshot.layerwise`
            return them. Then nothing else is pruned: the schedule and the score are
            left out.
          axes: as for `jaxsparse.patterns.masks`.

        Returns:
          A gradient transformation.

        Raises:
          TypeError: an `inner` that is not a function of a learning rate.
          ValueError: both `masks` and a score are given.

        Example:
          >>> import jax.numpy as jnp, optax, jaxsparse as js
          >>> recipe = js.recipes.gmp(100, final=0.5)
          >>> tx = recipe.optimizer(lambda rate: optax.sgd(rate, momentum=0.9))
          >>> state = tx.init({"kernel": jnp.ones((2, 2))})
        """
        if inner is None:
            rate, decay = self.learning_rate, self.weight_decay
            tx = optax.adamw(rate, weight_decay=decay)
        else:
            if isinstance(inner, optax.GradientTransformation):
                raise TypeError(
                    "inner must be a function of a learning rate, got an optimizer. "
                    "For SGD write lambda rate: optax.sgd(rate, momentum=0.9)."
                )
            _checks.check_callable(1, inner=inner)
            tx = inner(self.learning_rate)
            _checks.check_transformation(inner=tx)
        if masks is not None:
            if score is not None:
                raise ValueError(
                    "score: fixed masks are not scored. Leave out either masks= or "
                    "score=."
                )
            return optax.chain(tx, transforms.keep_sparse(masks))
        schedule = transforms.prune_schedule(
            self.sparsity,
            every=self.every,
            score=self._score(axes) if score is None else score,
            pattern=self.pattern,
            where=self.where,
            axes=axes,
            total_steps=self.total_steps,
        )
        return schedule.wrap(tx)

    def loss(
        self,
        student_logits: Array,
        teacher_logits: Array | None = None,
        labels: Array | None = None,
    ) -> Array:
        """Return each example's loss, mixed from labels and teacher by the recipe.

        Args:
          student_logits: `[..., classes]`.
          teacher_logits: the same shape; not needed at hardness 0.
          labels: integers `[...]`; not needed at hardness 1.

        Returns:
          The loss `[...]`; see `jaxsparse.losses.distill`.

        Raises:
          ValueError: missing logits of the teacher, missing labels.

        Example:
          >>> import jax.numpy as jnp, jaxsparse as js
          >>> logits, labels = jnp.array([[2.0, 0.0]]), jnp.array([0])
          >>> loss = js.recipes.gmp(100).loss(logits, labels=labels)
          >>> round(float(loss[0]), 4)
          0.1269
        """
        if teacher_logits is None:
            if self.hardness > 0:
                raise ValueError(
                    f"teacher_logits: missing, and this recipe's hardness "
                    f"{self.hardness:g} gives the teacher a share of the loss. Pass "
                    "the dense model's logits, or take recipe._replace(hardness=0.0)."
                )
            teacher_logits = student_logits
        return losses.distill(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            hardness=self.hardness,
        )

    def _score(self, axes: AxesRule) -> Any:
        """That of the Fisher matrix whose settings the recipe has, or magnitude."""
        if self.block_size is None or self.gradients is None:
            return scores.magnitude
        return transforms.windowed_obs(
            window=self.gradients,
            block_size=self.block_size,
            damping=self.damping,
            pattern=self.pattern,
            where=self.where,
            axes=axes,
            summed=True,
        )


def dense_before(begin: int, *, init: float, final: float, end: int) -> Schedule:
    """Zhu & Gupta's curve, and 0 before it, where that alone has `init` already."""
    curve = schedules.polynomial(init=init, final=final, begin=begin, end=end)
    return lambda step: jnp.where(jnp.asarray(step) < begin, 0.0, curve(step))


def check_sparsities(init: float, final: float) -> None:
    """Raises unless a training may go from the one sparsity to the other."""
    _checks.check_sparsity(init, name="init")
    _checks.check_sparsity(final, name="final")
    if final < init:
        raise ValueError(
            f"{final=} is below {init=}, the sparsity after the first cut: weights "
            "would grow back. Lower `init`."
        )


def check_rates(learning_rate: Any) -> None:
    """Raises unless it is a pair."""
    if not isinstance(learning_rate, Sequence) or len(learning_rate) != 2:
        raise TypeError(f"learning_rate is a pair (peak, end); got {learning_rate!r}.")
