"""Programs that were made of a trace, for inputs of other shapes than its own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse._sharded import explicit_mesh, fitting
from jaxsparse._typing import PyTree
from jaxsparse.tracing import Trace
from jaxsparse.tracing import trace as trace_of
from jaxsparse.tracing.leaves import check_structure

Shape = tuple[int, ...]


def by_shape(
    trace: Trace,
    build: Callable[[Trace], Any],
    *,
    whole: Callable[[int, Shape], Shape] = lambda i, shape: shape,
) -> Callable[[Sequence[Any], Any], tuple[Any, Any]]:
    """Traces a model anew for inputs of other shapes or types, once for each."""
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


def model_of(
    trace: Trace, program_for: Callable[..., Any], shapes: Sequence[Shape], what: str
) -> Callable[..., Any]:
    """`apply_fn(params, *inputs)`, by `by_shape`, for parameters of these shapes."""

    def apply_fn(params: PyTree, *inputs: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        check_structure(trace, treedef)
        for path, x, shape in zip(trace.paths, leaves, shapes, strict=True):
            if tuple(np.shape(x)) != shape:
                raise ValueError(
                    f"{path}: {what} has the shape {shape} here, got "
                    f"{tuple(np.shape(x))}."
                )
        program, structure = program_for(leaves, inputs)
        return jax.tree.unflatten(structure, program(leaves, jax.tree.leaves(inputs)))

    return apply_fn


def as_sharded(
    trace: Trace, program: Callable[..., list[Any]]
) -> Callable[..., list[Any]]:
    """A program of a trace, where shardings are types.

    A trace knows of no shardings. On a mesh with explicit axes the compiler decides
    within, as on one with automatic axes, and the results are sharded as the model's.
    """
    traced = [v.aval for v in trace.program.jaxpr.invars]

    def run(leaves: Sequence[Any], flat: Sequence[Any], *rest: Any) -> list[Any]:
        mesh = explicit_mesh([*leaves, *flat])
        if mesh is None:
            return program(leaves, flat, *rest)
        lies = lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec)
        whole = [
            jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=fitting(lies(x), t.shape))
            for x, t in zip((*leaves, *flat), traced, strict=True)
        ]
        n = len(leaves)
        outs = jax.eval_shape(
            trace.apply_fn,
            jax.tree.unflatten(trace.treedef, whole[:n]),
            *jax.tree.unflatten(jax.tree.structure(trace.inputs), whole[n:]),
        )
        none = NamedSharding(mesh, PartitionSpec())
        shardings: Any = [x.sharding or none for x in jax.tree.leaves(outs)]
        automatic: Any = jax.sharding.auto_axes(program, out_sharding=shardings)
        return automatic(leaves, flat, *rest)

    return run
