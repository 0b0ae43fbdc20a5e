"""A trace of the same model at other shapes of its inputs."""

from typing import Any

import jax

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.program import abstract
from jaxsparse.tracing._trace import Trace, trace


def retrace(trace_: Trace, params: PyTree, inputs: tuple[Any, ...]) -> Trace:
    """Trace the same model with inputs of other shapes; return the trace if they agree.

    Args:
      trace_: a trace.
      params: the parameters; only their shapes are read.
      inputs: arrays.

    Returns:
      A `Trace`.

    Raises:
      ValueError: parameters of another structure or other shapes.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.ones((3, 2))}
      >>> t = js.trace(lambda p, x: x @ p["w"], params, jnp.ones((5, 3)))
      >>> js.tracing.retrace(t, params, (jnp.ones((7, 3)),)).flops / t.flops
      1.4
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace_=trace_)
    _checks.check_arrays(abstract=True, params=params)
    if not isinstance(inputs, tuple):
        raise TypeError(f"inputs must be a tuple, got {_checks.shown(inputs)}.")
    shapes = [abstract(x) for x in jax.tree.leaves(params)]
    traced = [v.aval for v in trace_.program.jaxpr.invars[: len(trace_.paths)]]
    expected = trace_.treedef.unflatten(traced)
    _checks.same_structure(params, expected, name="params", of="the traced model")
    for path, s, t in zip(trace_.paths, shapes, traced, strict=True):
        if s.shape != t.shape:
            raise ValueError(f"{path}: traced with shape {t.shape}, got {s.shape}.")
    same = lambda a, b: jax.tree.map(abstract, a) == jax.tree.map(abstract, b)
    types = [s.dtype == t.dtype for s, t in zip(shapes, traced, strict=True)]
    if all(types) and same(inputs, trace_.inputs):
        return trace_
    return trace(trace_.apply_fn, params, *inputs, rules=trace_.rules)
