"""CRIC: cycles of trial removals that correct which indices are redundant."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree
from jaxsparse.channels.scaling import factors_of, scaled_updates
from jaxsparse.channels.slices import (
    PRODUCERS,
    check_params,
    dtype_of,
    slices_of,
    wide_leaves,
)
from jaxsparse.channels.sums import sums
from jaxsparse.coupling import Group
from jaxsparse.coupling.drop import Drop, drop_of
from jaxsparse.penalties.saliency import Criteria, lowest, removed_by, saliency
from jaxsparse.penalties.terms import check_strength


class Redundancy(NamedTuple):
    """The result of `cric`.

    Attributes:
      scores: `[*copies, size]` by the groups' names, larger = keep; float32 (float64
        for float64 parameters).
      drop: the channels that it would remove.
      violators: for each cycle, the number of channels that it tried for the first
        time.
      increases: for each cycle, the relative increase of the loss after its removal.
    """

    scores: dict[str, np.ndarray]
    drop: Drop
    violators: tuple[int, ...]
    increases: tuple[float, ...]


def cric(
    loss_fn: Callable[[Any, Any], Array],
    params: PyTree,
    groups: Mapping[str, Group],
    batches: Iterable[Any],
    *,
    sparsity: float,
    optimizer: optax.GradientTransformation,
    steps: int,
    max_cycles: int = 10,
    tolerance: int = 0,
    loss_weight: float = 1.0,
    criteria: Criteria = Criteria(),  # noqa: B008  (a NamedTuple of numbers)
    roles: Collection[str] = PRODUCERS,
) -> Redundancy:
    """Find redundant channels by cycles of trial removals (CRIC).

    Saliency at one point predicts poorly what happens far from it: a channel of small
    slices with no gradient seems redundant, whatever depends on it. A cycle takes the
    violators, the lowest-scoring channels that were not tried before, trains for
    `steps` steps while it shrinks their slices to zero (as `hesso` does), samples the
    saliency of all channels on the way, and puts the parameters back. The samples of
    all cycles are averaged. The violators are also charged `loss_weight * increase`,
    the relative increase of the mean loss by the cycle, each by its share: the sum over
    the steps of `g . dx`, with dx the amount by which shrinking changed its slices. It
    ends when no more than `tolerance` new violators appear. Chen et al. (2024,
    arXiv:2409.09085).

    Then train with the scores it found::

        found = js.contrib.cric(loss_fn, params, groups, batches, sparsity=0.5,
                                   optimizer=optax.adam(1e-3), steps=20)
        tx = js.penalties.hesso(optax.adam(1e-3), groups, scores=found.scores,
                                 sparsity=0.5, begin=0, periods=1, duration=1_000)

    Differs from the reference implementation, which first tries each group alone at
    three sparsities, charges all violators of a cycle alike, and has the opposite sign
    of the cosine (see `hesso`).

    Complexity: a cycle is `steps` training steps and a loss for each batch.

    Args:
      loss_fn: `loss_fn(params, batch)`, a scalar.
      params: the parameters, trained.
      groups: groups by name, all prunable.
      batches: the batches for `loss_fn`; all are held in memory and used in turn.
      sparsity: the fraction of all channels to remove; counted as by `hesso`.
      optimizer: the optimizer of trial removals, with a fresh state in each cycle.
      steps: the length of a trial removal.
      max_cycles: the largest number of cycles.
      tolerance: the method stops when a cycle has at most this many new violators.
      loss_weight: how much the increase of the loss counts; 0 not at all.
      criteria: weights of the saliency's parts.
      roles: as for `js.penalties.group_lasso`.

    Returns:
      The scores and what to remove; see `Redundancy`.

    Raises:
      ValueError: no batches, numbers out of range, and as `hesso`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"up": jnp.array([[0.1, 1.0, 1.0]]),
      ...           "down": jnp.array([[50.0], [0.1], [5.0]])}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> x = jnp.linspace(-1, 1, 20)[:, None]
      >>> y = apply_fn(params, x)
      >>> loss_fn = lambda params, x: jnp.mean((apply_fn(params, x) - y) ** 2)
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, x)).prunable
      >>> found = js.contrib.cric(loss_fn, params, groups, [x], sparsity=0.4,
      ...                            optimizer=optax.sgd(0.0), steps=5)
      >>> found.drop.indices["up[1]"].tolist()   # not the smallest, it is used most
      [1]
    """
    _checks.check_callable(2, loss_fn=loss_fn)
    _checks.check_arrays(params=params)
    _checks.check_batches(batches)
    _checks.check_transformation(optimizer=optimizer)
    slices = slices_of(groups, roles=roles)
    _checks.check_sparsity(sparsity)
    _checks.check_positive_int(steps, name="steps")
    _checks.check_positive_int(max_cycles, name="max_cycles")
    _checks.check_positive_int(tolerance, name="tolerance", least=0)
    check_strength(loss_weight, name="loss_weight")
    check_params(slices, params)
    (count,) = removed_by(slices, sparsity, 1)
    wide = dtype_of(slices, params)
    data = list(batches)
    if not data:
        raise ValueError("batches: there are none. Was the iterator used up before?")

    @jax.jit
    def sample(params: PyTree, batch: Any) -> dict[str, Array]:
        grads = jax.grad(loss_fn)(params, batch)
        return saliency(slices, params, grads, criteria=criteria)

    @jax.jit
    def step(params: PyTree, state: Any, shrinking: Any, factor: Array, batch: Any):
        grads = jax.grad(loss_fn)(params, batch)
        sampled = saliency(slices, params, grads, criteria=criteria)
        updates, state = optimizer.update(grads, state, params)
        one = jnp.ones((), wide)
        vectors = {n: jnp.where(x, factor, one) for n, x in shrinking.items()}
        factors = factors_of(slices, vectors, params)
        updates = scaled_updates(updates, params, factors)
        # To first order what the removal of each index adds to the loss in this step.
        held, slopes = wide_leaves(slices, params), wide_leaves(slices, grads)
        lost = {p: (factors[p] - 1) * w * slopes[p] for p, w in held.items()}
        moved = optax.apply_updates(params, updates)
        return moved, state, sampled, sums(slices, lost)

    compiled = jax.jit(loss_fn)

    def mean_loss(params: PyTree) -> float:
        return float(np.mean([np.asarray(compiled(params, b)) for b in data]))

    with _checks.explained("loss_fn", params=params, batch=data[0]):
        before = mean_loss(params)
    if not math.isfinite(before):
        raise ValueError(
            f"batches: the mean of loss_fn over them is {before}. Is one of them empty?"
        )

    def trial(violators: dict[str, np.ndarray], turn: int):
        """The mean saliency on the way to zero, the loss's increase, and by whom."""
        now, state = params, optimizer.init(params)
        zeros = {name: np.zeros(s.shape) for name, s in slices.items()}
        total, blame = dict(zeros), dict(zeros)
        for t in range(steps):
            batch = data[(turn * steps + t) % len(data)]
            factor = jnp.asarray((steps - t - 1) / (steps - t), wide)
            now, state, sampled, lost = step(now, state, violators, factor, batch)
            total = {n: x + np.asarray(sampled[n]) for n, x in total.items()}
            blame = {n: x + np.asarray(lost[n]) for n, x in blame.items()}
        increase = max(mean_loss(now) - before, 0.0) / max(abs(before), _LEAST_LOSS)
        return {n: x / steps for n, x in total.items()}, increase, blame

    return _cycles(
        {n: np.asarray(x, np.float64) for n, x in sample(params, data[0]).items()},
        trial,
        count=count,
        max_cycles=max_cycles,
        tolerance=tolerance,
        loss_weight=loss_weight,
        dtype=wide,
    )


