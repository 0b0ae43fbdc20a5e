"""Early exit: an input leaves the model where a classifier is confident."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._host import on_host
from jaxsparse._typing import Array

Confidence = Callable[[Array], Array]


class Exit(NamedTuple):
    """The exit at which each input leaves a model, and its logits.

    Attributes:
      index: `[batch]` int32, which exit, 0 for the first.
      logits: `[batch, classes]`, the logits of this exit.
      confidence: `[batch]`, its confidence, float32 at least.
    """

    index: Array
    logits: Array
    confidence: Array


def choose_exit(
    logits: Sequence[Array],
    *,
    threshold: float | Array,
    confidence: Confidence | None = None,
) -> Exit:
    """Choose for each input the first exit that is confident, or the last one.

    The input leaves at the first exit k with `confidence(logits[k]) >= threshold`. The
    result is the answer of a model with early exits. All exits are computed already, so
    nothing is saved: use it for validation and training, and use `run_until_confident`
    to skip the stages after the exit. Teerapittayanon et al. (2016, BranchyNet,
    arXiv:1709.01686) exit by the entropy of the softmax, MSDNet (Huang et al., 2018,
    arXiv:1703.09844) by its maximum.

    Args:
      logits: for each exit `[batch, classes]`, the same shape for all.
      threshold: possibly traced; `exit_threshold` finds the one for a budget.
      confidence: from logits `[..., classes]` to numbers `[...]`, larger = surer. By
        default the largest probability of the softmax.

    Returns:
      An `Exit`. An exit whose confidence is NaN is not confident.

    Raises:
      ValueError: no exits, logits of different shapes, a threshold that is NaN.
      TypeError: logits that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> first = jnp.array([[4.0, 0.0], [0.1, 0.0]])
      >>> last = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> found = js.adaptive.choose_exit([first, last], threshold=0.9)
      >>> found.index.tolist(), found.logits.tolist()
      ([0, 1], [[4.0, 0.0], [0.0, 1.0]])
    """
    stacked = _stacked(logits)
    _check_threshold(threshold)
    sure = _confidence(confidence, stacked)
    enough = sure >= jnp.asarray(threshold, sure.dtype)
    last = jnp.arange(len(stacked)).reshape([-1] + [1] * (sure.ndim - 1))
    index = jnp.argmax(enough | (last == len(stacked) - 1), axis=0).astype(jnp.int32)
    pick = lambda x: jnp.take_along_axis(
        x, index.reshape(1, *index.shape, *[1] * (x.ndim - 1 - index.ndim)), axis=0
    )[0]
    return Exit(index, pick(stacked), pick(sure))


def run_until_confident(
    stages: Sequence[Callable[[Any], tuple[Any, Array]]],
    x: Any,
    *,
    threshold: float | Array,
    confidence: Confidence | None = None,
) -> Exit:
    """Run a model stage by stage for one input, and stop where it is confident.

    Under `jit` each stage after the first runs within a `lax.cond`, so stages after the
    exit are not computed, and one program serves all inputs. This needs a batch of one
    input: `vmap` would turn each `lax.cond` into a selection and compute all stages.
    Larger batches are therefore an error; use `choose_exit`, or call this once for each
    input (`lax.map`).

    Args:
      stages: for each exit a function `h -> (h, logits)`: the part of the model up to
        the exit, and its classifier. All give logits `[1, classes]` of one shape and
        type; the `h` may differ. Close over the parameters.
      x: one input of the first stage; its arrays have a leading axis of length 1.
      threshold: as for `choose_exit`.
      confidence: as for `choose_exit`.

    Returns:
      An `Exit` of batch 1, equal to that of `choose_exit`.

    Raises:
      ValueError: no stages, more than one input, logits of different shapes.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> stages = [lambda h: (h, h), lambda h: (h, 10 * h)]
      >>> run = lambda x: js.adaptive.run_until_confident(stages, x, threshold=0.9)
      >>> [run(jnp.array([[x, 0.0]])).index.tolist() for x in (4.0, 0.5)]
      [[0], [1]]
    """
    if not isinstance(stages, Sequence) or not stages:
        raise ValueError(
            f"stages: expected a list of functions h -> (h, logits), got "
            f"{_checks.shown(stages)}."
        )
    for i, stage in enumerate(stages):
        _checks.check_callable(1, **{f"stages[{i}]": stage})
    _check_threshold(threshold)
    _checks.check_arrays(x=x)
    for leaf in jax.tree.leaves(x):
        if not jnp.ndim(leaf) or leaf.shape[0] != 1:
            raise ValueError(
                f"x: expected one input, arrays [1, ...], got the shape "
                f"{jnp.shape(leaf)}. For a batch call it by lax.map, or take "
                "js.adaptive.choose_exit."
            )

    def go_on(i: int, h: Any) -> Exit:
        h, logits = stages[i](h)
        (stacked,) = _stacked([logits])
        sure = _confidence(confidence, stacked)
        here = Exit(jnp.full(sure.shape, i, jnp.int32), logits, sure)
        if i == len(stages) - 1:
            return here
        enough = jnp.all(sure >= jnp.asarray(threshold, sure.dtype))
        return lax.cond(enough, lambda _: here, lambda h: go_on(i + 1, h), h)

    with _checks.explained("stages", x=x):
        return go_on(0, x)


class ExitThreshold(NamedTuple):
    """The result of `exit_threshold`.

    Attributes:
      threshold: the confidence at which to exit.
      reached: the mean cost with it, at most the budget.
      shares: for each exit the fraction of inputs that leave there.
    """

    threshold: float
    reached: float
    shares: tuple[float, ...]


def exit_threshold(
    logits: Sequence[Array],
    *,
    costs: Sequence[float],
    budget: float,
    confidence: Confidence | None = None,
) -> ExitThreshold:
    """Find the highest threshold whose mean cost is within a budget.

    A higher threshold makes inputs leave later, so the cost never falls with it and the
    result is exact for the given inputs, which should not be training data. All
    thresholds between two confidences give the same exits; the middle is returned, so
    that rounding in another program changes nothing. It sorts the confidences on the
    host, O(n log n) of n inputs and exits.

    Args:
      logits: for each exit `[batch, classes]`, of validation data.
      costs: for each exit the cost of a run up to there, rising: FLOPs, milliseconds.
      budget: the largest mean cost, at least that of the first exit.
      confidence: as for `choose_exit`.

    Returns:
      An `ExitThreshold`. Its threshold is infinite where the budget lets all inputs run
      to the end.

    Raises:
      ValueError: costs that decrease from exit to exit, another number of costs than of
        exits; a budget below the first cost; confidences that are NaN.
      TypeError: logits that are not floating point, or not known (under jit).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> first = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]))
      >>> found = js.adaptive.exit_threshold(
      ...     [first, first], costs=[1.0, 4.0], budget=2.5)
      >>> round(found.threshold, 3), found.reached              # one of three goes on
      (0.65, 2.0)
    """
    stacked = _stacked(logits)
    _checks.check_known("js.adaptive.exit_threshold", logits=list(logits))
    given = _costs(costs, len(stacked))
    _checks.check_number(budget=budget)
    sure = on_host(_confidence(confidence, stacked)).reshape(len(stacked), -1)
    if np.isnan(sure).any():
        raise ValueError(
            f"logits: {int(np.isnan(sure).sum())} confidences are NaN. Look for NaN "
            "in the parameters and the inputs."
        )
    if budget < given[0]:
        raise ValueError(
            f"budget={budget!r}: each input costs {given[0]} at least, up to the first "
            "exit."
        )
    # An input passes exit k if no exit so far was as confident as the threshold.
    best = np.maximum.accumulate(sure[:-1], axis=0)
    n = sure.shape[1]
    more = np.broadcast_to(np.diff(given)[:, None], best.shape)
    order = np.argsort(best, axis=None, kind="stable")
    passed, cost = best.ravel()[order], np.cumsum(more.ravel()[order]) / n + given[0]
    threshold = np.inf
    if len(cost) and cost[-1] > budget * (1 + 1e-12):
        # The lowest confidence whose passing is too much: it has to be enough.
        threshold = _below(passed, passed[np.argmax(cost > budget * (1 + 1e-12))])
    index = np.sum(best < threshold, axis=0)
    shares = np.bincount(index, minlength=len(given)) / n
    return ExitThreshold(
        float(threshold), float(shares @ given), tuple(shares.tolist())
    )


def _below(values: np.ndarray, high: Any) -> Any:
    """What lies between a value and the next lower one, or the value if none does."""
    lower = values[values < high]
    middle = lower[-1] + (high - lower[-1]) / 2 if lower.size else high
    return middle if lower.size and middle > lower[-1] else high


def _check_threshold(threshold: Any) -> None:
    """Raises unless it is a number; infinity, which nothing reaches, is one."""
    _checks.check_scalar(threshold=threshold)
    if _checks.is_concrete(threshold) and np.isnan(float(threshold)):
        raise ValueError(
            "threshold is NaN. Pass a number, such as 0.9; jnp.inf is never reached."
        )


def _stacked(logits: Sequence[Array]) -> Array:
    """`[exits, batch, classes]`."""
    if not isinstance(logits, Sequence) or not logits:
        raise ValueError(
            "logits: expected a list of arrays [batch, classes], one for each exit; "
            f"got {_checks.shown(logits)}."
        )
    for i, x in enumerate(logits):
        _checks.check_floats(**{f"logits[{i}]": x})
        if jnp.ndim(x) < 2 or not x.size or x.shape != jnp.shape(logits[0]):
            raise ValueError(
                f"logits[{i}]: expected [batch, classes], the same for all exits; got "
                f"the shapes {[jnp.shape(x) for x in logits]}."
            )
    return jnp.stack(list(logits))


def _confidence(function: Confidence | None, logits: Array) -> Array:
    """How sure each exit is, `[exits, batch]`."""
    if function is None:
        return jnp.max(jax.nn.softmax(as_wide(logits)), axis=-1)
    _checks.check_callable(1, confidence=function)
    with _checks.explained("confidence", logits=logits):
        found = function(logits)
    _checks.check_arrays(confidence=found)
    if jnp.shape(found) != logits.shape[:-1]:
        raise ValueError(
            f"confidence must return one number for each input, {logits.shape[:-1]}; "
            f"got the shape {jnp.shape(found)}."
        )
    return found


def _costs(costs: Sequence[float], exits: int) -> np.ndarray:
    given = np.asarray(costs)
    if given.shape != (exits,) or given.dtype.kind not in "iuf":
        raise ValueError(
            f"costs: expected {exits} numbers, one for each exit; got "
            f"{_checks.shown(costs)}."
        )
    if not np.all(np.isfinite(given)) or np.any(np.diff(given) < 0):
        raise ValueError(f"costs must rise from exit to exit, got {costs}.")
    return given.astype(np.float64)
