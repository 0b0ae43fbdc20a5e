"""`cost`: parameters, bytes and operations that a drop leaves."""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxsparse import _checks
from jaxsparse.coupling.drop import Drop
from jaxsparse.narrowing._cut import Cut
from jaxsparse.narrowing._plan import plan
from jaxsparse.tracing import Trace


class Cost(NamedTuple):
    """The cost of a model.

    Attributes:
      parameters: the number of weights.
      bytes: the memory that they take, in the traced types.
      flops: the operations of all contractions of kernels for the example inputs, two
        for a multiply-add, as `Trace.flops` counts them.
    """

    parameters: int
    bytes: int
    flops: int


def cost(
    trace: Trace,
    drop: "Drop | Mapping[str, Any] | None" = None,
    *,
    allow: Collection[str] = (),
) -> Cost:
    """Count the parameters and operations that remain when channels are dropped.

    Args:
      trace: the trace of the model.
      drop: the channels to remove; nothing by default. See `narrow`.
      allow: see `groups`.

    Returns:
      Its `Cost`.

    Raises:
      ValueError: as `narrow`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 4))}
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> trace = js.trace(apply_fn, params, jnp.ones((1, 4)))
      >>> js.narrowing.cost(trace)
      Cost(parameters=128, bytes=512, flops=256)
      >>> js.narrowing.cost(trace, {"up[1]": range(12)}).parameters
      32
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    cut = plan(trace, drop or {}, allow=allow, masks=True).cut
    sizes = [math.prod(cut.shape(dims)) for dims in trace.dims.values()]
    types = [v.aval.dtype.itemsize for v in trace.program.jaxpr.invars]
    weights = sum(n * b for n, b in zip(sizes, types, strict=False))
    flops = sum(_flops(trace, cut, site) for site in trace.sites)
    return Cost(sum(sizes), weights, flops)


def _flops(trace: Trace, cut: Cut, site: Any) -> int:
    """Of one contraction: those that it had, times what is left of each axis."""
    axes = axes_of(trace, site)
    old, new = (math.prod(f(d) for d in axes) for f in (lambda d: d.size, cut.size))
    return site.flops * new // old


def axes_of(trace: Trace, site: Any) -> list[Any]:
    """The axes that the operations of one contraction are the product of."""
    node = trace.nodes[site.address]
    axes = [*node.outs[0]]
    if site.primitive != "mul":  # whose sum comes after it
        axes += (node.ins[site.operand][a] for a in site.contracted)
    around = (site.address[:n] for n in range(1, len(site.address), 2))
    return axes + [trace.layers[a] for a in around if a in trace.layers]
