"""AutoFLIP: clients of a federation explore, and agree on what to prune."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._sharded import sharded_like
from jaxsparse._together import each
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.tree import leaves_with_paths, like, select


def guidance(params: PyTree, clients: Iterable[PyTree]) -> PyTree:
    """Score weights by how far clients move them while they explore.

    `mean_c (w_c - w)^2`: each client trains a copy of the common initial weights `w`
    for a few epochs on its own data, and the server averages the squared deviations.
    Weights that no client moves are not needed by any client. Interno et al. (2024,
    AutoFLIP, arXiv:2405.10271).

    Clients are read one after another into one sum. Where each client is a device of
    `jax.shard_map`, use `jax.lax.pmean` of the squares instead. The scores are used
    like any others: `guidance_masks` cuts them at a threshold, as the paper does, and
    `jaxsparse.patterns.masks` at a sparsity.

    Args:
      params: the common initial parameters.
      clients: each client's parameters after it has explored, trees like `params`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep.

    Raises:
      ValueError: no clients, parameters of another model, NaN in them (the message
        says which client).
      TypeError: `clients` that cannot be iterated over.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.array([[0.0, 1.0]])}
      >>> clients = [{"w": jnp.array([[2.0, 1.0]])}, {"w": jnp.array([[0.0, 2.0]])}]
      >>> js.contrib.guidance(params, clients)
      {'w': Array([[2. , 0.5]], dtype=float32)}
    """
    _checks.check_arrays(params=params)
    _checks.check_batches(clients, name="clients")
    leaves, treedef = jax.tree.flatten(params)
    total: list[Array] = []
    count = 0
    for client in clients:
        name = f"clients[{count}]"
        _checks.check_like(params, **{name: client})
        _checks.check_all_numbers(**{name: client})
        moved = each(_squared, jax.tree.leaves(client), leaves)
        total = each(jnp.add, total, moved) if count else moved
        count += 1
    if not count:
        raise ValueError("clients: there is none, so nobody has explored.")
    return treedef.unflatten([x / count for x in total])


def _squared(w: Array, before: Array) -> Array:
    return (as_wide(w) - as_wide(before)) ** 2


def guidance_masks(
    scores: PyTree,
    *,
    threshold: float,
    axis: int | None = None,
    where: Where = None,
) -> PyTree:
    """Keep the scores above a fraction of the largest one in each parameter.

    A weight is kept where `score >= threshold * max(score)`, over its parameter; with
    an `axis` a unit is kept by the sum of its scores, against the largest sum. Each
    parameter thus keeps at least one unit, and a parameter that no client moved (all
    scores 0) keeps all. All clients share the masks in all rounds, with
    `js.keep_sparse(masks)`.

    The paper binarizes its guidance matrix by a threshold; we read it as relative to
    the maximum of each parameter. The sparsity follows from the scores; for a given
    sparsity use `jaxsparse.patterns.masks`.

    Args:
      scores: what `guidance` returned.
      threshold: in [0, 1].
      axis: the axis of units that are kept or removed together, such as -1 for the
        outputs of a kernel `(in, out)`; None for single weights.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      A tree of bools, True = kept; scalars where a parameter takes no part.

    Raises:
      ValueError: a threshold out of range, an axis that a parameter does not have,
        negative scores or NaN (in eager use).
      TypeError: scores that are not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> scores = {"kernel": jnp.array([[2.0, 0.5], [0.0, 1.0]])}
      >>> masks = js.contrib.guidance_masks(scores, threshold=0.5)
      >>> masks["kernel"].tolist()
      [[True, False], [False, True]]
      >>> masks = js.contrib.guidance_masks(scores, threshold=0.8, axis=-1)
      >>> masks["kernel"].tolist()
      [[True, False]]
    """
    _checks.check_arrays(scores=scores)
    _checks.check_number(least=0, most=1, threshold=threshold)
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise TypeError(f"axis must be an integer or None, got {_checks.shown(axis)}.")
    _checks.check_all_numbers(scores=scores)
    selected = jax.tree.leaves(like(select(scores, where), scores, name="where"))
    found = []
    for (path, score), take in zip(leaves_with_paths(scores), selected, strict=True):
        if not take:
            found.append(jnp.ones((), bool))
            continue
        _checks.check_floating(path, score)
        if axis is not None and not -score.ndim <= axis < score.ndim:
            raise ValueError(
                f"{path}: there is no axis {axis} in the shape {tuple(score.shape)}. "
                "Leave it out with `where`."
            )
        if _checks.is_concrete(score) and bool(jnp.any(score < 0)):
            raise ValueError(
                f"{path}: scores are squared deviations, 0 or more; some are negative."
            )
        cut = functools.partial(_cut, threshold=threshold, axis=axis)
        found.append(sharded_like(cut, score))
    return jax.tree.unflatten(jax.tree.structure(scores), found)


def _cut(score: Array, threshold: float, axis: int | None) -> Array:
    if axis is not None:
        others = tuple(a for a in range(score.ndim) if a != axis % score.ndim)
        score = jnp.sum(score, axis=others, keepdims=True)
    return score >= threshold * jnp.max(score)
