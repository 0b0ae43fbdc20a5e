"""When masks change: values that say yes or no to a step."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import Array


@dataclasses.dataclass(frozen=True)
class Every:
    """The steps `begin, begin + interval, ...` to `end`. Made by `every`.

    Attributes:
      interval: steps from one update to the next.
      begin: the first update.
      end: no update comes after it; None for no end.
    """

    interval: int
    begin: int
    end: int | None

    def __call__(self, step: Any) -> Array:
        """Whether masks change in this step."""
        step = jnp.asarray(step)
        due = (step >= self.begin) & ((step - self.begin) % self.interval == 0)
        return due if self.end is None else due & (step <= self.end)

    def last(self, before: int | None = None) -> int | None:
        """The last update step; None when updates never end.

        Args:
          before: the number of steps of the training, if known.

        Returns:
          A step, or -1 when there is no update at all.
        """
        limits = [
            x
            for x in (self.end, None if before is None else before - 1)
            if x is not None
        ]
        if not limits:
            return None
        end = min(limits)
        if end < self.begin:
            return -1
        return end - (end - self.begin) % self.interval


@dataclasses.dataclass(frozen=True)
class At:
    """A list of steps. Made by `at`.

    Attributes:
      steps: in increasing order.
    """

    steps: tuple[int, ...]

    def __call__(self, step: Any) -> Array:
        """Whether masks change in this step."""
        step = jnp.asarray(step)
        return jnp.isin(step, jnp.asarray(self.steps, step.dtype))

    def last(self, before: int | None = None) -> int | None:
        """The last update step.

        Args:
          before: the number of steps of the training, if known.

        Returns:
          A step, or -1 when there is no update at all.
        """
        steps = [s for s in self.steps if before is None or s < before]
        return max(steps, default=-1)


def every(interval: int, *, begin: int = 0, end: int | None = None) -> Every:
    """Change masks every `interval` steps, from `begin` up to and including `end`.

    Args:
      interval: steps from one update to the next.
      begin: the first update.
      end: no update comes after it. `jaxsparse.prune_schedule` checks that the last
        update reaches the schedule's target: `end - begin` should be a multiple of
        `interval`.

    Returns:
      A frozen value, called as `step -> bool`.

    Raises:
      ValueError: `interval < 1`, or an `end` before the first update.

    Example:
      >>> import jaxsparse as js
      >>> cadence = js.schedules.every(10, begin=5, end=30)
      >>> [t for t in range(50) if cadence(t)], cadence.last()
      ([5, 15, 25], 25)
    """
    _checks.check_positive_int(interval, name="interval")
    _checks.check_positive_int(begin, name="begin", least=0)
    if end is not None:
        _checks.check_positive_int(end, name="end", least=0)
        if end < begin:
            raise ValueError(
                f"Masks would never change: the first update is at step {begin}, after "
                f"the end at {end}. Lower `begin` or raise `end`."
            )
    return Every(interval, begin, end)


def at(*steps: int) -> At:
    """Change masks at the steps listed.

    Args:
      *steps: at least one step.

    Returns:
      A frozen value, called as `step -> bool`.

    Raises:
      ValueError: no step, or a negative one.

    Example:
      >>> import jaxsparse as js
      >>> cadence = js.schedules.at(3, 30)
      >>> [t for t in range(50) if cadence(t)]
      [3, 30]
    """
    if not steps:
        raise ValueError("steps: at() lists no step, so masks would never change.")
    for step in steps:
        _checks.check_positive_int(step, name="steps: a step", least=0)
    return At(tuple(sorted(steps)))
