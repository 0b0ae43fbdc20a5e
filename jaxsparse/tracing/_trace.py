"""`trace`: what a model does with each of its parameters."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives.axes import Axis
from jaxsparse.primitives.dims import Dims
from jaxsparse.program import Address, abstract
from jaxsparse.tracing._found import Kernel, Unfollowed, kernels_of
from jaxsparse.tracing.changes import Past
from jaxsparse.tracing.values import Node, Origin, Site
from jaxsparse.tracing.walk import Walk
from jaxsparse.tree import (
    Axes,
    has_plain_name,
    leaves_with_paths,
    nearest,
    why_dense,
)

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The use of each parameter in a model. It holds no parameters.

    Attributes:
      kernels: by path, in the order in which the model first reads them.
      lookups: for each parameter that is indexed (an embedding) the lines of the model.
      unfollowed: the uses that the trace could not follow.
      apply_fn: the function that was traced.
      program: its jaxpr.
      paths: the parameters' paths, in the order of the program's first variables.
      treedef: the structure of the parameters.
      out_shape: the abstract result.
      inputs: the abstract example inputs.
      leading: the axes of the first input; the first one numbers the samples.
      rules: the rules given for foreign primitives.
      dims: each parameter's axes as expressions: axes that must have the same indices,
        in any parameters, share their leaves.
      input_dims: the same for each array of the example inputs, in their flat order.
      nodes: the same for the operands and results of every equation.
      constants: the same for the constants of every jaxpr.
      layers: the axis that each scan runs over.
      sites: the equations that contract parameters with data.
      kept: the results of analyses, see `once`.
    """

    kernels: Mapping[str, Kernel]
    lookups: Mapping[str, tuple[str, ...]]
    unfollowed: tuple[Unfollowed, ...]
    apply_fn: Callable[..., Any]
    program: Any
    paths: tuple[str, ...]
    treedef: Any
    out_shape: Any
    inputs: Any
    leading: Dims
    rules: Mapping[str, str]
    dims: Mapping[str, Dims]
    input_dims: tuple[Dims, ...]
    nodes: Mapping[Address, Node]
    constants: Mapping[Address, tuple[Dims, ...]]
    layers: Mapping[Address, Axis]
    sites: tuple[Site, ...]
    kept: dict[Any, Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def once(self, look: Callable[["Trace"], Found]) -> Found:
        """Return what a function finds in this trace, and call the function only once.

        Args:
          look: a function of a trace alone.

        Returns:
          Its result.
        """
        if look not in self.kept:
            self.kept[look] = look(self)
        return self.kept[look]

    @property
    def axes(self) -> dict[str, Axes]:
        """Each kernel's axes, in the form that `axes=` takes everywhere.

        Grouped convolutions are left out: their groups are a part of an axis, which
        `Axes` cannot describe.
        """
        return {
            f"^{re.escape(path)}$": kernel.view.axes
            for path, kernel in self.kernels.items()
            if kernel.view.split == kernel.view.shape
        }

    def where(self, path: str, leaf: Any) -> bool:
        """The default selection: kernels, by their use in the model.

        It selects kernels of two axes and more. Parameters that are indexed stay dense,
        even if they are also contracted elsewhere (tied embeddings), and so do
        parameters named as an embedding, a token, a position or a LoRA factor. Names of
        modules (but `lora`), and the names of plain weights, do not count. It is what
        `where=None` means wherever there is a trace; elsewhere pass
        `where=trace.where`.

        Args:
          path: the parameter's path.
          leaf: the parameter; only its shape and dtype are read.

        Returns:
          Whether it takes part.

        Example:
          >>> import jax.numpy as jnp, jaxsparse as js
          >>> params = {"words": jnp.ones((9, 4)), "up": jnp.ones((4, 4))}
          >>> apply_fn = lambda p, ids: p["words"][ids] @ p["up"] @ p["words"].T
          >>> t = js.trace(apply_fn, params, jnp.arange(3))
          >>> js.prune(params, 0.5, where=t.where).masks["words"]
          Array(True, dtype=bool)
        """
        if path not in self.kernels or path in self.lookups:
            return False
        why = why_dense(path, leaf)
        by_module = why in ("an embedding", "a scale", "a position")
        return why is None or (by_module and has_plain_name(path))

    @property
    def flops(self) -> int:
        """The operations of all contractions of kernels, for the example inputs."""
        return sum(kernel.flops for kernel in self.kernels.values())

    def __str__(self) -> str:
        width = max([len(path) for path in self.kernels] + [6])
        head = (
            f"{'kernel':{width}}  {'shape':18} {'in':10} {'out':10} {'batch':8} MFLOP"
        )
        rows = [head]
        for path, kernel in self.kernels.items():
            axes, shape = kernel.view.axes, kernel.view.split
            cells = [
                ",".join(map(str, a)) for a in (axes.input, axes.output, axes.batch)
            ]
            sizes = "x".join(map(str, shape))
            rows.append(
                f"{path:{width}}  {sizes:18} {cells[0]:10} {cells[1]:10} "
                f"{cells[2]:8} {kernel.flops / 1e6:.3g}"
            )
        rows += [f"not followed: {u.reason}" for u in self.unfollowed]
        return "\n".join(rows)


def trace(
    apply_fn: Callable[..., Any],
    params: PyTree,
    *example_inputs: Any,
    rules: Mapping[str, str] | None = None,
) -> Trace:
    """Find where and how each parameter of any model is contracted.

    The model is traced once, with abstract values: nothing is computed. The jaxpr tells
    for each kernel which of its axes are contracted with data (input axes), which are
    produced (output), and which are carried along (batch: experts, layers stacked for a
    scan, groups of a convolution). Axes are followed through reshapes, transposes,
    slices, reversals, concatenations and casts, and through jit, remat, custom
    derivatives, scan, while, cond and vmap. `w[i]` counts as a layer where `i` counts
    the turns of a loop, `(x * a).sum(-1)` as a contraction, and parts of a kernel that
    read different inputs as a batch of matrices.

    Differs from Torch-Pruning's and OTO's graphs: they hook module classes or walk
    autograd nodes, and assume that unknown operations are elementwise. Here nothing
    depends on classes or names, and `Trace.unfollowed` lists unknown uses.

    Args:
      apply_fn: `apply_fn(params, *example_inputs)`: a Linen module's `apply`, a
        function that merges an NNX graph definition and state, an Equinox model
        combined with its static part, or any other function.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      *example_inputs: arrays or `jax.ShapeDtypeStruct`s of the shapes to be used.
      rules: for primitives that JAX does not know from inside, such as
        `"pallas_call[my_kernel]"` or `"ffi_call[my_target]"`, an einsum-like equation
        of their operands and results, `"btd,df->btf"`; `?` stands for an operand that
        takes no part. The name in brackets may be left out.

    Returns:
      A `Trace`.

    Raises:
      TypeError: `params` hold no arrays, or leaves that are not arrays; a TypeError of
        `apply_fn` itself, with the shapes that it was called on.
      ValueError: an equation in `rules` cannot be read or does not fit, or is for a
        primitive that the model does not have; a ValueError of `apply_fn` itself.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"query": jnp.ones((16, 4, 8)), "bias": jnp.ones((4, 8))}
      >>> def apply_fn(params, x):
      ...     flat = params["query"].reshape(16, 32)
      ...     return (x @ flat).reshape(-1, 4, 8) + params["bias"]
      >>> t = js.trace(apply_fn, params, jnp.ones((5, 16)))
      >>> t.kernels["query"].view.axes
      Axes(input=(0,), output=(1, 2), batch=())
      >>> t.kernels["query"].flops == 2 * 5 * 16 * 32
      True
    """
    _checks.check_callable(1 + len(example_inputs), apply_fn=apply_fn)
    _checks.check_arrays(abstract=True, params=params)
    if rules is not None:
        _checks.check_mapping(rules=rules)
    found = leaves_with_paths(params)
    if not found:
        raise TypeError("params: there are no arrays in them.")
    flat, treedef = jax.tree.flatten(params)
    shapes = [abstract(x) for x in flat]
    inputs = jax.tree.map(
        lambda x: abstract(x) if hasattr(x, "shape") else x, example_inputs
    )
    traced = jax.make_jaxpr(
        lambda leaves, inputs: apply_fn(jax.tree.unflatten(treedef, leaves), *inputs),
        return_shape=True,
    )
    with _checks.explained("apply_fn", params=shapes, inputs=inputs):
        program, out_shape = traced(shapes, inputs)
    walk = Walk(rules or {})
    paths = tuple(path for path, _ in found)
    args = []
    for i, var in enumerate(program.jaxpr.invars):
        value = walk.new(var.aval.shape, data=i >= len(paths))
        if i < len(paths):
            own = _own(paths[i], walk, var.aval.shape)
            value = value._replace(origin=own, past=Past(frozenset({paths[i]})))
        args.append(value)
    results = walk.whole(program, args)
    for name in rules or ():
        if name not in walk.seen:
            raise ValueError(
                f"rules: {name!r} is no primitive of this model; the nearest: "
                f"{nearest(name, sorted(walk.seen))}."
            )
    for name, values in (("input", args[len(paths) :]), ("output", results)):
        for axis in (axis for value in values for axis in value.dims):
            algebra.flag(axis, name)
    kernels, unfollowed = kernels_of(walk, dict(zip(paths, shapes, strict=True)))
    lookups = {path: tuple(lines) for path, lines in walk.lookups.items()}
    return Trace(
        kernels,
        lookups,
        unfollowed,
        apply_fn,
        program,
        paths,
        treedef,
        out_shape,
        inputs,
        next((v.dims for v in args[len(paths) :] if v.dims), ()),
        rules or {},
        {path: value.dims for path, value in zip(paths, args, strict=False)},
        tuple(value.dims for value in args[len(paths) :]),
        walk.nodes,
        walk.constants,
        walk.layers,
        walk.sites,
    )


def _own(path: str, walk: Walk, shape: tuple[int, ...]) -> Any:
    dims = walk.new(shape, data=False).dims  # apart from the axes that are unified
    return Origin(((path, dims),), dims)
