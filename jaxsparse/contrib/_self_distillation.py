"""Self-data distillation: a model's own right answers in place of the data's."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsparse import _checks


class SelfDistilled(NamedTuple):
    """Data to fine-tune a pruned model on.

    Attributes:
      examples: pairs `(prompt, target)`, in the order of the data.
      replaced: bools `[examples]`, True where the target is the dense model's answer.
    """

    examples: list[tuple[Any, Any]]
    replaced: np.ndarray


def self_distilled(
    prompts: Sequence[Any],
    targets: Sequence[Any],
    *,
    generate: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
    check: Callable[[Any, Any], bool],
    batch_size: int = 8,
) -> SelfDistilled:
    """Replace targets by the dense model's own answers, where these are right.

    With `a = generate(x, y)` an example `(x, y)` becomes `(x, a)` where `check(a, y)`
    says that the answer in `a` is that in `y`, else it stays. Fine-tuning on such data
    keeps a pruned model closer to the dense model than learning the style of another
    source does. Thangarasu et al. (2024, self-data distillation, arXiv:2410.09982).

    The dense model answers, before it is pruned: pass it the prompt with the target in
    it, as the paper does ("rewrite this answer in your own words"), which `generate`
    puts together, or the prompt alone. `check` compares final answers, numbers or
    choices, not texts; where there is no final answer (open questions), a `check` that
    is always True keeps every answer.

    Args:
      prompts: the prompts, of any type.
      targets: the answers in the data, one for each prompt.
      generate: `generate(prompts, targets) -> answers`, of `batch_size` examples (fewer
        in the last call), with the model and its sampling in it.
      check: `check(answer, target) -> bool`.
      batch_size: how many examples are answered at once.

    Returns:
      `SelfDistilled(examples, replaced)`.

    Raises:
      ValueError: no examples, not as many targets as prompts, another number of
        answers than was asked for.
      TypeError: a `check` that does not return a bool, functions that are none.

    Example:
      >>> import jaxsparse as js
      >>> answers = {"1+1": "It is 2.", "2+2": "It is 5."}
      >>> found = js.contrib.self_distilled(
      ...     ["1+1", "2+2"], ["2", "4"],
      ...     generate=lambda prompts, targets: [answers[p] for p in prompts],
      ...     check=lambda answer, target: answer.strip(".").split()[-1] == target)
      >>> found.examples, found.replaced.tolist()
      ([('1+1', 'It is 2.'), ('2+2', '4')], [True, False])
    """
    _checks.check_callable(2, generate=generate, check=check)
    _checks.check_positive_int(batch_size, name="batch_size")
    for name, given in {"prompts": prompts, "targets": targets}.items():
        if isinstance(given, str | bytes) or not hasattr(given, "__len__"):
            raise TypeError(
                f"{name} must be a sequence of examples, got {_checks.shown(given)}."
            )
    if len(prompts) != len(targets) or not len(prompts):
        raise ValueError(
            f"There are {len(prompts)} prompts and {len(targets)} targets: as many of "
            "both are needed, one at least."
        )
    examples: list[tuple[Any, Any]] = []
    replaced: list[bool] = []
    for first in range(0, len(prompts), batch_size):
        asked = prompts[first : first + batch_size]
        known = targets[first : first + batch_size]
        answers = generate(asked, known)
        if not hasattr(answers, "__len__") or len(answers) != len(asked):
            raise ValueError(
                f"generate was asked for {len(asked)} answers, from prompt {first} on, "
                f"and returned {_checks.shown(answers)}."
            )
        for prompt, answer, target in zip(asked, answers, known, strict=True):
            right = check(answer, target)
            if not isinstance(right, bool | np.bool_):
                raise TypeError(
                    "check must return True or False, got "
                    f"{_checks.shown(right)} for prompt {len(examples)}."
                )
            replaced.append(bool(right))
            examples.append((prompt, answer if right else target))
    if not any(replaced):
        warnings.warn(
            f"None of the {len(examples)} answers is right, so that the data stay as "
            "they are. Does `check` find the answer in what `generate` returns?",
            stacklevel=2,
        )
    return SelfDistilled(examples, np.array(replaced))
