"""Gradients one coordinate at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._sharded import laid_out_like, sharded_like
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import leaves_with_paths, like
from jaxsparse.zeroth_order._tails import evaluate, tail, widened


def coordinate_grads(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Any,
    *,
    indices: PyTree = None,
    mu: float = 5e-3,
    chunk: int = 32,
) -> PyTree:
    """Estimate a gradient from values of the loss, one coordinate at a time.

    `g_i = (L(w + mu e_i) - L(w)) / mu` for the listed coordinates, 0 for all others;
    the error is `mu H_ii / 2` to first order. This is the estimate of DeepZero (Chen et
    al., 2024, arXiv:2310.02025), for losses without a derivative.

    The loss is traced once. For each parameter only the part of the program that
    depends on it runs again, `chunk` perturbed copies at a time. The layers before it
    are computed once, which halves the work on average (DeepZero's feature reuse, here
    derived from the program of any model). A scan over layers is one part. Memory holds
    the values of one forward pass, and `chunk` copies of the largest parameter and of
    the values computed from it. Each parameter's part is compiled as a separate loop,
    so jit the whole call.

    DeepZero trains with the gradients of a random subset of the weights. The subset is
    drawn anew in each interval, with the layer densities that `grasp` found once; the
    weights themselves stay dense::

        scores = js.zeroth_order.grasp(loss_fn, params, batch, key=key, count=192)
        sparsities = js.allocations.from_global_scores(scores, 0.9)
        ...
        draws = js.scores.random(params, key=jax.random.fold_in(key, interval))
        indices = js.patterns.indices(js.patterns.masks(draws, sparsities), params)
        grads = estimate(params, batch, indices)     # jitted; counts never change

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`. Numbers of less than 32 bits are
        passed as float32, because narrower types would lose small differences.
      params: a tree of floating-point arrays.
      batch: the batch for `loss_fn`.
      indices: a tree like `params` of vectors of distinct flat indices, such as
        `jaxsparse.patterns.indices(masks, params)`; None for all coordinates.
      mu: the length of a step, above 0. A gradient is NaN where adding `mu` does not
        change the weight.
      chunk: how many losses are computed at once.

    Returns:
      A tree of arrays like `params`.

    Raises:
      ValueError: a `mu` or `chunk` out of range, indices of another structure or out of
        range (in eager use; under jit they are ignored), a loss that is no scalar.
      TypeError: indices or parameters of another type.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> loss_fn = lambda params, x: jnp.sum(params["w"] * x)
      >>> params, x = {"w": jnp.array([1.0, 2.0, 3.0])}, jnp.array([2.0, -1.0, 4.0])
      >>> grads = js.zeroth_order.coordinate_grads(
      ...     loss_fn, params, x, indices={"w": jnp.array([0, 2])}, mu=2**-8)
      >>> grads
      {'w': Array([2., 0., 4.], dtype=float32)}
    """
    _checks.check_callable(2, loss_fn=loss_fn)
    check_floats(params)
    _checks.check_number(above=0, mu=mu)
    _checks.check_positive_int(chunk, name="chunk")
    listed = _listed(indices, params)
    wide, batch = widened((params, batch))
    at = evaluate(loss_fn, wide, batch)
    leaves, treedef = jax.tree.flatten(wide)
    found = [
        _grads_of(tail(at, i), w, at.loss, index, mu, chunk)
        for i, (w, index) in enumerate(zip(leaves, listed, strict=True))
    ]
    back = lambda w, g: laid_out_like(g.astype(w.dtype), w)
    return jax.tree.map(back, params, treedef.unflatten(found))


def _grads_of(
    loss_of: Callable[[Array], Array],
    w: Array,
    loss: Array,
    index: Array,
    mu: float,
    chunk: int,
) -> Array:
    """The gradient of one parameter, 0 where no index is."""
    if not index.size:
        return jnp.zeros_like(w)

    def one(i: Array) -> Array:
        moved = w + jnp.where(_is_at(i, w.shape), mu, 0).astype(w.dtype)
        # The step that was really taken: it is rounded, as the weight is.
        return (loss_of(moved) - loss) / jnp.sum(moved - w)

    def put(w: Array, index: Array, values: Array) -> Array:
        place = jnp.unravel_index(index, w.shape)
        return jnp.zeros_like(w).at[place].set(values, mode="drop")

    values = lax.map(one, index, batch_size=min(chunk, index.size))
    return sharded_like(put, w, index, values.astype(w.dtype))


def _is_at(index: Array, shape: tuple[int, ...]) -> Array:
    """Where a flat index is: a scatter would ask how a sharded array lies."""
    found = jnp.ones(shape, bool)
    for axis, place in enumerate(jnp.unravel_index(index, shape)):
        found &= lax.broadcasted_iota(jnp.int32, shape, axis) == place
    return found


def _listed(indices: PyTree, params: PyTree) -> list[Array]:
    """Flat indices for each parameter."""
    named = leaves_with_paths(params)
    if indices is None:
        return [jnp.arange(w.size, dtype=jnp.int32) for _, w in named]
    _checks.check_arrays(indices=indices)
    given = jax.tree.leaves(like(indices, params, name="indices"))
    for (path, w), index in zip(named, given, strict=True):
        if not jnp.issubdtype(index.dtype, jnp.integer) or jnp.ndim(index) != 1:
            raise TypeError(
                f"{path}: indices must be vectors of integers, as js.patterns.indices "
                f"makes them of masks; got {_checks.shown(index)}."
            )
        if not index.size or not _checks.is_concrete(index):
            continue
        least, most = (int(f(jax.device_get(index))) for f in (min, max))
        if least < 0 or most >= w.size:
            raise ValueError(
                f"{path}: indices reach from {least} to {most}, and the parameter has "
                f"{w.size} weights. Were they made for another model?"
            )
    return [jnp.asarray(index, jnp.int32) for index in given]


def check_floats(params: PyTree) -> None:
    """Raises unless each parameter can be moved a little."""
    _checks.check_arrays(params=params)
    for path, w in leaves_with_paths(params):
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(
                f"{path or 'params'}: params must be floating-point arrays, got "
                f"{w.dtype}. Hand others to loss_fn in the batch."
            )
