"""LAPP: a learned threshold on the importance of each group's channels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._straight import with_derivative_of
from jaxsparse._typing import Array
from jaxsparse.channels import normalize_max
from jaxsparse.coupling import Group
from jaxsparse.masking import Gates


def init_thresholds(groups: Mapping[str, Group]) -> dict[str, Array]:
    """Make a threshold of 0 for each prunable group, at which all channels stay.

    Args:
      groups: from `js.coupling.groups`; those that are not prunable are left out.

    Returns:
      Scalars of float32 by the groups' names: a tree for any optimizer.

    Raises:
      ValueError: no prunable group.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> js.contrib.init_thresholds(groups)
      {'up[1]': Array(0., dtype=float32)}
    """
    _checks.check_mapping(Group, "js.coupling.groups(trace)", groups=groups)
    names = [name for name, group in groups.items() if group.prunable]
    if not names:
        raise ValueError(f"groups: none of the {len(groups)} is prunable.")
    return {name: jnp.zeros((), jnp.float32) for name in names}


def threshold_gates(
    scores: Mapping[str, Any],
    thresholds: Mapping[str, Array],
    *,
    temperature: float | Array = 0.05,
) -> Gates:
    """Return gates of channels whose importance is above a learned threshold (LAPP).

    With the importance `s_c`, divided by the largest magnitude in the group, and the
    group's threshold `t`, the soft gate of channel c is `sigmoid((s_c - t) /
    temperature)` and the hard gate `[s_c >= t]`, with the derivative of the soft one;
    the best channel (of each copy) always stays. The thresholds learn from the loss and
    from a penalty on the cost::

        def loss_fn(trained, batch):
            params, thresholds = trained
            scores = js.channels.channel_scores(groups, js.scores.magnitude(params))
            gates = js.contrib.threshold_gates(scores, thresholds)
            masked = js.channels.scale_channels(groups, params, gates.hard)
            cost = (js.narrowing.flops_share(trace, gates.hard) - 0.5) ** 2
            return task_loss(masked, batch) + 10.0 * cost

        drop = js.channels.drop_closed(gates.hard)                     # at the end

    Zhai et al. (2023, LAPP, arXiv:2309.14157). The paper's formulas and its code were
    not at hand: this is the plainest form of its abstract, with learnable thresholds on
    the importance of filters and a constraint of the operations in the first epochs.
    Its light bypass beside each pruned convolution is not part of it. No derivative
    goes through the importance: weights learn from the loss alone.

    Args:
      scores: `[*copies, size]` by the groups' names, larger = keep.
      thresholds: scalars by the groups' names, as `init_thresholds` makes; groups
        without one stay whole.
      temperature: of the sigmoid, in units of the largest importance.

    Returns:
      `js.masking.Gates`, of the thresholds' dtype.

    Raises:
      ValueError: a group without scores, thresholds that are no scalars, a temperature
        that is not positive, NaN (in eager use).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> scores = {"up[1]": jnp.array([4.0, 1.0, 2.0])}
      >>> gates = js.contrib.threshold_gates(scores, {"up[1]": jnp.array(0.5)})
      >>> gates.hard["up[1]"].tolist(), gates.soft["up[1]"][2].tolist()
      ([1.0, 0.0, 1.0], 0.5)
    """
    _checks.check_mapping(made_by="js.channels.channel_scores(...)", scores=scores)
    _checks.check_mapping(thresholds=thresholds)
    _checks.check_number(above=0, temperature=temperature)
    for name, t in thresholds.items():
        if name not in scores:
            raise ValueError(
                f"thresholds: {name} has no scores; there are those of "
                f"{list(scores)[:8]}."
            )
        _checks.check_floats(**{f"thresholds[{name!r}]": t})
        if jnp.shape(t):
            raise ValueError(
                f"thresholds: {name} has one of shape {jnp.shape(t)}, expected a "
                "scalar."
            )
        _checks.check_floats(**{f"scores[{name!r}]": scores[name]})
    chosen = {name: jnp.asarray(scores[name]) for name in thresholds}
    _checks.check_no_nan({f"scores: {name}": x for name, x in chosen.items()})
    normalized = normalize_max(chosen)
    soft, hard = {}, {}
    for name, t in thresholds.items():
        s = lax.stop_gradient(normalized[name])
        wide = wide_dtype(s.dtype, t.dtype)
        above = s.astype(wide) - t.astype(wide)
        soft[name] = jax.nn.sigmoid(above / jnp.asarray(temperature, wide))
        soft[name] = soft[name].astype(t.dtype)
        best = jnp.argmax(s, axis=-1, keepdims=True) == jnp.arange(s.shape[-1]).reshape(
            [1] * (s.ndim - 1) + [-1]
        )
        hard[name] = with_derivative_of(soft[name], (above >= 0) | best)
    return Gates(soft, hard)
