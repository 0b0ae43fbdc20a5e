"""Gradual trainings of transformers that rewind the learning rate where they cut."""

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

from jaxsparse import _checks, schedules
from jaxsparse._typing import Where
from jaxsparse.patterns import Pattern
from jaxsparse.recipes._recipe import (
    Recipe,
    check_rates,
    check_sparsities,
    dense_before,
)

# The kernels of a transformer's numbered (or scanned) blocks: q, k, v, the attention's
# output and the two of the feed-forward part, whatever a library calls them.
BLOCK_KERNELS = (
    r"(?i)^(?!.*(norm|embed|pooler|classifier|(^|/)ln(_\w+|\d*)/))"  # dense inside, too
    r".*("
    r"(layers?|blocks?|(^|/)h)[_/]?\d+/"  # layer_0/, encoder/layer/0/, EncoderBlock_0/
    r"|(^|/)(layers?|blocks?)/(?!\d)"  # layers/, stacked by a scan
    r").*/(in_proj_)?(kernel|weight|w)$"
)


def gradual(
    steps_per_epoch: int,
    epochs: float,
    cuts: Sequence[float],
    rewinds: Sequence[float],
    *,
    sparsities: tuple[float, float],
    learning_rate: tuple[float, float],
    pattern: Pattern,
    weight_decay: float,
    temperature: float,
    where: Where = BLOCK_KERNELS,
    **fisher: Any,
) -> Recipe:
    """A recipe from the epochs in which it cuts and rewinds."""
    total_steps = _nearest(epochs * steps_per_epoch)
    steps = [_nearest(cut * steps_per_epoch) for cut in cuts]
    if any(b <= a for a, b in itertools.pairwise((*steps, total_steps))):
        apart = min(b - a for a, b in itertools.pairwise((*cuts, epochs)))
        raise ValueError(
            f"{steps_per_epoch=} is too few: {len(cuts)} cuts in {epochs:g} epochs, "
            f"{apart:g} epochs apart, would fall on the steps {steps}. It takes "
            f"{math.ceil(round(1 / apart, 6))} steps an epoch, or more epochs."
        )
    check_rates(learning_rate)
    return Recipe(
        sparsity=dense_before(
            steps[0], init=sparsities[0], final=sparsities[1], end=steps[-1]
        ),
        every=schedules.at(*steps),
        learning_rate=schedules.rewinding(
            peak=learning_rate[0],
            end=learning_rate[1],
            at=[_nearest(rewind * steps_per_epoch) for rewind in rewinds],
            total_steps=total_steps,
        ),
        total_steps=total_steps,
        where=where,
        pattern=pattern,
        weight_decay=weight_decay,
        temperature=temperature,
        hardness=1.0,
        **fisher,
    )


def check_training(
    steps_per_epoch: int, epochs: float, init: float, final: float, pattern: Any
) -> None:
    """Raises unless a training may have these lengths, sparsities and pattern."""
    _checks.check_pattern(Pattern, pattern)
    _checks.check_positive_int(steps_per_epoch, name="steps_per_epoch")
    if isinstance(epochs, bool) or not isinstance(epochs, numbers.Real):
        raise TypeError(f"epochs must be a number, got {epochs!r}.")
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be positive, got {epochs!r}.")
    check_sparsities(init, final)


def _nearest(step: float) -> int:
    """Halves go up, also those that are a rounding error short of a half."""
    return math.floor(round(step, 6) + 0.5)