_LEAST_LOSS = 1e-6  # a loss of 0 before would make every increase infinite


def _cycles(
    first: dict[str, np.ndarray],
    trial: Callable[[dict[str, np.ndarray], int], Any],
    *,
    count: int,
    max_cycles: int,
    tolerance: int,
    loss_weight: float,
    dtype: Any = np.float32,
) -> Redundancy:
    """The cycles, with all numbers on the host."""
    summed, samples = dict(first), 1
    none = {name: np.zeros(x.shape, bool) for name, x in first.items()}
    nothing = {name: jnp.zeros(x.shape, bool) for name, x in first.items()}
    tried, charges = dict(none), {n: np.zeros(x.shape) for n, x in first.items()}
    found: list[int] = []
    increases: list[float] = []

    def scores() -> dict[str, np.ndarray]:
        return {n: (x / samples + charges[n]).astype(dtype) for n, x in summed.items()}

    def weakest() -> dict[str, np.ndarray]:
        now = {name: jnp.asarray(x) for name, x in scores().items()}
        chosen = lowest(now, jnp.asarray(count), first=nothing)
        return {name: np.asarray(x) for name, x in chosen.items()}

    for turn in range(max_cycles):
        violators = {name: x & ~tried[name] for name, x in weakest().items()}
        number = sum(int(x.sum()) for x in violators.values())
        if number <= tolerance:
            break
        sampled, increase, blame = trial(violators, turn)
        shares = _shares(violators, blame)
        samples += 1
        for name, x in violators.items():
            summed[name] = summed[name] + sampled[name]
            tried[name] = tried[name] | x
            charges[name] = charges[name] + loss_weight * increase * shares[name]
        found.append(number)
        increases.append(increase)
    drop = drop_of(weakest())
    return Redundancy(scores(), drop, tuple(found), tuple(increases))


def _shares(
    violators: dict[str, np.ndarray], blame: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The parts of the violators in the loss's increase; equal if none has any."""
    own = {n: np.where(x, np.maximum(blame[n], 0), 0) for n, x in violators.items()}
    total = sum(float(x.sum()) for x in own.values())
    if not 0 < total < np.inf:
        own = {name: x.astype(np.float64) for name, x in violators.items()}
        total = sum(float(x.sum()) for x in own.values())
    return {name: x / total for name, x in own.items()}
