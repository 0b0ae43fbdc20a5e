"""PST: updates of low rank, and masks by scores of low rank."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array, PyTree, Sparsity, Tree, Where
from jaxsparse.masking._scores import masked_by_scores
from jaxsparse.tree import (
    AxesRule,
    keys_like,
    leaves_with_paths,
    map_with_path,
    select,
)


class LowRank(NamedTuple):
    """The low-rank factors that PST learns for one kernel `[d_in, d_out]`.

    Attributes:
      update: `U, V`, `[d_in, r]` and `[r, d_out]`, of the weights.
      score: `A, B`, likewise, of the scores.
      row: `R`, `[d_in]`, a term that all scores of an input share.
      column: `C`, `[d_out]`, a term that all scores of an output share.
    """

    update: tuple[Array, Array]
    score: tuple[Array, Array]
    row: Array
    column: Array


def init_low_rank(
    params: PyTree, *, key: Array, rank: int = 8, where: Where = None
) -> PyTree:
    """Draw the factors that parameter-efficient sparse training learns.

    `U` and `A` are normal numbers of deviation `1 / rank`, all others 0, so that the
    first masks keep the largest magnitudes.

    Args:
      params: the parameters; matrices among the selected ones take part.
      key: a typed key.
      rank: the rank of the updates and of the scores.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      A tree with the structure of `params`: a `LowRank` for each kernel, None for
      parameters that take no part.

    Raises:
      ValueError: a selected parameter that is no matrix, `rank < 1`.
      TypeError: a `key` that is not a random key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> factors = js.masking.init_low_rank(
      ...     {"kernel": jnp.ones((6, 4))}, key=jax.random.key(0), rank=2)
      >>> factors["kernel"].update[0].shape, factors["kernel"].column.shape
      ((6, 2), (4,))
    """
    _checks.check_arrays(params=params)
    _checks.check_key(key)
    _checks.check_positive_int(rank, name="rank")
    taken = select(params, where)

    def make(path: str, w: Array, take: bool, key: Array) -> LowRank | None:
        if not take:
            return None
        if w.ndim != 2:
            raise ValueError(
                f"{path}: low rank is of matrices; got shape {w.shape}. Leave it out "
                "with `where`."
            )
        d_in, d_out = w.shape
        first, second = jax.random.split(key)
        draw = lambda key: jax.random.normal(key, (d_in, rank), w.dtype) / rank
        zeros = jnp.zeros((rank, d_out), w.dtype)
        return LowRank(
            (draw(first), zeros),
            (draw(second), zeros),
            jnp.zeros(d_in, w.dtype),
            jnp.zeros(d_out, w.dtype),
        )

    return map_with_path(make, params, taken, keys_like(key, params))


def masked_by_low_rank(
    params: Tree,
    factors: PyTree,
    sparsity: Sparsity = None,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    axes: AxesRule = None,
) -> Tree:
    """Return frozen parameters with updates and masks of low rank.

    `W = W0 + U V`, under the mask of the largest `|W| + A B + R 1^T + 1 C^T`. Weights
    and masks are trained by `(d_in + d_out) (2 r + 1)` numbers a kernel, straight
    through the mask as in `masked_by_scores`. Li et al. (2022, PST, arXiv:2205.11005)::

        loss_fn = lambda factors, batch: task_loss(
            js.masking.masked_by_low_rank(params, factors, schedule(step)), batch)

    Differs from the reference implementation, which has factors before each term, all
    1 in its experiments.

    Args:
      params: the frozen parameters.
      factors: by their paths, as `init_low_rank` makes.
      sparsity: the fraction to remove, possibly traced, as for
        `jaxsparse.patterns.masks`.
      pattern: which weights are removed together, and which compete.
      axes: as for `jaxsparse.patterns.masks`.

    Returns:
      Parameters of the same structure, exactly 0 where pruned.

    Raises:
      ValueError: factors that do not fit their parameter, or as for
        `jaxsparse.patterns.masks`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 4.0]])}
      >>> factors = js.masking.init_low_rank(params, key=jax.random.key(0), rank=1)
      >>> js.masking.masked_by_low_rank(params, factors, 0.5)["kernel"].tolist()
      [[3.0, 0.0], [0.0, 4.0]]
    """
    _checks.check_arrays(params=params, factors=factors)
    named, owners = _by_path(factors), dict(leaves_with_paths(params))
    for path, own in named.items():
        _check_fits(path, own, owners.get(path))

    def moved(path: str, w: Array) -> Array:
        if path not in named:
            return w
        u, v = named[path].update
        return jax.lax.stop_gradient(w) + u @ v

    def scored(path: str, w: Array) -> Array | None:
        if path not in named:
            return None
        own = named[path]
        a, b = own.score
        return jnp.abs(w) + a @ b + own.row[:, None] + own.column[None]

    whole = map_with_path(moved, params)
    scores = map_with_path(scored, whole)
    return masked_by_scores(whole, scores, sparsity, pattern=pattern, axes=axes)


def _by_path(factors: PyTree) -> dict[str, LowRank]:
    """The `LowRank` of each parameter that has one."""
    is_own = lambda x: isinstance(x, LowRank)
    leaves, treedef = jax.tree.flatten(factors, is_leaf=is_own)
    numbers = treedef.unflatten(range(len(leaves)))
    return {path: leaves[i] for path, i in leaves_with_paths(numbers)}


def _check_fits(path: str, own: LowRank, w: Array | None) -> None:
    if w is None:
        raise ValueError(
            f"factors: {path} is no parameter. js.masking.init_low_rank(params, ...) "
            "makes factors for these parameters."
        )
    shapes = jax.tree.map(jnp.shape, (own.update, own.score))
    for left, right in shapes:
        if (left[0], right[1]) != w.shape or left[1] != right[0]:
            raise ValueError(
                f"factors: {path} has factors of shapes {left} and {right}, which do "
                f"not fit a parameter of shape {w.shape}."
            )
