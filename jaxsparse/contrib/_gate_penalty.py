"""A penalty that closes gates of residual blocks while they are trained."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import Array


class GatePenalty(NamedTuple):
    """Two terms of a loss that closes gates; both are 0 at their minimum.

    Attributes:
      polarization: how far gates are from 0 and 1, at most 1/4.
      excess: the squared distance of the open gates' cost from the budget.
    """

    polarization: Array
    excess: Array


def gate_penalty(
    gates: Mapping[str, Any], costs: Mapping[str, float], *, budget: float
) -> GatePenalty:
    """Return a penalty that closes some of the gates of residual branches.

    With the shares `c_b = costs[b] / sum costs` of the blocks b,

        polarization = sum_b c_b g_b (1 - g_b),
        excess = (sum_b c_b g_b - budget)^2.

    The second term closes gates, first those that the loss needs least; the first term
    drives half-open gates to 0 or 1. It holds a gate of 1 in place, so start without it
    or with gates below 1, and let its weight grow::

        def loss(params, logits, batch):
            gates = {name: jax.nn.sigmoid(x) for name, x in logits.items()}
            penalty = js.contrib.gate_penalty(gates, sizes, budget=0.7)
            of_gates = 10.0 * penalty.excess + weight * penalty.polarization
            return model_loss(with_gates, params, gates, batch) + of_gates

    Blocks of the lowest gates are then removed (`remove_blocks`). FoldGPT (Liu et al.
    2024, arXiv:2407.00928) ranks blocks by gates trained with a polarizing term and a
    target of operations. These formulas are the simplest with the same minima, and not
    the paper's own.

    Args:
      gates: scalars in [0, 1] by the names of blocks, for `gated`.
      costs: the costs of the same blocks: parameters, bytes, FLOPs, microseconds.
      budget: the fraction of the costs to keep.

    Returns:
      A `GatePenalty` of two scalars.

    Raises:
      ValueError: other blocks in the costs, costs below 0 or none above, a budget
        outside [0, 1], gates that are no scalars.

    Example:
      >>> import jaxsparse as js
      >>> gates, costs = {"a": 1.0, "b": 0.5}, {"a": 300, "b": 100}
      >>> js.contrib.gate_penalty(gates, costs, budget=0.75)
      GatePenalty(polarization=Array(0.0625, dtype=float32), excess=Array(0.015625, ...
    """
    _checks.check_mapping(gates=gates)
    for name, gate in gates.items():
        if not isinstance(gate, int | float):
            _checks.check_arrays(**{f"gates[{name!r}]": gate})
    _checks.check_numbers(costs=costs)
    _checks.check_number(budget=budget)
    if set(gates) != set(costs):
        differ = sorted(set(gates) ^ set(costs))
        raise ValueError(
            f"gates and costs must have the same blocks: {differ[:4]} are in one of "
            "them only."
        )
    if _checks.is_concrete(budget) and not 0 <= float(budget) <= 1:
        raise ValueError(f"budget={budget!r}: expected a fraction in [0, 1].")
    names = list(gates)
    shares = np.array([float(costs[name]) for name in names])
    if not np.all(shares >= 0) or not shares.sum() > 0:
        raise ValueError(
            f"costs must be at least 0 and some of them above; got {costs}."
        )
    for name in names:
        if shape := jnp.shape(gates[name]):
            raise ValueError(f"{name}: a gate is a scalar, got the shape {shape}.")
    open_ = jnp.stack([jnp.asarray(gates[name]) for name in names])
    open_ = open_ if jnp.issubdtype(open_.dtype, jnp.floating) else open_.astype(float)
    shares = jnp.asarray(shares / shares.sum(), open_.dtype)
    return GatePenalty(
        jnp.sum(shares * open_ * (1 - open_)),
        jnp.square(jnp.sum(shares * open_) - budget),
    )
