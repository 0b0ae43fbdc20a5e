"""The proximal step of the weighted group sparse envelope: a budget of indices."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree
from jaxsparse.channels.nesting import nesting
from jaxsparse.channels.scaling import factors_of, scaled_updates
from jaxsparse.channels.slices import PRODUCERS, Slices, slices_of
from jaxsparse.channels.sums import entry_counts, sums
from jaxsparse.coupling import Group
from jaxsparse.penalties.terms import check_strength, in_each_step, moved_leaves
from jaxsparse.schedules.horizon import evaluate

_HALVINGS = 50


def wgsef_prox(
    groups: Mapping[str, Group],
    *,
    sparsity: Any,
    strength: Any,
    costs: Mapping[str, Any] | None = None,
    roles: Collection[str] = PRODUCERS,
) -> optax.GradientTransformationExtraArgs:
    """Apply the proximal step of the weighted group sparse envelope function (WGSEF).

    The envelope is the largest convex function below `1/2 ||x||^2` on the points whose
    nonzero indices cost at most `k` together, and infinity elsewhere::

        GS_k(x) = 1/2 min_u sum_c ||x_c||^2 / u_c,  0 <= u_c <= 1,  sum_c d_c u_c <= k

    with x_c the entries of all slices of channel c, d_c its cost and `k = (1 -
    sparsity) * sum_c d_c`: one budget over all groups. Unlike the group lasso it knows
    how much to keep, and all channels well within the budget decay alike, by `1 / (1 +
    strength)`. Beck & Refael (2022, arXiv:2212.12921).

    The step is `params + u' = argmin_x  strength * GS_k(x) + 1/2 ||x - v||^2`, `v =
    params + u`. With `lam = strength` it is `x_c = v_c * u_c / (lam + u_c)`, `u_c =
    clip(t * ||v_c|| / sqrt(d_c) - lam, 0, 1)`, and t such that `sum_c d_c u_c = k` (all
    `u_c = 1` where the budget allows that). (The paper's multiplier eta of the budget
    is `lam / (2 t^2)`.) Indices with `u_c = 0` are exactly 0.0 after
    `optax.apply_updates`; they come back if the gradient makes them large enough.

    Place it last in a chain, where it sees the final update. `strength` is the learning
    rate times the penalty's weight; with a learning rate schedule let it be one too::

        tx = optax.chain(optax.sgd(rate), js.contrib.wgsef_prox(
            groups, sparsity=0.5, strength=rate * 0.1))

    A small strength empties few channels in one step; their u decreases over many
    steps. `js.channels.zero_indices(params, groups)` finds the channels that are zero.

    Complexity: the parameters are read twice; t by 50 halvings over the indices.

    Args:
      groups: groups by name, all prunable, whose slices are disjoint: no heads together
        with the entries of heads.
      sparsity: the part of the costs to remove, in [0, 1), or a schedule.
      strength: a number, or a schedule step -> number; the learning rate is in it.
      costs: d, by the groups' names numbers or `[*copies, size]`; the number of an
        index's entries by default. 1 for all counts indices.
      roles: as for `group_lasso`.

    Returns:
      A gradient transformation. Its state is a `PenaltyState`.

    Raises:
      ValueError: a sparsity outside [0, 1), a negative strength, costs that are not
        positive or of other groups, and as `group_lasso`; at `init`, also for groups
        whose slices share entries.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[4.0, 1.0, 3.0]]), "down": jnp.ones((3, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((5, 1))))
      >>> tx = optax.chain(optax.sgd(0.1), js.contrib.wgsef_prox(
      ...     groups.prunable, sparsity=1 / 3, strength=1.0))
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(zeros, tx.init(params), params)
      >>> [round(x, 3) for x in optax.apply_updates(params, updates)["up"][0].tolist()]
      [2.0, 0.0, 1.5]
    """
    slices = slices_of(groups, roles=roles)
    if not callable(sparsity):
        _checks.check_sparsity(sparsity)
    check_strength(strength)
    stated = None if costs is None else _checked_costs(costs, slices)

    def shrink(updates: PyTree, step: Array, params: PyTree) -> PyTree:
        moved = moved_leaves(slices, updates, params)
        squared = sums(slices, {p: v * v for p, v in moved.items()})
        d = stated if stated is not None else entry_counts(slices, params)
        flat = lambda xs: [np.ravel(xs[name]) for name in slices]
        norms = jnp.sqrt(jnp.concatenate([squared[name].ravel() for name in slices]))
        cost = np.concatenate(flat(d)).astype(np.float64)
        shares = jnp.asarray(cost / cost.sum(), norms.dtype)
        lam = jnp.asarray(evaluate(strength, step), norms.dtype)
        keep = 1 - jnp.asarray(evaluate(sparsity, step), norms.dtype)
        factor = _shrinkage(norms, shares, keep, lam)
        vectors, start = {}, 0
        for name, s in slices.items():
            n = int(np.prod(s.shape))
            vectors[name] = factor[start : start + n].reshape(s.shape)
            start += n
        factors = factors_of(slices, vectors, params)
        return scaled_updates(updates, params, factors)

    apart = lambda params: nesting(slices, params, disjoint=True)
    return in_each_step(slices, shrink, apart)


def _checked_costs(
    costs: Mapping[str, Any], slices: Mapping[str, Slices]
) -> dict[str, np.ndarray]:
    if set(costs) != set(slices):
        differ = sorted(set(costs) ^ set(slices))
        raise ValueError(
            f"costs: expected a cost for each group and no other, differs in {differ}."
        )
    found = {}
    for name, s in slices.items():
        cost = np.asarray(costs[name], np.float64)
        if cost.shape not in ((), s.shape) or not np.all(cost > 0):
            raise ValueError(
                f"costs: {name!r} needs a positive number or an array {s.shape} of "
                f"them, got {costs[name]!r}."
            )
        found[name] = np.broadcast_to(cost, s.shape)
    return found


@jax.jit  # without it eager steps would compile the loop anew
def _shrinkage(norms: Array, shares: Array, keep: Array, lam: Array) -> Array:
    """`u / (lam + u)` for each index, with `shares` that sum to 1."""
    zero, one = jnp.zeros_like(norms), jnp.ones_like(norms)
    per = norms / jnp.sqrt(shares)
    weights = lambda t: jnp.clip(t * per - lam, 0, 1)
    # Some u are above 0 from `low` on, and all that can be are 1 from `high` on.
    some = per > 0
    largest = jnp.max(per)
    least = jnp.min(jnp.where(some, per, largest))
    safe = lambda x: jnp.where(x > 0, x, jnp.ones_like(x))
    tiny = jnp.asarray(jnp.finfo(norms.dtype).tiny, norms.dtype)
    low = jnp.log(jnp.maximum(lam / safe(largest), tiny))
    high = jnp.log(jnp.maximum((1 + lam) / safe(least), tiny))

    # Where whole indices fill the budget many t do. The least of them: a larger one
    # would, by rounding alone, give the next index a little.
    slack = 16 * float(jnp.finfo(norms.dtype).eps)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        fits = jnp.sum(shares * weights(jnp.exp(middle))) < keep * (1 - slack)
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    t = _finish(jnp.exp((low + high) / 2), per, shares, keep, lam)
    fits = jnp.sum(jnp.where(some, shares, zero)) <= keep * (1 + slack)
    u = jnp.where(fits, jnp.where(some, one, zero), weights(t))
    return jnp.where(u > 0, u / jnp.where(u > 0, lam + u, one), zero)


def _finish(t: Array, per: Array, shares: Array, keep: Array, lam: Array) -> Array:
    """The last digits of t: between 0 and 1 the costs are linear in it."""
    raw = t * per - lam
    between = (raw > 0) & (raw < 1)
    zero = jnp.zeros_like(per)
    full = jnp.sum(jnp.where(raw >= 1, shares, zero))
    slope = jnp.sum(jnp.where(between, shares * per, zero))
    missing = keep - full + lam * jnp.sum(jnp.where(between, shares, zero))
    return jnp.where(slope > 0, missing / jnp.where(slope > 0, slope, 1), t)
