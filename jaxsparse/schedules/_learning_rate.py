"""A learning rate that is rewound where masks change: step -> number, as in optax."""

import itertools
import math
import numbers
from collections.abc import Iterable

import jax.numpy as jnp
import optax

from jaxsparse import _checks
from jaxsparse._typing import Schedule


def rewinding(
    *, peak: float, end: float, at: Iterable[int], total_steps: int
) -> Schedule:
    """Lower a rate linearly from `peak` to `end`, and restart at the steps listed.

    A learning rate that has already decayed cannot repair the loss of a pruning step:
    the recipes of oBERT (Kurtic et al., 2022, arXiv:2203.07259) rewind it at every
    pruning step. With the rewinds `a, b, ...` of `at` the learning rate is::

        0 <= t < a:    peak + (end - peak) * t / a                  a first phase
        a <= t < b:    peak + (end - peak) * (t - a) / (b - a - 1)  a cycle

    so that the first step of each phase has `peak`, the last step of each cycle `end`.
    The last cycle ends with the training; `end` holds after it. With `at=(0, ...)`
    there is no first phase.

    These are SparseML's `linear` and `cyclic_linear` at whole steps. Differs from them
    in that cycles may be of any lengths, and that a cycle of one step has `peak` where
    SparseML divides by zero.

    Args:
      peak: the learning rate at the start and after each rewind.
      end: the rate at the end, in [0, peak].
      at: the steps whose learning rate is `peak` again, in increasing order; for
        instance the `steps` of a `jaxsparse.schedules.at`.
      total_steps: the length of the training, at which the last cycle ends.

    Returns:
      A function step -> learning rate.

    Raises:
      TypeError: steps that are no integers, rates that are no numbers.
      ValueError: no step, steps not in order or after the training's end; rates that
        do not fall from `peak` to `end`.

    Example:
      >>> import jaxsparse as js
      >>> schedule = js.schedules.rewinding(peak=1.0, end=0.5, at=(2, 5), total_steps=8)
      >>> [float(schedule(t)) for t in range(8)]
      [1.0, 0.75, 1.0, 0.75, 0.5, 1.0, 0.75, 0.5]
    """
    _check_rates(peak, end)
    if not isinstance(at, Iterable):
        raise TypeError(
            f"at must be the steps to rewind at, such as [2, 4]; got {at!r}."
        )
    rewinds = tuple(at)
    _check_steps(rewinds, total_steps)
    fall = lambda steps: optax.linear_schedule(peak, end, steps)
    cycles = itertools.pairwise((*rewinds, total_steps))
    phases = [fall(b - a - 1) for a, b in cycles]
    joined = optax.join_schedules([fall(rewinds[0]), *phases], rewinds)
    # As an array, a step of an unsigned type wraps around silently before a rewind,
    # where its value is not used; a NumPy scalar would warn.
    return lambda step: jnp.asarray(joined(jnp.asarray(step)), jnp.float32)


def _check_rates(peak: float, end: float) -> None:
    for name, rate in {"peak": peak, "end": end}.items():
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
            raise TypeError(f"{name} must be a number, got {rate!r}.")
    if not (0 <= end <= peak and math.isfinite(peak)):
        raise ValueError(
            f"The learning rate falls from `peak` to `end`, so 0 <= end <= peak; got "
            f"{peak=}, {end=}."
        )


def _check_steps(rewinds: tuple[int, ...], total_steps: int) -> None:
    _checks.check_positive_int(total_steps, name="total_steps")
    if not rewinds:
        raise ValueError(
            "at: no step to rewind at. For one decay use optax.linear_schedule."
        )
    for step in rewinds:
        _checks.check_positive_int(step, name="at: a step", least=0)
    for a, b in itertools.pairwise(rewinds):
        if b <= a:
            raise ValueError(f"at: steps must increase; got {b} after {a}.")
    if rewinds[-1] >= total_steps:
        raise ValueError(
            f"at: the rewind at step {rewinds[-1]} is not within the training's "
            f"{total_steps} steps. Train longer, or leave it out."
        )
