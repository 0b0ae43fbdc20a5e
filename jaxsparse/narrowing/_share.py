"""`flops_share`: the operations that gates leave, to be differentiated."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._typing import Array
from jaxsparse.coupling.grouping import check_by_channel, found_in
from jaxsparse.narrowing._cost import axes_of
from jaxsparse.primitives import axes as algebra
from jaxsparse.tracing import Trace


def flops_share(trace: Trace, gates: Mapping[str, Any]) -> Array:
    """Return the fraction of a model's operations that gates of channels leave.

    `sum_k f_k prod_a share_a / sum_k f_k` over contractions k of kernels, `f_k` their
    operations and a their axes. The share of an axis follows from those of its groups:
    the mean of the group's gates. So with gates of 0 and 1 it is what
    `js.narrowing.cost` counts of the model without the closed channels, over all; with
    soft gates it is the operations of a model of expected widths. A constraint of the
    cost is `(flops_share(trace, gates) - budget) ** 2` in the loss. With straight-
    through gates its value is that of the hard network.

    Args:
      trace: from `js.trace`.
      gates: `[*copies, size]` by the names of groups of this model, in [0, 1]. All
        copies count as their mean.

    Returns:
      A scalar of float32 at least.

    Raises:
      ValueError: a group that is not one of this model, gates of another shape, a model
        without contractions of kernels.
      TypeError: gates that are no arrays of floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 4))}
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> trace = js.trace(apply_fn, params, jnp.ones((1, 4)))
      >>> share = lambda gate: js.narrowing.flops_share(trace, {"up[1]": gate})
      >>> jax.value_and_grad(lambda x: share(jnp.full(16, x)))(0.25)
      (Array(0.25, dtype=float32), Array(1., dtype=float32, weak_type=True))
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_mapping(gates=gates)
    total = sum(site.flops for site in trace.sites)
    if not total:
        raise ValueError("trace: the model contracts no parameters, so nothing costs.")
    leaves = _shares(trace, gates)
    known: dict[algebra.Axis, Any] = {}

    def share(axis: algebra.Axis) -> Any:
        """The share of an axis: a product's parts multiply, a sum's add up by size."""
        node = algebra.find(axis)
        if node not in known:
            parts = [algebra.find(x) for x in algebra.parts(node)] if node.parts else []
            if not parts:
                known[node] = leaves.get(node, 1.0)
            elif node.is_sum:
                known[node] = sum(share(x) * (x.size / node.size) for x in parts)
            else:
                known[node] = _product(map(share, parts))
        return known[node]

    found = [
        (site.flops / total) * _product(map(share, axes_of(trace, site)))
        for site in trace.sites
    ]
    return jnp.asarray(sum(found), jnp.result_type(jnp.float32, *leaves.values()))


def _product(factors: Any) -> Any:
    found = 1.0
    for x in factors:
        # A Python number that is 1 would only be one more operation.
        found = x if isinstance(found, float) and found == 1.0 else found * x
    return found


def _shares(trace: Trace, gates: Mapping[str, Any]) -> dict[algebra.Axis, Array]:
    """By leaf of the axes the mean of its group's gates."""
    found = trace.once(found_in)
    leaves = {}
    for name, gate in gates.items():
        if name not in found:
            raise ValueError(
                f"{name}: gates name it, and it is not a group of this model; "
                "js.coupling.groups(trace) lists them all."
            )
        group, leaf = found[name]
        check_by_channel("gates", group, gate)
        leaves[leaf] = jnp.mean(as_wide(jnp.asarray(gate)))
    return leaves
