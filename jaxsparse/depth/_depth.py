"""Choosing depth: a knapsack of blocks, learnable N:M depth."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._straight import with_derivative_of
from jaxsparse._typing import Array

CELLS = 50_000_000  # of the knapsack's table, a byte each


def knapsack(
    losses: Mapping[str, float],
    sizes: Mapping[str, int],
    *,
    at_least: int,
    unit: int | None = None,
) -> tuple[str, ...]:
    """Choose blocks to remove: the smallest sum of losses for a number of parameters.

    It minimizes the sum of the losses over the removed blocks S subject to `sum(sizes
    of S) >= at_least`, by dynamic programming over the kept sizes. The solution is
    exact if sizes are counted in their greatest common divisor. LAPTOP-Diff (Zhang et
    al., 2024, arXiv:2404.11098) adds up the losses that `output_losses` measures, of
    one removed block at a time.

    Args:
      losses: by block the loss of its removal.
      sizes: by block its parameters (`ResidualBlock.parameters`), or any other whole
        number that adds up: bytes, FLOPs, microseconds.
      at_least: the least amount to remove, in the unit of `sizes`.
      unit: counts sizes in multiples of this number, rounded up for kept blocks. At
        least `at_least` is still removed, but perhaps a little more than needed, and
        not at the smallest loss. By default the greatest common divisor; where that
        would need a table of more than 50 million cells (blocks times units), the least
        number that does not.

    Returns:
      The names of the blocks to remove, in the order of `losses`.

    Raises:
      ValueError: losses and sizes of different blocks, losses that are NaN, sizes below
        0, more to remove than there is, or a unit below 1.

    Example:
      >>> import jaxsparse as js
      >>> losses = {"a": 1.0, "b": 1.5, "c": 2.0}
      >>> sizes = {"a": 100, "b": 300, "c": 200}
      >>> js.depth.knapsack(losses, sizes, at_least=300)
      ('b',)
      >>> js.depth.knapsack(losses, sizes, at_least=400)
      ('a', 'b')
    """
    _checks.check_numbers(losses=losses)
    _checks.check_mapping(sizes=sizes)
    _checks.check_positive_int(at_least, name="at_least", least=0)
    names = list(losses)
    if set(names) != set(sizes):
        differ = sorted(set(names) ^ set(sizes))
        raise ValueError(
            f"losses and sizes must have the same blocks: {differ[:4]} are in one "
            "of them only."
        )
    values = np.array([float(losses[name]) for name in names])
    for name, value in zip(names, values, strict=True):
        if math.isnan(value):
            raise ValueError(
                f"losses[{name!r}] is NaN. Look for NaN where it was measured."
            )
        _checks.check_positive_int(sizes[name], name=f"sizes[{name!r}]", least=0)
    total = sum(sizes.values())
    if at_least > total:
        raise ValueError(
            f"at_least={at_least}: the blocks have {total} altogether. What lies "
            "outside of blocks can not be removed with them."
        )
    room = total - max(int(at_least), 0)
    if unit is None:
        unit = math.gcd(*sizes.values()) or 1
        unit *= max(1, math.ceil(room * len(names) / (CELLS * unit)))
    _checks.check_positive_int(unit, name="unit")
    kept = _kept(values, [-(-sizes[name] // unit) for name in names], room // unit)
    return tuple(name for name, keep in zip(names, kept, strict=True) if not keep)


def _kept(values: np.ndarray, weights: list[int], room: int) -> np.ndarray:
    """The subset of greatest value whose weight fits."""
    best = np.zeros(room + 1)
    takes = np.zeros((len(weights), room + 1), bool)
    for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
        if weight > room:
            continue
        with_it = best[: room + 1 - weight] + value
        # Among equals what keeps more: a block that costs nothing is no burden.
        takes[i, weight:] = with_it >= best[weight:]
        best[weight:] = np.maximum(with_it, best[weight:])
    kept = np.zeros(len(weights), bool)
    for i in reversed(range(len(weights))):
        kept[i] = takes[i, room]
        room -= weights[i] * int(kept[i])
    return kept


def nm_options(keep: int, of: int) -> np.ndarray:
    """List all ways to keep `keep` of `of` layers.

    Args:
      keep: the number of layers to keep.
      of: the number of layers.

    Returns:
      `[options, of]` bool, True = kept, in lexicographic order of the kept layers.

    Raises:
      ValueError: not 0 < keep <= of.

    Example:
      >>> import jaxsparse as js
      >>> js.depth.nm_options(1, 2).tolist()
      [[True, False], [False, True]]
    """
    _checks.check_positive_int(keep, name="keep")
    _checks.check_positive_int(of, name="of", least=keep)
    found = list(itertools.combinations(range(of), keep))
    options = np.zeros((len(found), of), bool)
    np.put_along_axis(options, np.array(found), True, axis=1)
    return options


def nm_gates(
    logits: Array,
    *,
    key: Array,
    keep: int,
    of: int,
    temperature: Any,
    scale: float = 100.0,
    hard: bool = True,
) -> Array:
    """Sample gates that learn which `keep` of every `of` layers stay (TinyFusion).

    Each group of `of` layers draws one of its options by a Gumbel softmax,
    `p = softmax((scale * logits + gumbel) / temperature)`, and its layers' gates are
    `p @ nm_options(keep, of)`. Each group's gates add up to `keep`. Fang et al. (2024,
    arXiv:2412.01199) start with logits of 0.02 and go from a temperature of 4 to 0.1,
    while the weights (a LoRA) are trained with the gates; afterwards each group keeps
    `nm_options(keep, of)[argmax(logits)]`.

    Args:
      logits: `[groups, options]`, floating point.
      key: a typed key; another one at each step.
      keep: the number of layers to keep in each group.
      of: the number of layers in a group.
      temperature: a positive number, or a traced one.
      scale: multiplies the logits, so that a usual learning rate moves them.
      hard: gates of 0 and 1, that of the option drawn, with the derivative of the soft
        ones (straight-through).

    Returns:
      `[groups * of]`, the gates of the layers in order, of the logits' dtype. For
      `gated`: `dict(zip(names, gates))`.

    Raises:
      ValueError: logits of another shape, not 0 < keep <= of, a temperature that is not
        positive.
      TypeError: logits that are not floating point.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> logits = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> options = {"keep": 1, "of": 2, "temperature": 1.0}
      >>> js.depth.nm_gates(logits, key=jax.random.key(0), **options).tolist()
      [1.0, 0.0, 0.0, 1.0]
    """
    _checks.check_arrays(logits=logits)
    _checks.check_key(key)
    options = nm_options(keep, of)
    _checks.check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] != len(options):
        raise ValueError(
            f"logits: expected the shape [groups, {len(options)}], one for each way to "
            f"keep {keep} of {of} layers, got {logits.shape}."
        )
    _checks.check_number(above=0, temperature=temperature)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    heat = jnp.asarray(temperature).astype(logits.dtype)
    soft = jax.nn.softmax((scale * logits + noise) / heat, axis=-1)
    drawn = soft
    if hard:
        best = jax.nn.one_hot(jnp.argmax(soft, axis=-1), len(options))
        drawn = with_derivative_of(soft, best)
    gates = jnp.matmul(
        drawn, jnp.asarray(options, logits.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return gates.reshape(-1)
