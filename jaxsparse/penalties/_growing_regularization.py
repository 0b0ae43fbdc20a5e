"""A decay of whole indices that keeps growing: growing regularization."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import optax

from jaxsparse import _checks
from jaxsparse._loops import when
from jaxsparse._typing import Array, Cadence, PyTree
from jaxsparse.channels.slices import PRODUCERS, check_params, dtype_of, slices_of
from jaxsparse.channels.sums import squared_norms
from jaxsparse.coupling import Group
from jaxsparse.penalties.terms import add_scaled, check_strength, weakness
from jaxsparse.schedules.horizon import as_cadence


class GrowingRegularizationState(NamedTuple):
    """The state of `growing_regularization`.

    Attributes:
      step: the number of updates made, int32.
      strengths: the penalty of each channel, `[*copies, size]` by the groups' names,
        float32 (float64 for float64 parameters).
    """

    step: Array
    strengths: dict[str, Array]


def growing_regularization(
    groups: Mapping[str, Group],
    *,
    increment: float,
    every: int | Cadence,
    init: float = 0.0,
    limit: float = float("inf"),
    roles: Collection[str] = PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Add a decay per channel that keeps growing, faster for weaker channels.

    `g <- g + reg_c * w_c`; in the steps of `every`, first `reg_c <- min(reg_c +
    increment * (max - I_c) / (max - min), limit)`, `I_c = ||w_c||_2` and max and min
    over the group (for a batched group, over the copy). The penalty of the strongest
    channel does not grow. Neural pruning via growing regularization: Wang et al. (2021,
    arXiv:2012.09243), in the form of DepGraph (Fang et al. 2023, arXiv:2301.12900).

    Put it before the optimizer, like `group_lasso`.

    Differs from Wang et al., who choose the filters first and let one penalty of those
    grow (GReg-1), or let the penalty of all grow alike and choose by the norms that
    result (GReg-2), and from Torch-Pruning's `GrowingRegPruner`, which is told by hand
    when to grow, takes all members and has no limit.

    Args:
      groups: groups by name, all prunable.
      increment: by how much the penalty of the weakest channel grows each time.
      every: when penalties grow: a number of steps, or a cadence of
        `jaxsparse.schedules`.
      init: the penalty of all channels at the start.
      limit: no penalty grows beyond it; 1 in the paper.
      roles: as for `group_lasso`.

    Returns:
      A gradient transformation. Its state is a `GrowingRegularizationState`.

    Raises:
      ValueError: a negative number, a limit below `init`, and as `group_lasso`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[4.0, 2.0, 3.0]]), "down": jnp.ones((3, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((5, 1))))
      >>> tx = js.penalties.growing_regularization(
      ...     groups.prunable, increment=0.5, every=10)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> grads, state = tx.update(zeros, tx.init(params), params)
      >>> grads["up"].tolist()
      [[0.0, 1.0, 0.75]]
    """
    slices = slices_of(groups, roles=roles)
    cadence = as_cadence(every)
    for name, value in (("increment", increment), ("init", init), ("limit", limit)):
        check_strength(value, name=name)
    if limit < init:
        raise ValueError(f"{limit=} is below {init=}: penalties could not grow.")

    def init_fn(params: PyTree) -> GrowingRegularizationState:
        check_params(slices, params)
        dtype = dtype_of(slices, params)
        start = {name: jnp.full(s.shape, init, dtype) for name, s in slices.items()}
        return GrowingRegularizationState(jnp.zeros((), jnp.int32), start)

    def grow(strengths: dict[str, Array], params: PyTree) -> dict[str, Array]:
        squared = squared_norms(slices, params)
        grown = lambda now, s: jnp.minimum(
            now + increment * weakness(jnp.sqrt(s)).astype(now.dtype), limit
        )
        return {name: grown(strengths[name], s) for name, s in squared.items()}

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _checks.check_has_params(params)
        due = jnp.asarray(cadence(state.step), bool)
        strengths = when(due, grow, state.strengths, params)
        step = jnp.asarray(optax.safe_increment(state.step))
        added = add_scaled(updates, params, slices, strengths)
        return added, GrowingRegularizationState(step, strengths)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
