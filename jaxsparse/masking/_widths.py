"""S2HPruner: the widths of coupled groups, learned soft and made hard in each step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._straight import with_derivative_of
from jaxsparse._typing import Array, PyTree
from jaxsparse.channels import scale_channels
from jaxsparse.coupling.grouping import Group, check_by_channel

Candidates = int | Mapping[str, Sequence[int]]


class Gates(NamedTuple):
    """Soft and hard gates of channels, `[*copies, size]` by the groups' names.

    Attributes:
      soft: between 0 and 1.
      hard: 0 or 1, with the derivative of the soft ones (straight-through).
    """

    soft: dict[str, Array]
    hard: dict[str, Array]


def init_width_logits(
    groups: Mapping[str, Group], *, candidates: Candidates = 1, whole: float = 0.9
) -> dict[str, Array]:
    """Make logits over the numbers of channels that each group may keep.

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are left out.
      candidates: an integer, for all its multiples up to the group's size and that
        size; or a mapping from the groups' names to ascending numbers. Groups that it
        does not name stay whole.
      whole: the probability of the largest number at temperature 1; the others share
        the rest.

    Returns:
      `[numbers]` of float32 by the groups' names: a tree for any optimizer.

    Raises:
      ValueError: numbers that do not ascend or lie outside of 1 ... size, an unknown
        group or one that is not prunable, no group at all, `whole` outside (0, 1).
      TypeError: numbers that are no integers.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> logits = js.masking.init_width_logits(groups, candidates=2)
      >>> logits["up[1]"].shape                                     # 2, 4 or 6
      (3,)
    """
    _checks.check_number(above=0, below=1, whole=whole)
    counts = _counts(groups, candidates)

    def logits(n: int) -> Array:
        last = math.log(max(n - 1, 1) * whole / (1 - whole))
        return jnp.asarray([0.0] * (n - 1) + [last], jnp.float32)

    return {name: logits(len(numbers)) for name, numbers in counts.items()}


def width_gates(
    groups: Mapping[str, Group],
    logits: Mapping[str, Array],
    *,
    candidates: Candidates = 1,
    temperature: float | Array = 1.0,
    scores: Mapping[str, Any] | None = None,
) -> Gates:
    """Return the gates of channels whose number is learned (S2HPruner).

    With `p = softmax(logits / temperature)` over the numbers `n_j` of channels that a
    group may keep, its channel of rank r (0 first) has the soft gate `P(n > r) =
    sum_{n_j > r} p_j`. The hard network keeps the smallest number that is at least the
    mean `<p, n>`, in the same order; its gates have the derivative of the soft ones.
    Lin et al. (2024, S2HPruner, arXiv:2410.07046). The soft network learns the task,
    the hard network learns from the soft one, and both train the logits::

        def loss_fn(trained, batch):
            params, logits = trained
            gates = js.masking.width_gates(groups, logits, candidates=8)
            out = js.masking.soft_to_hard(apply_fn, groups, params, gates, batch.x)
            cost = (js.narrowing.flops_share(trace, gates.hard) - 0.5) ** 2
            task = cross_entropy(out.soft, batch.labels).mean()
            return task + out.divergence.mean() + 10.0 * cost

        gates = js.masking.width_gates(groups, logits, candidates=8)   # at the end
        drop = js.channels.drop_closed(gates.hard)
        small = js.narrowing.narrow(trace, params, drop)

    A mean that exceeds a number by less than 1e-5 of the group's size counts as that
    number, because sums of probabilities have rounding errors. All copies of a group
    (heads, experts, layers of a scan) keep one number of channels.

    Differs from the reference implementation, which orders the channels by the L1 norm
    of its kernels or by their index: here by any scores. Its rules for masks that have
    become certain, and its optimizer for the logits, are left to the caller.

    Args:
      groups: from `js.coupling.groups`.
      logits: as `init_width_logits` makes.
      candidates: as for `init_width_logits`.
      temperature: the temperature of the softmax; a lower one is closer to a single
        number.
      scores: `[*copies, size]` by the groups' names, larger = keep: channels are kept
        in this order, separately in each copy, and ties by the lower index. No
        derivative goes through them. By default, the lowest indices are kept.

    Returns:
      `Gates` of the groups with logits, of the logits' dtype.

    Raises:
      ValueError: logits or scores that do not fit the groups and the numbers, a
        temperature that is not positive; as `init_width_logits`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 4)), "down": jnp.ones((4, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> logits = {"up[1]": jnp.zeros(2)}                          # 2 or 4, as likely
      >>> gates = js.masking.width_gates(groups, logits, candidates=2)
      >>> gates.soft["up[1]"].tolist(), gates.hard["up[1]"].tolist()
      ([1.0, 1.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0])
    """
    _checks.check_mapping(made_by="js.masking.init_width_logits(...)", logits=logits)
    _checks.check_number(above=0, temperature=temperature)
    if scores is not None:
        _checks.check_mapping(made_by="js.channels.channel_scores(...)", scores=scores)
    counts = _counts(groups, candidates)
    soft, hard = {}, {}
    for name, pi in logits.items():
        numbers = counts.get(name)
        _checks.check_floats(**{f"logits[{name!r}]": pi})
        if numbers is None or jnp.shape(pi) != numbers.shape:
            wanted = "no logits" if numbers is None else f"logits {numbers.shape}"
            raise ValueError(
                f"logits: {name} has logits of shape {jnp.shape(pi)}; with these "
                f"groups and candidates it has {wanted}. "
                "js.masking.init_width_logits(groups, candidates=...) makes them."
            )
        group = groups[name]
        rank = _ranks(group, scores)
        soft[name], hard[name] = _gates(pi, numbers, group.size, rank, temperature)
    return Gates(soft, hard)


class SoftToHard(NamedTuple):
    """The logits of the soft and of the hard network.

    Attributes:
      soft: the logits of the soft network, `[..., classes]`.
      hard: the logits of the hard network.
      divergence: KL(soft || hard) of each example, `[...]`.
    """

    soft: Array
    hard: Array
    divergence: Array


def soft_to_hard(
    apply_fn: Callable[..., Array],
    groups: Mapping[str, Group],
    params: PyTree,
    gates: Gates,
    *inputs: Any,
) -> SoftToHard:
    """Run the network with soft gates and with hard gates.

    `divergence = KL(softmax(soft) || softmax(hard))`. The divergence trains the gates
    of both networks, but only the weights of the hard one: it treats the weights of the
    soft network as constants (the decoupled distillation of S2HPruner, see
    `width_gates`). It costs two forward passes (a third one in the code equals the
    first) and three backward passes.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> [..., classes]`.
      groups: from `js.coupling.groups`.
      params: the parameters.
      gates: from `width_gates` or `js.contrib.threshold_gates`.
      *inputs: the model's inputs.

    Returns:
      A `SoftToHard`, the divergence in float32 at least.

    Raises:
      ValueError: as `js.channels.scale_channels`; a result that is no array of logits.
      TypeError: gates that are no `Gates`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.eye(2), "down": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> x = jnp.ones((1, 2))
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, x))
      >>> gates = js.masking.Gates({"up[1]": jnp.ones(2)}, {"up[1]": jnp.eye(2)[0]})
      >>> out = js.masking.soft_to_hard(apply_fn, groups, params, gates, x)
      >>> [round(float(x), 3) for x in (*out.hard[0], out.divergence[0])]
      [0.762, 0.0, 0.071]
    """
    _checks.check_callable(1 + len(inputs), apply_fn=apply_fn)
    _checks.check_is(Gates, "js.masking.width_gates(...)", gates=gates)
    run = lambda params, gates: apply_fn(scale_channels(groups, params, gates), *inputs)
    with _checks.explained("apply_fn", params=params, inputs=inputs):
        soft, hard = run(params, gates.soft), run(params, gates.hard)
    if not isinstance(soft, jax.Array) or not soft.ndim:
        raise ValueError(
            f"apply_fn must return logits [..., classes], got {_checks.shown(soft)}."
        )
    of_gates = run(lax.stop_gradient(params), gates.soft)
    to_hard = _kl(lax.stop_gradient(soft), hard)
    to_gates = _kl(of_gates, lax.stop_gradient(hard))
    divergence = with_derivative_of(to_hard + to_gates, to_hard)
    return SoftToHard(soft, hard, divergence)


def _kl(teacher: Array, student: Array) -> Array:
    log_p, log_q = (jax.nn.log_softmax(as_wide(x)) for x in (teacher, student))
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def _counts(
    groups: Mapping[str, Group], candidates: Candidates
) -> dict[str, np.ndarray]:
    """By group the numbers of channels that it may keep, ascending."""
    _checks.check_mapping(Group, "js.coupling.groups(trace)", groups=groups)
    if isinstance(candidates, Mapping):
        found = {name: _given(groups, name, n) for name, n in candidates.items()}
    else:
        _checks.check_positive_int(candidates, name="candidates")
        found = {
            name: np.unique([*range(candidates, group.size, candidates), group.size])
            for name, group in groups.items()
            if group.prunable
        }
    if not found:
        raise ValueError(
            f"groups: none of the {len(groups)} is prunable and has candidates."
        )
    return found


def _given(groups: Mapping[str, Group], name: str, numbers: Any) -> np.ndarray:
    if name not in groups or not groups[name].prunable:
        why = "; ".join(map(str, groups[name].reasons)) if name in groups else "unknown"
        raise ValueError(f"candidates: {name} is no prunable group ({why}).")
    found, size = np.asarray(numbers), groups[name].size
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise TypeError(
            f"candidates[{name!r}] must be a list of integers, got "
            f"{_checks.shown(numbers)}."
        )
    inside = found.size and found[0] >= 1 and found[-1] <= size
    if not inside or np.any(np.diff(found) <= 0):
        raise ValueError(
            f"candidates[{name!r}] must ascend from 1 at least to {size}, the group's "
            f"size, at most; got {_checks.shown(numbers)}."
        )
    return found


def _ranks(group: Group, scores: Mapping[str, Any] | None) -> Array | np.ndarray:
    """The rank of each channel, 0 for the one that is kept longest."""
    if scores is None:
        shape = (*group.copies, group.size)
        return np.broadcast_to(np.arange(group.size), shape)
    if group.name not in scores:
        raise ValueError(
            f"scores: {group.name} has logits and no scores; there are those of "
            f"{list(scores)[:8]}."
        )
    own = scores[group.name]
    check_by_channel("scores", group, own)
    _checks.check_no_nan({f"scores: {group.name}": own})
    order = jnp.argsort(-lax.stop_gradient(jnp.asarray(own)), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True)


def _gates(
    pi: Array,
    numbers: np.ndarray,
    size: int,
    rank: Array | np.ndarray,
    temperature: float | Array,
) -> tuple[Array, Array]:
    """The soft and the hard gates of one group."""
    dtype = pi.dtype
    p = jax.nn.softmax(as_wide(pi) / jnp.asarray(temperature, as_wide(pi).dtype))
    # P(n >= n_j); the first is 1 whatever the rounding.
    tail = lax.cumsum(p, reverse=True).at[0].set(1)
    steps = jnp.asarray(np.diff(numbers, prepend=0), tail.dtype)
    mean = jnp.sum(tail * steps)
    # For each rank the first number above it; none gives a gate of 0.
    above = np.searchsorted(numbers, np.arange(size), side="right")
    kept = jnp.append(tail, jnp.zeros(1, tail.dtype))[above]
    reached = jnp.asarray(numbers, tail.dtype) < mean - 1e-5 * size
    width = jnp.asarray(numbers)[jnp.sum(reached)]
    soft = kept[rank].astype(dtype)
    return soft, with_derivative_of(soft, rank < width)
