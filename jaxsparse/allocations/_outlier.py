"""Allocations by blocks: each block of parameters shares one sparsity."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.allocations._blocks import (
    Blocks,
    Groups,
    by_shift,
    fill,
    grouped,
    removed_in,
    spread_over,
    weights_in,
)
from jaxsparse.patterns._counts import count_dtype
from jaxsparse.tree import keys_like, map_with_path


def owl(
    scores: PyTree,
    sparsity: float,
    *,
    groups: Groups = None,
    outlier: float = 5.0,
    spread: float = 0.08,
    where: Where = None,
) -> PyTree:
    """OWL: the more outliers a block has, the denser it stays.

    `D_l` is the share of a block's scores above `outlier` times their mean. Densities
    are `2 * spread * (D_l - min D) / (max D - min D)` and a constant, such that the
    total is met. Yin et al. (2023, arXiv:2310.05175), with Wanda's scores of the dense
    model.

    Differs from the reference implementation, which takes the mean over blocks and not
    over weights, so that blocks of unequal size miss the total; which divides 0 by 0
    where all `D_l` are equal (here that is uniform), and which may leave [0, 1] (here
    such blocks stop there and the others make up for it).

    Args:
      scores: a tree of arrays, larger = keep, none negative.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      groups: the block of a path, as `lambda path: path.split("/")[0]`; None for one
        block for each parameter.
      outlier: how many times the mean an outlier is.
      spread: densities lie within `2 * spread`. Above `1 - sparsity` a block may lose
        everything.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      A tree of Python floats in [0, 1) with the structure of `scores`, 0.0 where not
      selected. Each is a whole number of weights, and they add up to
      `floor(sparsity * n + 1/2)`; so those of a block agree to one weight. (It reads
      values, so it cannot run under jit.)

    Raises:
      ValueError: a sparsity outside [0, 1), an `outlier` or a `spread` that is not
        positive, scores with NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> flat, peaked = jnp.ones((10, 10)), jnp.ones((10, 10)).at[0].set(100.0)
      >>> js.allocations.owl({"a": flat, "b": peaked}, 0.5)
      {'a': 0.58, 'b': 0.42}
    """
    _check_positive(outlier=outlier, spread=spread)
    blocks = grouped(scores, sparsity, where, groups)
    _check_scores(blocks)
    shares = {name: _outliers(leaves, outlier) for name, leaves in blocks.items()}
    wanted = {name: -2 * spread * d for name, d in _min_max(shares).items()}
    return by_shift(scores, sparsity, where, blocks, wanted)


def dsa(
    scores: PyTree,
    sparsity: float,
    *,
    groups: Groups = None,
    spread: float = 0.07,
    where: Where = None,
) -> PyTree:
    """DSA's found function: blocks whose scores spread over more decades get sparser.

    `I_l = asin(atan(Var[log score]))`, the best of a search over such formulas; then
    sparsities are `2 * spread * (I_l - min I) / (max I - min I)` and a constant, such
    that the total is met. Li et al. (2024), "Discovering Sparsity Allocation for
    Layer-wise Pruning of Large Language Models", with Wanda's scores of the dense
    model.

    Differs from the reference implementation: scores of 0 are left out and not taken
    for 1; where `atan` exceeds 1 it counts as 1, where there the importance is NaN and
    then 0; and `spread` is what it says, where there a random number from 0.07 to 0.1
    replaces it.

    Args:
      scores: a tree of arrays, larger = keep, none negative.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      groups: the block of a path; None for one block for each parameter.
      spread: sparsities lie within `2 * spread`.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      As for `owl`.

    Raises:
      ValueError: as for `owl`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> narrow = jnp.linspace(1.0, 1.1, 100).reshape(10, 10)
      >>> js.allocations.dsa({"a": narrow, "b": narrow**9}, 0.5)
      {'a': 0.43, 'b': 0.57}
    """
    _check_positive(spread=spread)
    blocks = grouped(scores, sparsity, where, groups)
    _check_scores(blocks)
    found = {name: _log_variance(leaves) for name, leaves in blocks.items()}
    found = {k: math.asin(min(math.atan(v), 1.0)) for k, v in found.items()}
    wanted = {name: 2 * spread * d for name, d in _min_max(found).items()}
    return by_shift(scores, sparsity, where, blocks, wanted)


def als(
    params: PyTree,
    redundancy: Mapping[str, float],
    sparsity: float,
    *,
    lower: float,
    upper: float,
    groups: Groups = None,
    where: Where = None,
) -> PyTree:
    """ALS: the linear programme that removes most where layers are redundant.

    Maximises `sum_l redundancy_l * n_l * s_l` over sparsities in `[lower, upper]` with
    the total met. It has one equation, so it is solved by going through the blocks from
    the most redundant on; equally redundant ones share. After Li et al. (2024),
    "Adaptive Layer Sparsity for Large Language Models via Activation Correlation
    Assessment", where the redundancy of a layer comes from the correlation of its
    activations with those of other layers. No implementation was there to compare with.

    Args:
      params: the parameters; only their shapes are looked at.
      redundancy: a number for each block, by its name; by path without `groups`.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      lower: the least sparsity of a block.
      upper: the greatest, below 1.
      groups: the block of a path; None for one block for each parameter.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      As for `owl`; a bound may be passed by part of a weight.

    Raises:
      ValueError: a block without redundancy, one that is not finite, or bounds that the
        total does not lie between.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {k: jnp.ones((10, 10)) for k in "abc"}
      >>> redundancy = {"a": 0.9, "b": 0.1, "c": 0.5}
      >>> js.allocations.als(params, redundancy, 0.5, lower=0.3, upper=0.75)
      {'a': 0.75, 'b': 0.3, 'c': 0.45}
    """
    blocks = grouped(params, sparsity, where, groups)
    _checks.check_sparsity(lower, name="lower")
    _checks.check_sparsity(upper, name="upper")
    if not lower <= sparsity <= upper:
        raise ValueError(
            f"A total sparsity of {sparsity:g} does not lie between the bounds "
            f"lower={lower:g} and upper={upper:g}."
        )
    missing = [name for name in blocks if name not in redundancy]
    if missing:
        raise ValueError(
            f"redundancy: nothing for the blocks {missing[:4]}; there are "
            f"{list(redundancy)[:4]}."
        )
    worth = {name: float(redundancy[name]) for name in blocks}
    if not all(map(math.isfinite, worth.values())):
        raise ValueError(f"redundancy must be finite numbers, got {worth}.")
    size = {name: weights_in(leaves) for name, leaves in blocks.items()}
    found = {name: lower * n for name, n in size.items()}
    left = removed_in(sparsity, blocks) - sum(found.values())
    for value in sorted(set(worth.values()), reverse=True):
        equal = [name for name in blocks if worth[name] == value]
        room = sum((upper - lower) * size[name] for name in equal)
        share = min(1.0, max(0.0, left / room)) if room > 0 else 0.0
        for name in equal:
            found[name] += share * (upper - lower) * size[name]
        left -= share * room
    return spread_over(params, where, blocks, found)


def arithmetic_progression(
    params: PyTree,
    sparsity: float,
    *,
    difference: float,
    groups: Groups = None,
    where: Where = None,
) -> PyTree:
    """Sparsities that grow from block to block by one common difference.

    `s_i = s_0 + i * difference`, with `s_0` such that the total is met: errors of the
    first blocks grow on their way through the others, so these stay denser. Huang et
    al. (2025, arXiv:2502.14770), who try a few differences.

    The blocks are taken in the natural order of their names: `block_2` comes before
    `block_10`, wherever it stands in the tree.

    Args:
      params: the parameters; only their shapes are looked at.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      difference: from a block to the next; negative for sparser first blocks. A block
        that would leave [0, 1] stops there, and the others make up for it.
      groups: the block of a path; None for one block for each parameter.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      As for `owl`.

    Raises:
      ValueError: a sparsity outside [0, 1), or a difference that is not in (-1, 1).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {f"block_{i}": jnp.ones((10, 10)) for i in (2, 10, 1)}
      >>> js.allocations.arithmetic_progression(params, 0.5, difference=0.1)
      {'block_1': 0.4, 'block_10': 0.6, 'block_2': 0.5}
    """
    if not -1 < difference < 1:
        raise ValueError(f"difference must lie in (-1, 1), got {difference!r}.")
    blocks = grouped(params, sparsity, where, groups)
    wanted = {k: i * difference for i, k in enumerate(sorted(blocks, key=_natural))}
    return by_shift(params, sparsity, where, blocks, wanted)


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
    """ECoFLaP: density by how much the loss changes along one random direction.

    A block's importance is `|L(w + eps z) - L(w - eps z)| / (2 eps)` with normal z on
    its weights alone, averaged over batches: two evaluations a block, no gradients.
    Each block keeps `1 - most` of its weights; what is left of the total is shared out
    by importance. An evaluation holds one moved copy of the parameters. Sung et al.
    (2023, arXiv:2310.02998).

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
    _check_positive(eps=eps)
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


