"""Allocations by blocks: each block of parameters shares one sparsity."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide, count_dtype
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.allocations.blocks import Blocks, Groups, by_shift, grouped, weights_in


def owl(
    scores: PyTree,
    sparsity: float,
    *,
    groups: Groups = None,
    outlier: float = 5.0,
    spread: float = 0.08,
    where: Where = None,
) -> PyTree:
    """Allocate by OWL: the more outliers a block has, the denser it stays.

    `D_l` is the share of a block's scores above `outlier` times their mean. Densities
    are `2 * spread * (D_l - min D) / (max D - min D)` and a constant, such that the
    total is met. Yin et al. (2023, arXiv:2310.05175), with Wanda's scores of the dense
    model.

    Differs from the reference implementation, which takes the mean over blocks instead
    of weights, so that blocks of unequal size miss the total. The reference divides 0
    by 0 where all `D_l` are equal (here that is uniform), and may leave [0, 1] (here
    such blocks stop at the limit and the others compensate).

    Args:
      scores: a tree of arrays, larger = keep, none negative.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      groups: the block of a path, as `lambda path: path.split("/")[0]`; None for one
        block for each parameter.
      outlier: a score above `outlier` times the mean is an outlier.
      spread: densities lie within `2 * spread`. Above `1 - sparsity` a block may lose
        everything.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      A tree of Python floats in [0, 1) with the structure of `scores`, 0.0 where not
      selected. Each is a whole number of weights, and they add up to `floor(sparsity *
      n + 1/2)`; so the sparsities of a block agree to one weight. (It reads values, so
      it cannot run under jit.)

    Raises:
      ValueError: a sparsity outside [0, 1), an `outlier` or a `spread` that is not
        positive, scores with NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> flat, peaked = jnp.ones((10, 10)), jnp.ones((10, 10)).at[0].set(100.0)
      >>> js.allocations.owl({"a": flat, "b": peaked}, 0.5)
      {'a': 0.58, 'b': 0.42}
    """
    _checks.check_arrays(scores=scores)
    _checks.check_known("js.allocations.owl", scores=scores)
    _checks.check_number(above=0, outlier=outlier, spread=spread)
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
    """Allocate by DSA's formula: scores that spread over more decades get sparser.

    `I_l = asin(atan(Var[log score]))`, the best of a search over such formulas; then
    sparsities are `2 * spread * (I_l - min I) / (max I - min I)` and a constant, such
    that the total is met. Li et al. (2024), "Discovering Sparsity Allocation for
    Layer-wise Pruning of Large Language Models", with Wanda's scores of the dense
    model.

    Differs from the reference implementation in three points. Scores of 0 are left out
    (there they count as 1). An `atan` above 1 counts as 1 (there the importance is NaN,
    and then 0). `spread` is used as given (there a random number from 0.07 to 0.1
    replaces it).

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
    _checks.check_arrays(scores=scores)
    _checks.check_known("js.allocations.dsa", scores=scores)
    _checks.check_number(above=0, spread=spread)
    blocks = grouped(scores, sparsity, where, groups)
    _check_scores(blocks)
    found = {name: _log_variance(leaves) for name, leaves in blocks.items()}
    found = {k: math.asin(min(math.atan(v), 1.0)) for k, v in found.items()}
    wanted = {name: 2 * spread * d for name, d in _min_max(found).items()}
    return by_shift(scores, sparsity, where, blocks, wanted)


def arithmetic_progression(
    params: PyTree,
    sparsity: float,
    *,
    difference: float,
    groups: Groups = None,
    where: Where = None,
) -> PyTree:
    """Let sparsities grow from block to block by a common difference.

    `s_i = s_0 + i * difference`, where `s_0` meets the total. Later blocks amplify the
    errors of the first ones, so the first blocks stay denser. Huang et al. (2025,
    arXiv:2502.14770) try a few differences.

    The blocks are taken in the natural order of their names: `block_2` comes before
    `block_10`, wherever it stands in the tree.

    Args:
      params: the parameters; only their shapes are read.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      difference: the difference in sparsity between a block and the next; a negative
        one makes the first blocks sparser. A block that would leave [0, 1] stops there,
        and the others make up for it.
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
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_number(above=-1, below=1, difference=difference)
    blocks = grouped(params, sparsity, where, groups)
    wanted = {k: i * difference for i, k in enumerate(sorted(blocks, key=_natural))}
    return by_shift(params, sparsity, where, blocks, wanted)


def _min_max(values: dict[str, float]) -> dict[str, float]:
    low, high = min(values.values()), max(values.values())
    if not high > low:
        return dict.fromkeys(values, 0.0)
    return {name: (v - low) / (high - low) for name, v in values.items()}


def _outliers(leaves: list[tuple[str, Any]], times: float) -> float:
    n = weights_in(leaves)
    mean = sum(float(_sum(x)) for _, x in leaves) / n
    return sum(int(_above(x, times * mean)) for _, x in leaves) / n


@jax.jit
def _sum(x: Array) -> Array:
    return jnp.sum(as_wide(x))


@jax.jit
def _above(x: Array, threshold: float) -> Array:
    return jnp.sum(as_wide(x) > threshold, dtype=count_dtype(x.size))


def _log_variance(leaves: list[tuple[str, Any]]) -> float:
    parts = [[float(v) for v in _log_moments(x)] for _, x in leaves]
    n = sum(p[0] for p in parts)
    if n < 2:
        return 0.0
    mean = sum(p[0] * p[1] for p in parts) / n
    return sum(p[2] + p[0] * (p[1] - mean) ** 2 for p in parts) / (n - 1)


@jax.jit
def _log_moments(x: Array) -> tuple[Array, Array, Array]:
    x = as_wide(x)
    there = x > 0
    log = jnp.log(jnp.where(there, x, 1))
    n = jnp.sum(there, dtype=log.dtype)
    mean = jnp.sum(log) / jnp.maximum(n, 1)
    apart = jnp.where(there, log - mean, 0)
    return n, mean, jnp.sum(jnp.square(apart))


def _natural(name: str) -> list[Any]:
    """Numbers in a name as numbers; text and numbers alternate."""
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", name))]


def _check_scores(blocks: Blocks) -> None:
    for leaves in blocks.values():
        for path, x in leaves:
            _checks.check_floating(path, x)
            _checks.check_no_nan({path: x})
