"""Programs that were made of a trace, for inputs of other shapes than its own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsparse.tracing import Trace
from jaxsparse.tracing import trace as trace_of

Shape = tuple[int, ...]


def by_shape(
    trace: Trace,
    build: Callable[[Trace], Any],
    *,
    whole: Callable[[int, Shape], Shape] = lambda i, shape: shape,
) -> Callable[[Sequence[Any], Any], tuple[Any, Any]]:
    """Traces a model anew for inputs of other shapes or types, once for each.

    Args:
      trace: of the model with the example inputs.
      build: makes a program of a trace.
      whole: for the number of an input and its shape the shape that the model takes.

    Returns:
      A function of the parameters' leaves (of which only the types count) and the
      inputs; it gives the program for them, and the structure of the model's result.
    """
    known: dict[Any, tuple[Any, Any]] = {}
    traced = [v.aval for v in trace.program.jaxpr.invars]
    example = jax.tree.structure(tuple(trace.inputs))

    def program_for(leaves: Sequence[Any], inputs: Any) -> tuple[Any, Any]:
        flat, treedef = jax.tree.flatten(tuple(inputs))
        shapes = [x.shape for x in traced[: len(leaves)]]
        shapes += [whole(i, jax.typeof(x).shape) for i, x in enumerate(flat)]
        types = [jax.typeof(x) for x in (*leaves, *flat)]
        arrays = [
            jax.ShapeDtypeStruct(shape, t.dtype, weak_type=t.weak_type)
            for shape, t in zip(shapes, types, strict=True)
        ]
        key = treedef, tuple((x.shape, x.dtype, x.weak_type) for x in arrays)
        if key not in known:
            at = trace
            kinds = [[(x.shape, x.dtype) for x in xs] for xs in (arrays, traced)]
            if treedef != example or kinds[0] != kinds[1]:
                at = trace_of(
                    trace.apply_fn,
                    jax.tree.unflatten(trace.treedef, arrays[: len(leaves)]),
                    *jax.tree.unflatten(treedef, arrays[len(leaves) :]),
                    rules=trace.rules,
                )
            known[key] = build(at), jax.tree.structure(at.out_shape)
        return known[key]

    return program_for