def _min_max(values: dict[str, float]) -> dict[str, float]:
    low, high = min(values.values()), max(values.values())
    if not high > low:
        return dict.fromkeys(values, 0.0)
    return {name: (v - low) / (high - low) for name, v in values.items()}


def _outliers(leaves: list[tuple[str, Any]], times: float) -> float:
    n = weights_in(leaves)
    mean = sum(float(_sum(x)) for _, x in leaves) / n
    return sum(int(_above(x, times * mean)) for _, x in leaves) / n


def _wide(x: Array) -> Array:
    return x if x.dtype.itemsize > 4 else x.astype(jnp.float32)


@jax.jit
def _sum(x: Array) -> Array:
    return jnp.sum(_wide(x))


@jax.jit
def _above(x: Array, threshold: float) -> Array:
    wide = _wide(x)
    return jnp.sum(wide > threshold, dtype=count_dtype(x.size))


def _log_variance(leaves: list[tuple[str, Any]]) -> float:
    parts = [[float(v) for v in _log_moments(x)] for _, x in leaves]
    n = sum(p[0] for p in parts)
    if n < 2:
        return 0.0
    mean = sum(p[0] * p[1] for p in parts) / n
    return sum(p[2] + p[0] * (p[1] - mean) ** 2 for p in parts) / (n - 1)


@jax.jit
def _log_moments(x: Array) -> tuple[Array, Array, Array]:
    wide = _wide(x)
    there = wide > 0
    log = jnp.log(jnp.where(there, wide, 1))
    n = jnp.sum(there, dtype=log.dtype)
    mean = jnp.sum(log) / jnp.maximum(n, 1)
    apart = jnp.where(there, log - mean, 0)
    return n, mean, jnp.sum(jnp.square(apart))


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
        wide = _wide(w)
        z = jax.random.normal(key, w.shape, wide.dtype)
        return (wide + (sign * amount).astype(wide.dtype) * z).astype(w.dtype)

    loss = loss_fn(jax.tree.map(move, params, step, keys_like(key, params)), batch)
    if jnp.shape(loss) != ():
        raise ValueError(f"loss_fn must return a scalar, got {jnp.shape(loss)}.")
    return loss


def _natural(name: str) -> list[Any]:
    """Numbers in a name as numbers; text and numbers alternate."""
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", name))]


def _check_scores(blocks: Blocks) -> None:
    for leaves in blocks.values():
        for path, x in leaves:
            _checks.check_floating(path, x)
            _checks.check_no_nan(path, x)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}.")
