"""Scores with a memory, and how a plain function becomes one without."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._calls import ask, asked_for
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import PyTree


class Score(NamedTuple):
    """A score as `jaxsparse.prune_schedule` uses it.

    `update`, `score` and `prune` may ask for three more things, by the names of
    parameters: `masks`, those before this choice (True = kept); `step`, the number of
    updates so far; `sparsity`, the schedule's at this step (a number, or a tree like
    the parameters). A plain score function may ask for them too. RigL (Evci et al.,
    2020, arXiv:1911.11134), for example, is a function that keeps the largest of the
    present weights and replaces the others by the weights with the largest gradients:

      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> def rigl(params, grads, *, masks, step, sparsity):
      ...     moved = 0.3 * (1 + jnp.cos(jnp.pi * step / 1_000)) / 2
      ...     fewer = sparsity + moved * (1 - sparsity)
      ...     sizes = js.scores.magnitude(params)
      ...     stay = js.patterns.masks(sizes, fewer, masks=masks)
      ...     grow = lambda s, g: jnp.where(s, jnp.inf, jnp.abs(g))
      ...     return jax.tree.map(grow, stay, grads)
      >>> prune_schedule = js.prune_schedule(0.9, every=100, score=rigl)

    Movement (Sanh et al., 2020, arXiv:2005.07683) adds up `-w * g` in `update`:

      >>> movement = js.scores.Score(
      ...     init=lambda params: jax.tree.map(jnp.zeros_like, params),
      ...     update=lambda grads, state, params: jax.tree.map(
      ...         lambda s, w, g: s - w * g, state, params, grads),
      ...     score=lambda params, grads, state: state,
      ...     needs_grads=False)

    Attributes:
      init: `init(params) -> state`, a tree of arrays.
      update: `update(grads, state, params) -> state`, in every step.
      score: `score(params, grads, state) -> scores`, in steps that change masks.
      needs_grads: whether `score` uses gradients; without gradients (at init, last in a
        chain) such a score is not called.
      prune: None, or `prune(params, grads, state, select) -> (masks, change)` in place
        of `score`, for methods that also change the weights they keep: `select(scores)`
        gives the masks, `change` is added to the parameters in the step that chooses
        them (a tree like the parameters; None where nothing changes).
      first: None, or `first(params) -> scores` in place of `score` for the masks that
        `init` chooses, for methods that begin sparse and need gradients later. Exact
        zeros of a model that is sparse already come after all other weights.
    """

    init: Callable[[PyTree], Any]
    update: Callable[..., Any]
    score: Callable[..., PyTree]
    needs_grads: bool = True
    prune: Callable[..., tuple[PyTree, PyTree]] | None = None
    first: Callable[..., PyTree] | None = None


def as_score(score: Score | Callable[..., PyTree]) -> Score:
    """Make a `Score` of a plain function.

    Args:
      score: a `Score`, which is returned as it is; a function of `params`; or a
        function of `params, grads`. It may have parameters named `masks`, `step` and
        `sparsity`; see `Score`.

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
    needs_grads = not _takes(function, 1)
    if needs_grads and not _takes(function, 2):
        raise TypeError(
            "A score is called as score(params) or score(params, grads), with masks=, "
            "step= and sparsity= if it has parameters of these names, but "
            f"{function!r} has the signature {inspect.signature(function)}. Bind the "
            "other arguments with functools.partial."
        )

    def call(params, grads, state, *, masks=None, step=None, sparsity=None):
        del state
        given = (params, grads) if needs_grads else (params,)
        return ask(function, *given, masks=masks, step=step, sparsity=sparsity)

    stay = lambda grads, state, params: state
    return Score(lambda params: (), stay, call, needs_grads=needs_grads)


def _takes(function: Callable[..., Any], positional: int) -> bool:
    named = dict.fromkeys(asked_for(function, positional))
    try:
        inspect.signature(function).bind(*[None] * positional, **named)
    except TypeError:
        return False
    return True


def moving_average(
    score: Score | Callable[..., PyTree], *, decay: float = 0.9
) -> Score:
    """Average a score exponentially, with an update in every step.

    `a <- decay * a + (1 - decay) * score(params, grads)`, from 0. The gradient of one
    batch is noisy; movement-like and Taylor criteria average it over some dozens of
    steps. The average is one more copy of the parameters, in float32. It is not
    corrected for its start at 0, because one factor for all weights does not change
    their order.

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
        wide = lambda w: wide_dtype(w.dtype)
        zeros = lambda w: jnp.zeros_like(w, dtype=wide(w))
        return (inner.init(params), jax.tree.map(zeros, params))

    def update(grads, state, params, *, masks=None, step=None, sparsity=None):
        inner_state, average = state
        known = {"masks": masks, "step": step, "sparsity": sparsity}
        inner_state = ask(inner.update, grads, inner_state, params, **known)
        now = ask(inner.score, params, grads, inner_state, **known)
        blend = lambda a, s: decay * a + (1 - decay) * s.astype(a.dtype)
        return (inner_state, jax.tree.map(blend, average, now))

    return Score(init, update, lambda params, grads, state: state[1])
