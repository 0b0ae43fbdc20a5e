"""Does a schedule reach its target before masks stop changing?"""

import math
from typing import Any

import jax

from jaxsparse import _checks, schedules
from jaxsparse._typing import Cadence, PyTree, Sparsity
from jaxsparse.tree import leaves_with_paths

_LATE = 2**30  # past the end of any training; float32 holds it exactly


def as_cadence(every: int | Cadence) -> Cadence:
    """A cadence from what `prune_schedule` takes for `every`."""
    if callable(every):
        return every
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(
            "every: a number of steps, a cadence of js.schedules (every, at), or a "
            f"function step -> bool; got {every!r}."
        )
    return schedules.every(every)


def evaluate(sparsity: Sparsity, step: Any) -> PyTree:
    """The sparsity, or the tree of them, at a step."""
    return jax.tree.map(lambda s: s(step) if callable(s) else s, sparsity)


def check_horizon(
    sparsity: Sparsity, cadence: Cadence, total_steps: int | None
) -> None:
    """Raises when the masks would stop changing before the target is reached."""
    if total_steps is not None:
        _checks.check_positive_int(total_steps, name="total_steps")
    last = _last_update(cadence, total_steps)
    if last == -1:
        raise ValueError(
            f"Masks would never change: {cadence} has no update before training ends "
            f"after {total_steps} steps."
        )
    for path, schedule in leaves_with_paths(sparsity):
        name = f"{path}: sparsity" if path else "sparsity"
        if not callable(schedule):
            _checks.check_sparsity(schedule, name=name)
            continue
        with jax.ensure_compile_time_eval():
            at: Any = schedule
            final = float(at(_LATE))
            reached = final if last is None else float(at(last))
            first = float(at(0))
        _checks.check_sparsity(first, name=f"{name} at step 0")
        _checks.check_sparsity(final, name=f"{name} in the end")
        if not math.isclose(reached, final, rel_tol=0, abs_tol=1e-6):
            raise ValueError(
                f"{name} never reaches its target: masks change for the last time at "
                f"step {last}, at {reached:.6g}, and the schedule goes on to "
                f"{final:.6g}. Let `every` end where the schedule does (end - begin a "
                "multiple of the interval), or end the schedule earlier."
            )


def _last_update(cadence: Cadence, total_steps: int | None) -> int | None:
    """The last step in which masks change, None if that is not known, -1 if never."""
    last: Any = getattr(cadence, "last", None)
    if last is not None:
        return last(total_steps)
    if total_steps is None:
        return None
    with jax.ensure_compile_time_eval():
        due = [t for t in range(total_steps) if bool(cadence(t))]
    return due[-1] if due else -1
