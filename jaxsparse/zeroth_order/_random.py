"""Gradients along random directions, and GraSP from them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, patterns
from jaxsparse._dtypes import as_wide, widest
from jaxsparse._sharded import laid_out_like
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import keys_like
from jaxsparse.zeroth_order._coordinates import check_floats
from jaxsparse.zeroth_order._tails import widened


def random_grads(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Any,
    *,
    key: Array,
    count: int,
    mu: float = 5e-3,
    chunk: int = 8,
    masks: PyTree = None,
) -> PyTree:
    """Estimate a gradient from values of the loss, along random directions.

    `g = (d / q) sum_j (L(w + mu u_j) - L(w)) / mu * u_j` for `q = count` directions
    `u_j`, uniform on the unit sphere over all `d` weights that the masks keep. Its mean
    is the gradient of the loss smoothed over a ball of radius `mu` (Flaxman et al.,
    2005), so the estimate is unbiased up to `O(mu^2)`; its relative error is about
    `sqrt(d / q)`. It evaluates `q + 1` losses and draws directions as needed. Jit it,
    or its loop is compiled in each call.

    Differs from the reference implementation of DeepZero (Chen et al., 2024,
    arXiv:2310.02025), which normalizes the direction in each tensor separately and
    multiplies the estimate by a further `mu` instead of `d`. Its result is a multiple
    of a gradient, with another factor in each layer.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, called as by `coordinate_grads`.
      params: a tree of floating-point arrays.
      batch: the batch for `loss_fn`.
      key: a typed key, `jax.random.key(seed)`.
      count: how many directions, q.
      mu: the length of a step, above 0, whatever the number of weights.
      chunk: how many losses are computed at once, each with a copy of the parameters.
      masks: a tree of bools; weights under False are not moved, and their gradient is
        0. None for all.

    Returns:
      A tree of arrays like `params`.

    Raises:
      ValueError: a `mu`, `count` or `chunk` out of range, masks of another structure, a
        loss that is no scalar.
      TypeError: a key that is not a random key, parameters that are not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> loss_fn = lambda params, x: jnp.sum(params["w"] * x)
      >>> params, x = {"w": jnp.zeros(2)}, jnp.array([2.0, -1.0])
      >>> grads = js.zeroth_order.random_grads(
      ...     loss_fn, params, x, key=jax.random.key(0), count=4096)
      >>> bool(jnp.all(jnp.abs(grads["w"] - x) < 0.2))
      True
    """
    _check(loss_fn, params, key, count, mu, chunk)
    masks = _full(masks, params)
    wide, batch = widened((params, batch))
    loss = _scalar_loss(loss_fn, wide, batch)
    here = loss(wide)
    size = sum(
        patterns.kept_count(m, w.shape).astype(here.dtype)
        for m, w in zip(jax.tree.leaves(masks), jax.tree.leaves(wide), strict=True)
    )
    slope = lambda u: (loss(_along(wide, u, mu)) - here) / mu

    def some(keys: Array, weights: Array) -> PyTree:
        units = jax.vmap(lambda k: _unit(k, wide, masks))(keys)
        slopes = jax.vmap(slope)(units) * weights
        return jax.tree.map(
            lambda u: jnp.tensordot(slopes.astype(u.dtype), u, axes=1), units
        )

    def turn(total: PyTree, now: tuple[Array, Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, some(*now)), None

    chunk = min(chunk, count)
    turns = -(-count // chunk)
    keys = jax.random.split(key, turns * chunk).reshape(turns, chunk)
    # The last turn may have directions too many: they weigh nothing.
    weights = (jnp.arange(turns * chunk) < count).reshape(turns, chunk)
    weights = weights.astype(here.dtype)
    total, _ = lax.scan(turn, jax.tree.map(jnp.zeros_like, wide), (keys, weights))
    factor = jnp.asarray(size, here.dtype) / count
    scaled = lambda w, x: (x * factor.astype(x.dtype)).astype(w.dtype)
    return jax.tree.map(lambda w, x: laid_out_like(scaled(w, x), w), params, total)


def grasp(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Any,
    *,
    key: Array,
    count: int,
    mu: float = 5e-3,
    chunk: int = 8,
) -> PyTree:
    """Score weights by `w * (H g)` from values of the loss (ZO-GraSP).

    This is GraSP (see `jaxsparse.scores.grasp`) with both gradients estimated along the
    same random directions, `g_0 = g(w)` and `g_1 = g(w + mu v)` with `v = g_0 / |g_0|`;
    then `H g = |g_0| (g_1 - g_0) / mu`. DeepZero (Chen et al., 2024, arXiv:2310.02025)
    computes it once, from 192 directions, only to find the sparsities of the layers,
    because single scores are noise where weights outnumber directions. It evaluates
    `2 (count + 1)` losses; jit it. A second difference divides by `mu` twice: where the
    loss is in float32, take a larger `mu` than for gradients.

    Differs from the reference implementation, which ranks by the magnitude of the
    scores: for that use `jax.tree.map(jnp.abs, scores)`. See also `random_grads`.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, called as by `coordinate_grads`.
      params: a tree of floating-point arrays.
      batch: the batch for `loss_fn`.
      key: a typed key, `jax.random.key(seed)`.
      count: how many directions.
      mu: the length of a step, above 0.
      chunk: how many losses are computed at once.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, of either sign, larger =
      keep. `jaxsparse.allocations.from_global_scores` turns them into sparsities.

    Raises:
      ValueError: as for `random_grads`.
      TypeError: a key that is not a random key, parameters that are not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> loss_fn = lambda params, x: jnp.sum((params["w"] * x) ** 2) / 2
      >>> scores = js.zeroth_order.grasp(
      ...     loss_fn, {"w": jnp.array([1.0, 2.0])}, jnp.array([1.0, 2.0]),
      ...     key=jax.random.key(0), count=512, mu=0.1)
      >>> bool(scores["w"][1] > scores["w"][0])     # 64 and 1, up to chance
      True
    """
    _check(loss_fn, params, key, count, mu, chunk)
    wide, batch = widened((params, batch))
    options = {"key": key, "count": count, "mu": mu, "chunk": chunk}
    here = random_grads(loss_fn, wide, batch, **options)
    length = _length(here)
    # At a gradient of 0 there is no direction, and H g is 0.
    part = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    moved = _along(wide, jax.tree.map(lambda g: g * part.astype(g.dtype), here), mu)
    there = random_grads(loss_fn, moved, batch, **options)

    def score(w: Array, g0: Array, g1: Array) -> Array:
        return w * (g1 - g0) * (length / mu).astype(w.dtype)

    return jax.tree.map(score, wide, here, there)


def _scalar_loss(
    loss_fn: Callable[[PyTree, Any], Array], params: PyTree, batch: Any
) -> Callable[[PyTree], Array]:
    with _checks.explained("loss_fn", params=params, batch=batch):
        found = jax.eval_shape(loss_fn, params, batch)
    if getattr(found, "shape", None) != ():
        raise ValueError(f"loss_fn must return one scalar, got {_checks.shown(found)}.")
    return lambda params: loss_fn(params, batch)


def _full(masks: PyTree, params: PyTree) -> PyTree:
    if masks is None:
        return jax.tree.map(lambda _: jnp.ones((), bool), params)
    patterns.check_masks(masks, params)
    return masks


def _unit(key: Array, params: PyTree, masks: PyTree) -> PyTree:
    """A random direction of length 1, 0 where the masks are False."""
    draw = lambda k, w, m: jnp.where(m, jax.random.normal(k, w.shape, w.dtype), 0)
    drawn = jax.tree.map(draw, keys_like(key, params), params, masks)
    length = _length(drawn)
    return jax.tree.map(lambda u: (u / length).astype(u.dtype), drawn)


def _length(tree: PyTree) -> Array:
    leaves = jax.tree.leaves(tree)
    dtype = widest(leaves)
    return jnp.sqrt(sum(jnp.sum(as_wide(x) ** 2).astype(dtype) for x in leaves))


def _along(params: PyTree, direction: PyTree, mu: Any) -> PyTree:
    return jax.tree.map(lambda w, u: w + mu * u, params, direction)


def _check(
    loss_fn: Any, params: PyTree, key: Any, count: Any, mu: Any, chunk: Any
) -> None:
    _checks.check_callable(2, loss_fn=loss_fn)
    check_floats(params)
    _checks.check_key(key)
    _checks.check_positive_int(count, name="count")
    _checks.check_positive_int(chunk, name="chunk")
    _checks.check_number(above=0, mu=mu)
