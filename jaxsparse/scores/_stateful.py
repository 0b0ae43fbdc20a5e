"""Scores with a memory, and how a plain function becomes one without."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import PyTree


class Score(NamedTuple):
    """A score as `jaxsparse.prune_schedule` uses it.

    Attributes:
      init: `init(params) -> state`, a tree of arrays.
      update: `update(grads, state, params) -> state`, in every step.
      score: `score(params, grads, state) -> scores`, in steps that change masks.
      needs_grads: whether `score` makes use of gradients; where there are none (at
        init, last in a chain) such a score cannot be asked.
      prune: None, or `prune(params, grads, state, select) -> (masks, change)` in place
        of `score`, for methods that also change the weights they keep: `select(scores)`
        gives the masks, `change` is added to the parameters in the step that chooses
        them (a tree like the parameters; None where nothing changes).
    """

    init: Callable[[PyTree], Any]
    update: Callable[[PyTree, Any, PyTree], Any]
    score: Callable[[PyTree, PyTree, Any], PyTree]
    needs_grads: bool = True
    prune: Callable[[PyTree, PyTree, Any, Callable], tuple[PyTree, PyTree]] | None = (
        None
    )


def as_score(score: Score | Callable[..., PyTree]) -> Score:
    """A `Score` from a plain function.

    Args:
      score: a `Score`, which is returned as it is; a function of `params`; or a
        function of `params, grads`.

    Returns:
      A `Score` without a state.

    Raises:
      TypeError: not callable, or with other required arguments (a key, say: bind it
        with `functools.partial`).

    Example:
      >>> import jaxsparse as js
      >>> js.scores.as_score(js.scores.magnitude).needs_grads
      False
      >>> js.scores.as_score(js.scores.taylor).needs_grads
      True
    """
    if isinstance(score, Score):
        return score
    if not callable(score):
        raise TypeError(
            "A score is a function of params, or of params and grads, or a "
            f"js.scores.Score; got {score!r}."
        )
    function = score
    if _takes(function, 1):
        return Score(
            lambda params: (),
            lambda grads, state, params: state,
            lambda params, grads, state: function(params),
            needs_grads=False,
        )
    if _takes(function, 2):
        return Score(
            lambda params: (),
            lambda grads, state, params: state,
            lambda params, grads, state: function(params, grads),
        )
    raise TypeError(
        f"A score is called as score(params) or score(params, grads), but "
        f"{function!r} has the signature {inspect.signature(function)}. Bind the other "
        "arguments with functools.partial."
    )


def _takes(function: Callable[..., Any], positional: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * positional)
    except TypeError:
        return False
    return True


def moving_average(
    score: Score | Callable[..., PyTree], *, decay: float = 0.9
) -> Score:
    """An exponential moving average of a score, updated in every step.

    `a <- decay * a + (1 - decay) * score(params, grads)`, from 0. One batch's gradient
    is noisy; its average over some dozens of steps is what movement-like and Taylor
    criteria are used with. The average is one more copy of the parameters, in float32.
    (It is not corrected for its start at 0: that is one factor for all weights, and
    the order does not see it.)

    Args:
      score: a plain score, as `jaxsparse.scores.taylor`.
      decay: in [0, 1).

    Returns:
      A `Score`, for `jaxsparse.prune_schedule`.

    Raises:
      ValueError: a decay outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> score = js.scores.moving_average(js.scores.taylor, decay=0.5)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = score.update(params, score.init(params), params)
      >>> score.score(params, params, state)
      {'w': Array([0.5, 2. ], dtype=float32)}
    """
    _checks.check_number(least=0, below=1, decay=decay)
    inner = as_score(score)

    def init(params: PyTree):
        wide = lambda w: w.dtype if w.dtype == jnp.float64 else jnp.float32
        zeros = lambda w: jnp.zeros_like(w, dtype=wide(w))
        return (inner.init(params), jax.tree.map(zeros, params))

    def update(grads: PyTree, state: Any, params: PyTree):
        inner_state, average = state
        inner_state = inner.update(grads, inner_state, params)
        now = inner.score(params, grads, inner_state)
        blend = lambda a, s: decay * a + (1 - decay) * s.astype(a.dtype)
        return (inner_state, jax.tree.map(blend, average, now))

    return Score(init, update, lambda params, grads, state: state[1])
