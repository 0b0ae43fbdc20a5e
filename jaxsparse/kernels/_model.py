"""The model of a trace for packed parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._sharded import with_auto_axes
from jaxsparse._typing import Array, PyTree
from jaxsparse.formats import unpack
from jaxsparse.formats.dense import dtype_of, is_packed, with_dtype
from jaxsparse.kernels._evaluate import evaluate
from jaxsparse.kernels._matmul import matmul
from jaxsparse.kernels._operand import Operand
from jaxsparse.kernels._product import Engine
from jaxsparse.kernels._rules import MEASURED, Rules
from jaxsparse.tracing import Trace, retrace


def packed_apply(trace: Trace, *, rules: Rules = MEASURED) -> Callable[..., Any]:
    """Return a traced model as a function of packed parameters.

    This is the function that `sparsify` returns, for parameters that are already
    packed: restored from a checkpoint, or packed by `js.formats.pack` in a chosen
    format. A trace needs no parameters, so a process that runs the packed model never
    holds the dense one:

        shapes = jax.eval_shape(init)                      # of the dense parameters
        trace = js.trace(model, shapes, x)
        apply_fn = jax.jit(js.kernels.packed_apply(trace))

    The template for `js.checkpoint.restore`, `jax.eval_shape(lambda: packed)`, can be
    pickled beside the checkpoint.

    Args:
      trace: the trace from `js.trace`.
      rules: which engine multiplies; kernels for which no rule is quicker, or which the
        program needs as an array, are made dense in each call.

    Returns:
      `apply_fn(params, *inputs)`, for parameters with any kernels packed.

    Raises:
      TypeError: anything other than a trace or rules.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, x = {"w": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, jnp.ones((1, 2))
      >>> trace = js.trace(lambda p, x: x @ p["w"], params, x)
      >>> packed = js.formats.pack(*js.prune(params, 0.5), format=js.formats.Csr16)
      >>> js.kernels.packed_apply(trace)(packed, x)
      Array([[3., 4.]], dtype=float32)
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_is(Rules, "js.kernels.Rules(...)", rules=rules)
    return model_of(trace, rules, {})


def model_of(
    trace: Trace, rules: Rules, engines: Mapping[str, Engine]
) -> Callable[..., Any]:
    """The model for packed parameters; `engines` are those that were measured."""
    views = {path: kernel.view for path, kernel in trace.kernels.items()}

    def multiply(x: Array, operand: Operand) -> Array:
        packed = with_dtype(operand.value, operand.dtype)  # the model may cast it
        if operand.path in engines:
            return engines[operand.path](x, packed)
        return matmul(x, packed, rules=rules)

    def apply_fn(params: PyTree, *inputs: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_packed)
        shapes = [
            jax.ShapeDtypeStruct(x.view.shape, dtype_of(x)) if is_packed(x) else x
            for x in leaves
        ]
        inputs = jax.tree.map(jnp.asarray, inputs)
        own = retrace(trace, jax.tree.unflatten(treedef, shapes), inputs)

        def run(leaves: list[Any], flat: list[Array]) -> list[Array]:
            args = [
                Operand(path, x, views[path], dtype_of(x)) if is_packed(x) else x
                for path, x in zip(trace.paths, leaves, strict=True)
            ]
            made_dense = lambda operand, eqn: None
            return evaluate(own.program, [*args, *flat], multiply, made_dense)

        def specs(_: Any) -> list[Any]:
            dense = unpack if any(map(is_packed, leaves)) else lambda params: params
            whole = lambda params, xs: trace.apply_fn(dense(params), *xs)
            outs = jax.tree.leaves(jax.eval_shape(whole, params, inputs))
            return [jax.typeof(x).sharding.spec for x in outs]

        # A trace knows of no shardings. Where they are types, the compiler decides
        # within, and the results are sharded as the model's.
        outs = with_auto_axes(run, specs, leaves, jax.tree.leaves(inputs))
        return jax.tree.unflatten(jax.tree.structure(own.out_shape), outs)

    return apply_fn
