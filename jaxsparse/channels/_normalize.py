"""Scores of groups on a common scale, before groups compete with one another.

All functions take and return scores by the groups' names, `[*copies, size]`. They keep
the order within a group. The statistics are those of a whole group, over all its
copies: what tells heads or experts of one layer apart is kept. With `per_copy=True`
each copy has its own, which is what the layers of a scanned model want.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._host import on_host
from jaxsparse._sharded import sharded_like
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.channels._score import slices_that_count
from jaxsparse.coupling.grouping import Group
from jaxsparse.tree import leaves_with_paths

Scores = Mapping[str, Array]


def normalize_mean(scores: Scores, *, per_copy: bool = False) -> dict[str, Array]:
    """Divide scores by their mean magnitude: an average channel has 1.

    This is Torch-Pruning's default (Fang et al. 2023, arXiv:2301.12900). It differs by
    the magnitude in the mean, without which scores of either sign could change their
    order.

    Args:
      scores: `[*copies, size]` by name.
      per_copy: whether each copy is divided by its own mean.

    Returns:
      Scores of the same shapes; those that are all 0 stay so.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.channels.normalize_mean({"up[1]": jnp.array([1.0, 3.0])})
      {'up[1]': Array([0.5, 1.5], dtype=float32)}
    """
    mean = lambda x: jnp.mean(jnp.abs(x), axis=-1, keepdims=True)
    return _each(lambda x: _ratio(x, mean(x)), scores, per_copy)


def normalize_max(scores: Scores, *, per_copy: bool = False) -> dict[str, Array]:
    """Divide scores by their largest magnitude: the most important channel has 1.

    Args:
      scores: `[*copies, size]` by name.
      per_copy: whether each copy is divided by its own maximum.

    Returns:
      Scores of the same shapes; those that are all 0 stay so.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.channels.normalize_max({"up[1]": jnp.array([1.0, 4.0])})
      {'up[1]': Array([0.25, 1.  ], dtype=float32)}
    """
    largest = lambda x: jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return _each(lambda x: _ratio(x, largest(x)), scores, per_copy)


def normalize_norm(scores: Scores, *, per_copy: bool = False) -> dict[str, Array]:
    """Divide scores by their norm `||s||_2` (Michel et al. 2019, arXiv:1905.10650).

    Args:
      scores: `[*copies, size]` by name.
      per_copy: whether each copy is divided by its own norm.

    Returns:
      Scores of the same shapes; those that are all 0 stay so.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.channels.normalize_norm({"query[1]": jnp.array([3.0, 4.0])})
      {'query[1]': Array([0.6, 0.8], dtype=float32)}
    """

    def one(x: Array) -> Array:
        # Squares of what is small would be 0.
        x = _ratio(x, jnp.max(jnp.abs(x), axis=-1, keepdims=True))
        return _ratio(x, jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)))

    return _each(one, scores, per_copy)


def normalize_range(scores: Scores, *, per_copy: bool = False) -> dict[str, Array]:
    """Scale scores to [0, 1], `(s - min) / (max - min)`.

    Torch-Pruning calls it "standarization", and adds 1e-8 to the divisor. In a global
    scope the least important channel of every group has score 0, and is removed first.

    Args:
      scores: `[*copies, size]` by name.
      per_copy: whether each copy has its own minimum and maximum.

    Returns:
      Scores of the same shapes; 0 where all are equal.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.channels.normalize_range({"up[1]": jnp.array([2.0, 3.0, 6.0])})
      {'up[1]': Array([0.  , 0.25, 1.  ], dtype=float32)}
    """

    def one(x: Array) -> Array:
        above = x - jnp.min(x, axis=-1, keepdims=True)
        return _ratio(above, jnp.max(above, axis=-1, keepdims=True))

    return _each(one, scores, per_copy)


def normalize_quantile(
    scores: Scores, *, q: float = 0.5, per_copy: bool = False
) -> dict[str, Array]:
    """Divide scores by `|s|_(floor(q n))`, the value at a quantile of their order.

    Torch-Pruning calls it "sentinel". Differs from it by the magnitude, without which
    scores of either sign could change their order. Where the score at that place is 0,
    the smallest score above it takes its place.

    Args:
      scores: `[*copies, size]` by name.
      q: which place among the n scores, from 0 (the least) to 1 (the largest).
      per_copy: whether each copy is divided by one of its own.

    Returns:
      Scores of the same shapes; those that are all 0 stay so.

    Raises:
      ValueError: `q` is not in [0, 1].
      TypeError: `q` is no number.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.channels.normalize_quantile({"up[1]": jnp.array([4.0, 1.0, 2.0])})
      {'up[1]': Array([2. , 0.5, 1. ], dtype=float32)}
    """
    _checks.check_number(least=0, most=1, q=q)

    def one(x: Array) -> Array:
        at = min(math.floor(q * x.shape[-1]), x.shape[-1] - 1)
        size = jnp.abs(x)
        some = jnp.where(size > 0, size, jnp.full_like(size, jnp.inf))
        least = jnp.min(some, axis=-1, keepdims=True)
        by = jnp.maximum(jnp.sort(size, axis=-1)[..., at : at + 1], least)
        return _ratio(x, by)

    return _each(one, scores, per_copy)


def standardize(scores: Scores, *, per_copy: bool = False) -> dict[str, Array]:
    """Standardize scores, `(s - mean) / std`, with the standard deviation over n - 1.

    Torch-Pruning calls it "gaussian"; FLAP (An et al. 2023, arXiv:2312.11983) does it
    before its global threshold.

    Args:
      scores: `[*copies, size]` by name.
      per_copy: whether each copy has its own mean and deviation.

    Returns:
      Scores of the same shapes; 0 where all are equal.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.channels.standardize({"up[1]": jnp.array([1.0, 2.0, 3.0])})
      {'up[1]': Array([-1.,  0.,  1.], dtype=float32)}
    """

    def one(x: Array) -> Array:
        apart = x - jnp.mean(x, axis=-1, keepdims=True)
        several = max(x.shape[-1] - 1, 1)
        variance = jnp.sum(apart * apart, axis=-1, keepdims=True) / several
        # What rounding leaves of equal scores is no deviation.
        equal = jnp.max(x, -1, keepdims=True) == jnp.min(x, -1, keepdims=True)
        return jnp.where(equal, jnp.zeros_like(x), _ratio(apart, jnp.sqrt(variance)))

    return _each(one, scores, per_copy)


def lamp(scores: Scores, *, per_copy: bool = False) -> dict[str, Array]:
    """Normalize scores by LAMP, `s_i / sum_{j: s_j >= s_i} s_j`.

    The score is a channel's share of what would be left if all channels below it were
    removed. The most important channel of every group has 1, so no group is emptied.
    Lee et al. (2021, arXiv:2010.07611) use squared magnitudes.

    Differs from Torch-Pruning, where the order among equal scores changes their sums;
    here equal scores stay equal.

    Args:
      scores: `[*copies, size]` by name, none of them negative.
      per_copy: whether each copy has sums of its own.

    Returns:
      Scores of the same shapes; those that are 0 stay so.

    Raises:
      ValueError: a negative score (in eager use).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.channels.lamp({"up[1]": jnp.array([1.0, 4.0, 3.0])})
      {'up[1]': Array([0.125     , 1.        , 0.42857143], dtype=float32)}
    """
    _check(scores)
    for name, x in scores.items():
        if _checks.is_concrete(x) and np.any((known := on_host(x)) < 0):
            raise ValueError(
                f"{name}: lamp needs scores of at least 0, the least is {known.min()}. "
                "normalize_range and standardize take scores of either sign."
            )

    rows = lambda x: jax.vmap(_lamp)(x.reshape(-1, x.shape[-1])).reshape(x.shape)
    return _each(functools.partial(sharded_like, rows), scores, per_copy)


def _lamp(x: Array) -> Array:
    ascending = jnp.sort(x)
    left = jnp.cumsum(ascending[::-1])[::-1]
    return _ratio(x, left[jnp.searchsorted(ascending, x, side="left")])


def per_parameter(
    groups: Mapping[str, Group], scores: Scores, params: PyTree, *, where: Where = None
) -> dict[str, Array]:
    """Divide scores by the number of weights of a channel.

    The score becomes the loss per saved weight, for groups that compete for parameters:
    a channel of a wide layer costs more than one of a narrow layer. It also turns the
    sum of `channel_scores` into a mean.

    Args:
      groups: from `js.coupling.groups`.
      scores: `[*copies, size]` by name.
      params: the parameters, or their shapes.
      where: which parameters count, see `jaxsparse.tree.select`; kernels by default,
        as for `channel_scores`.

    Returns:
      Scores of the same shapes. A channel without weights that count keeps its score.

    Raises:
      ValueError: scores of a group that is not prunable or has no weights; parameters
        that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.ones((3, 1))}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> scores = js.channels.channel_scores(groups, js.scores.magnitude(params))
      >>> js.channels.per_parameter(groups, scores, params)
      {'up[1]': Array([1., 1., 1.], dtype=float32)}
    """
    _checks.check_arrays(abstract=True, params=params)
    _check(scores)
    slices = slices_that_count(groups, params, where)
    shapes = {path: np.shape(x) for path, x in leaves_with_paths(params)}
    result = {}
    for name, x in scores.items():
        if name not in slices:
            raise ValueError(
                f"{name}: it has scores, but no prunable group of this name has "
                f"weights that `where` selects; these have: {list(slices)[:8]}."
            )
        count = np.zeros(math.prod(slices[name].shape), np.int64)
        for part in slices[name].parts:
            inside = part.labels[part.labels >= 0]
            each = math.prod(shapes[part.path]) // part.labels.size
            count += each * np.bincount(inside, minlength=count.size)
        if jnp.shape(x) != slices[name].shape:
            raise ValueError(
                f"{name}: scores of shape {jnp.shape(x)} for a group of "
                f"{slices[name].shape}."
            )
        count = np.maximum(count, 1).reshape(x.shape)
        result[name] = x / jnp.asarray(count, x.dtype)
    return result


def _check(scores: Any) -> None:
    _checks.check_mapping(made_by="js.channels.channel_scores(...)", scores=scores)
    for name, x in scores.items():
        _checks.check_arrays(**{f"scores[{name!r}]": x})


def _each(
    f: Callable[[Array], Array], scores: Scores, per_copy: bool
) -> dict[str, Array]:
    """`f` over the last axis: of each copy, or of all of them as one."""
    _check(scores)
    _checks.check_bool(per_copy=per_copy)

    def one(name: str, x: Array) -> Array:
        _checks.check_floating(name, x)
        wide = x.astype(wide_dtype(x.dtype))
        rows = wide if per_copy else wide.reshape(1, -1)
        return f(rows).reshape(x.shape)

    return {name: one(name, jnp.asarray(x)) for name, x in scores.items()}


def _ratio(x: Array, by: Array) -> Array:
    """`x / by`, and 0 where that is 0."""
    some = by > 0
    safe = jnp.where(some, by, jnp.ones_like(by))
    return jnp.where(some, x / safe, jnp.zeros_like(x))
