"""ALS: sparsities of blocks by a linear program."""

import math
from collections.abc import Mapping

from jaxsparse import _checks
from jaxsparse._typing import PyTree, Where
from jaxsparse.allocations.blocks import (
    Groups,
    grouped,
    removed_in,
    spread_over,
    weights_in,
)


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
    """Allocate sparsity by a linear program over the redundancy of layers (ALS).

    It maximizes `sum_l redundancy_l * n_l * s_l` over sparsities in `[lower, upper]`
    that meet the total. The program has one equation, so one pass over the blocks, the
    most redundant first, solves it; equally redundant blocks share. After Li et al.
    (2024), "Adaptive Layer Sparsity for Large Language Models via Activation
    Correlation Assessment", where the redundancy of a layer comes from the correlation
    of its activations with those of other layers. It was not compared with another
    implementation.

    Args:
      params: the parameters; only their shapes are read.
      redundancy: a number for each block, by its name; by path without `groups`.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      lower: the least sparsity of a block.
      upper: the greatest, below 1.
      groups: the block of a path; None for one block for each parameter.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      As for `js.allocations.owl`; a bound may be passed by part of a weight.

    Raises:
      ValueError: a block without redundancy, one that is not finite, or bounds that the
        total does not lie between.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {k: jnp.ones((10, 10)) for k in "abc"}
      >>> redundancy = {"a": 0.9, "b": 0.1, "c": 0.5}
      >>> js.contrib.als(params, redundancy, 0.5, lower=0.3, upper=0.75)
      {'a': 0.75, 'b': 0.3, 'c': 0.45}
    """
    _checks.check_arrays(abstract=True, params=params)
    blocks = grouped(params, sparsity, where, groups)
    _checks.check_numbers(redundancy=redundancy)
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
