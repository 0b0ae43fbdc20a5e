"""The allocation that asks the loss: how much it changes when a block is shaken."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.allocations.blocks import (
    Blocks,
    Groups,
    fill,
    grouped,
    removed_in,
    spread_over,
    weights_in,
)
from jaxsparse.tree import keys_like, map_with_path


def ecoflap(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    key: Array,
    eps: float = 1e-3,
    most: float | None = None,
    groups: Groups = None,
    where: Where = None,
) -> PyTree:
    """Allocate by ECoFLaP: blocks that change the loss when perturbed stay dense.

    A block's importance is `|L(w + eps z) - L(w - eps z)| / (2 eps)` with normal z on
    its weights alone, averaged over batches: two evaluations a block, no gradients.
    Each block keeps `1 - most` of its weights; the rest of the total is distributed by
    importance. An evaluation holds one moved copy of the parameters. Sung et al. (2023,
    arXiv:2310.02998).

    Differs from the reference implementation, which draws one z for all batches, and
    whose last step may add weights where it should remove some: here the total is met.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`; compiled once for each function
        object and shape of a batch.
      params: a tree of arrays.
      batches: what `loss_fn` takes, at least one.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      key: a typed key, `jax.random.key(seed)`.
      eps: the length of a step, in units of the weights.
      most: the greatest sparsity of a block; `sparsity + 0.1` by default.
      groups: the block of a path; None for one block for each parameter.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      As for `owl`.

    Raises:
      ValueError: no batches, a loss that is no finite scalar, a `most` below the
        sparsity, an `eps` that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> loss_fn = lambda params, x: jnp.sum(params["a"] * x)
      >>> params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 10))}
      >>> js.allocations.ecoflap(
      ...     loss_fn, params, [jnp.ones((10, 10))], 0.5, key=jax.random.key(0))
      {'a': 0.4, 'b': 0.6}
    """
    _checks.check_callable(2, loss_fn=loss_fn)
    _checks.check_arrays(params=params)
    _checks.check_batches(batches)
    _checks.check_key(key)
    _checks.check_number(above=0, eps=eps)
    blocks = grouped(params, sparsity, where, groups)
    most = min(sparsity + 0.1, math.nextafter(1.0, 0.0)) if most is None else most
    _checks.check_sparsity(most, name="most")
    if most < sparsity:
        raise ValueError(f"most={most:g} is below the total sparsity {sparsity:g}.")
    found = _slopes(loss_fn, params, batches, blocks, key, eps)
    size = np.array([weights_in(leaves) for leaves in blocks.values()], float)
    total, slope = size.sum(), np.array(list(found.values()))
    # A block that changes nothing gets the rest when all others are dense.
    slope = slope / (slope.sum() or 1.0) + 1e-9 * size / total
    least = (1 - most) * size
    kept = fill(least, slope, least, size, total - removed_in(sparsity, blocks))
    removed = dict(zip(blocks, size - kept, strict=True))
    return spread_over(params, where, blocks, removed)


def _slopes(loss_fn, params, batches, blocks: Blocks, key, eps) -> dict[str, float]:
    """The mean change of the loss for each block."""
    changes: dict[str, list[float]] = {name: [] for name in blocks}
    for i, batch in enumerate(batches):
        for name, leaves in blocks.items():
            moved = {path for path, _ in leaves}
            step = map_with_path(
                lambda p, _, moved=moved: np.float32(eps * (p in moved)), params
            )
            noise = jax.random.fold_in(key, i)
            with _checks.explained("loss_fn", params=params, batch=batch):
                both = [
                    float(_loss(loss_fn, params, step, noise, s, batch))
                    for s in (np.float32(1), np.float32(-1))
                ]
            changes[name].append(abs(both[0] - both[1]) / (2 * eps))
            if not math.isfinite(changes[name][-1]):
                raise ValueError(f"The loss is not finite near {name!r}: {both}.")
    if not changes or not next(iter(changes.values())):
        raise ValueError("There are no batches. Was the iterator used up before?")
    return {name: float(np.mean(values)) for name, values in changes.items()}


@functools.partial(jax.jit, static_argnames="loss_fn")
def _loss(loss_fn, params, step, key, sign, batch) -> Array:
    # The steps are an argument, 0 for the other blocks: one compilation serves all.
    def move(w: Array, amount: Array, key: Array) -> Array:
        if not jnp.issubdtype(w.dtype, jnp.floating):
            return w
        start = as_wide(w)
        z = jax.random.normal(key, w.shape, start.dtype)
        return (start + (sign * amount).astype(start.dtype) * z).astype(w.dtype)

    loss = loss_fn(jax.tree.map(move, params, step, keys_like(key, params)), batch)
    if jnp.shape(loss) != ():
        raise ValueError(f"loss_fn must return a scalar, got {jnp.shape(loss)}.")
    return loss
