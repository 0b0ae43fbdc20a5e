"""How much is pruned at a step: functions step -> sparsity, like optax's schedules."""

import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import Array, Schedule


def constant(sparsity: float) -> Schedule:
    """Keep the same sparsity at every step.

    Args:
      sparsity: the fraction to remove, in [0, 1).

    Returns:
      A function step -> sparsity.

    Raises:
      ValueError: a sparsity outside [0, 1).

    Example:
      >>> import jaxsparse as js
      >>> float(js.schedules.constant(0.5)(7))
      0.5
    """
    _checks.check_sparsity(sparsity)
    return lambda step: jnp.full(jnp.shape(step), sparsity, jnp.float32)


def one_shot(sparsity: float, *, step: int) -> Schedule:
    """Stay dense before a step, and take the full sparsity from it on.

    Args:
      sparsity: the fraction to remove, in [0, 1).
      step: the first sparse step.

    Returns:
      A function step -> sparsity.

    Raises:
      ValueError: a sparsity outside [0, 1) or a negative step.

    Example:
      >>> import jaxsparse as js
      >>> schedule = js.schedules.one_shot(0.5, step=10)
      >>> float(schedule(9)), float(schedule(10))
      (0.0, 0.5)
    """
    _checks.check_sparsity(sparsity)
    _checks.check_positive_int(step, name="step", least=0)
    begin = step
    return lambda step: jnp.where(
        jnp.asarray(step) >= begin, jnp.float32(sparsity), jnp.float32(0)
    )


def polynomial(
    *,
    init: float = 0.0,
    final: float,
    begin: int,
    end: int,
    power: float = 3,
) -> Schedule:
    """Raise the sparsity from `init` to `final` between two steps, quickly at first.

    `s(t) = final + (init - final) * (1 - (t - begin) / (end - begin)) ** power`,
    constant outside; `s(begin) = init` and `s(end) = final` hold exactly. At power 3
    it is the schedule of Zhu & Gupta (2017, arXiv:1710.01878).

    Differs from JaxPruner, whose progress is `(t + 1 - begin) / (end - begin)`.

    Args:
      init: the sparsity at `begin` and before.
      final: the sparsity at `end` and after.
      begin: the last step at `init`.
      end: the first step at `final`.
      power: 1 is linear; 3 removes much while there is much to spare.

    Returns:
      A function step -> sparsity.

    Raises:
      ValueError: a sparsity outside [0, 1), `end <= begin`, `power <= 0`.

    Example:
      >>> import jaxsparse as js
      >>> schedule = js.schedules.polynomial(final=0.8, begin=100, end=200)
      >>> [round(float(schedule(t)), 3) for t in (0, 100, 150, 200, 300)]
      [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    _checks.check_sparsity(init, name="init")
    _checks.check_sparsity(final, name="final")
    _checks.check_positive_int(begin, name="begin", least=0)
    _checks.check_positive_int(end, name="end", least=0)
    if end <= begin:
        raise ValueError(
            f"A schedule has to end after it begins: got {begin=}, {end=}. For one cut "
            "use js.schedules.one_shot."
        )
    _checks.check_number(above=0, power=power)

    def schedule(step) -> Array:
        # Subtracted in the step's own type: exact for integers, also unsigned ones.
        elapsed = jnp.maximum(jnp.asarray(step), begin) - begin
        progress = elapsed.astype(jnp.float32) / jnp.float32(end - begin)
        left = (1 - jnp.minimum(progress, 1)) ** power
        return init * left + final * (1 - left)

    return schedule


def alternating(
    sparsity: float, *, begin: int, end: int, sparse: int, dense: int
) -> Schedule:
    """Alternate sparse and dense phases, and end sparse (AC/DC).

    Dense before `begin`; then phases of `sparse` steps at `sparsity` and `dense` steps
    at 0 in turn; sparse for good from `end` on. Peste et al. (2021, arXiv:2106.12379).

    Differs from the reference implementation in what a new phase does to the
    optimizer: under `jaxsparse.enforce` only the coordinates that return lose their
    moments; the reference zeroes all moments.

    Args:
      sparsity: the sparsity of the sparse phases, in [0, 1).
      begin: the first sparse step.
      end: the step from which it stays sparse.
      sparse: the length of a sparse phase in steps.
      dense: the length of a dense phase in steps.

    Returns:
      A function step -> sparsity.

    Raises:
      ValueError: a sparsity outside [0, 1), an empty phase, `end < begin`.

    Example:
      >>> import jaxsparse as js
      >>> schedule = js.schedules.alternating(0.5, begin=2, end=8, sparse=2, dense=1)
      >>> [float(schedule(t)) for t in range(10)]
      [0.0, 0.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.5, 0.5]
    """
    _checks.check_sparsity(sparsity)
    _checks.check_positive_int(begin, name="begin", least=0)
    _checks.check_positive_int(end, name="end", least=begin)
    _checks.check_positive_int(sparse, name="sparse")
    _checks.check_positive_int(dense, name="dense")

    def schedule(step) -> Array:
        step = jnp.asarray(step)
        compressed = (step - begin) % (sparse + dense) < sparse
        on = (step >= begin) & (compressed | (step >= end))
        return jnp.where(on, jnp.float32(sparsity), jnp.float32(0))

    return schedule
