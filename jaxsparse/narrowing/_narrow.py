"""`narrow`: a model without the dropped channels, really smaller; and back again."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.coupling.drop import Drop
from jaxsparse.narrowing._arrays import cut_array, put_array
from jaxsparse.narrowing._cut import Cut
from jaxsparse.narrowing._plan import Plan, like, plan
from jaxsparse.narrowing._resize import Norms, Positions, resized
from jaxsparse.narrowing.retracing import as_sharded, by_shape, model_of
from jaxsparse.tracing import Trace
from jaxsparse.tracing.leaves import check_structure, checked_leaves


class Narrowed(NamedTuple):
    """A narrowed model: its parameters, the function that runs it, the new sizes.

    Attributes:
      params: the parameters without the dropped channels.
      apply_fn: `apply_fn(params, *inputs)` runs them: a pure function, to be jitted,
        differentiated, mapped and sharded like the model's own.
      sizes: for each axis that changed, by `(path, axis)`, its new size: for rebuilding
        the module.
    """

    params: PyTree
    apply_fn: Callable[..., Any]
    sizes: Mapping[tuple[str, int], int]


def narrow(
    trace: Trace,
    params: PyTree,
    drop: "Drop | Mapping[str, Any]",
    *,
    norms: Norms = "masked",
    positions: Positions = "slice",
    allow: Collection[str] = (),
) -> Narrowed:
    """Remove channels from all parameters that have them, and run the smaller model.

    The traced program is evaluated at the new sizes; no module is built. It returns
    what the masked model returns, up to rounding, with fewer weights and operations. (A
    Linen module refuses parameters of other shapes than its own, and a module rebuilt
    at another width may compute something else; see `norms`.)

    Differs from Torch-Pruning, which changes modules in place: this is a pure function,
    and each head, expert or scanned layer may lose channels of its own.

    Args:
      trace: from `js.trace`, of the model with all its channels.
      params: its parameters: arrays or `jax.ShapeDtypeStruct`s.
      drop: the channels to remove: from `js.channels.drop_lowest`, or a mapping from
        the names of `groups` to indices, `[k]` or `[*copies, k]`.
      norms: the divisor of a mean over a shortened axis. "masked" keeps the model's own
        number, so the result is that of the masked model. "resized" takes the new size,
        as a module built at the new width does (LayerNorm, RMSNorm). The same choice
        applies to sums in which a masked channel contributes a nonzero constant, such
        as a variance: "masked" adds those constants back, "resized" leaves them out.
        The scale of attention, 1 / sqrt(width of a head), is not changed.
      positions: the positions along a shortened axis (a `jnp.arange`, a one-hot).
        "slice" keeps the old numbers, so rotary embeddings stay right; "renumber"
        counts 0, 1, 2, ..., as for experts that are chosen by number. Random numbers
        follow the same choice: "slice" draws those of the whole model and cuts them;
        "renumber" draws as many as needed, which is less work for dropout but no longer
        gives the masked model's numbers.
      allow: flags of groups that do not forbid narrowing; see `groups`. With "input"
        the function takes inputs without the dropped channels.

    Returns:
      The smaller parameters, a function that runs them and the new sizes. Inputs of
      other shapes than the example's are traced anew, once for each.

    Raises:
      ValueError: a group that is not one of this model, channels that it does not have,
        a group that loses all of them or may not lose any; with the group's name and,
        for the last, the line of the model that forbids it. Parameters of other shapes
        than the traced ones. The returned function raises it for parameters of other
        shapes, and for inputs of a shape for which the model uses its parameters
        differently.
      NotImplementedError: where the function is differentiated, if the dropped channels
        cannot be followed through a `custom_jvp` or `custom_vjp` rule.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> x = jnp.ones((2, 4))
      >>> trace = js.trace(apply_fn, params, x)
      >>> small = js.narrowing.narrow(trace, params, {"up[1]": range(8)})
      >>> [w.shape for w in small.params.values()]
      [(8, 3), (4, 8)]
      >>> small.apply_fn(small.params, x).shape
      (2, 3)
      >>> small.sizes
      {('down', 0): 8, ('up', 1): 8}
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_arrays(abstract=True, params=params)
    wanted = plan(trace, drop, allow=allow, norms=norms, positions=positions)
    leaves = checked_leaves(trace, params)
    cut = wanted.cut
    axes = zip(leaves, trace.dims.values(), strict=True)
    small = jax.tree.unflatten(
        trace.treedef, [cut_array(cut, x, dims) for x, dims in axes]
    )
    sizes = {
        (path, axis): cut.size(d)
        for path, dims in trace.dims.items()
        for axis, d in enumerate(dims)
        if cut.size(d) != d.size
    }
    apply_fn = _runner(trace, wanted, norms, positions, allow)
    return Narrowed(small, apply_fn, sizes)


def widen(
    trace: Trace,
    params: PyTree,
    drop: "Drop | Mapping[str, Any]",
    *,
    allow: Collection[str] = (),
) -> PyTree:
    """Undo `narrow`: return parameters of the old shapes, with zeros where it cut.

    `narrow(trace, widen(trace, small, drop), drop)` gives `small` back bit for bit, and
    `widen` of narrowed parameters are the masked ones.

    Args:
      trace: the trace of the model with all its channels.
      params: narrowed parameters, maybe trained further; or `jax.ShapeDtypeStruct`s.
      drop: as given to `narrow`.
      allow: as given to `narrow`.

    Returns:
      Parameters for the original model.

    Raises:
      ValueError: as `narrow`; parameters that do not have the narrowed shapes.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.ones((3, 2))}
      >>> apply_fn = lambda p, x: x @ p["up"] @ p["down"]
      >>> trace = js.trace(apply_fn, params, jnp.ones((1, 4)))
      >>> small = js.narrowing.narrow(trace, params, {"up[1]": [1]})
      >>> js.narrowing.widen(trace, small.params, {"up[1]": [1]})["down"].tolist()
      [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_arrays(abstract=True, params=params)
    cut = plan(trace, drop, allow=(*allow, "zeros")).cut
    leaves, treedef = jax.tree.flatten(params)
    check_structure(trace, treedef)
    for path, x, dims in zip(trace.paths, leaves, trace.dims.values(), strict=True):
        if tuple(x.shape) != cut.shape(dims):
            raise ValueError(
                f"{path}: expected the narrowed shape {cut.shape(dims)}, got "
                f"{tuple(x.shape)}. Give the drop that these parameters were narrowed "
                "with."
            )
    axes = zip(leaves, trace.dims.values(), strict=True)
    return jax.tree.unflatten(
        trace.treedef, [put_array(cut, x, dims) for x, dims in axes]
    )


def drop_masks(
    trace: Trace,
    drop: "Drop | Mapping[str, Any]",
    *,
    allow: Collection[str] = (),
) -> PyTree:
    """Make masks of dropped channels, for training and reports with masks.

    Args:
      trace: the trace of the model.
      drop: the channels to remove; see `narrow`.
      allow: see `groups`.

    Returns:
      A mask tree, True = kept. A parameter's mask broadcasts to it: it has size 1 on
      axes that lose no channels, and is a scalar True if none does.

    Raises:
      ValueError: as `narrow`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.ones((3, 2))}
      >>> apply_fn = lambda p, x: x @ p["up"] @ p["down"]
      >>> trace = js.trace(apply_fn, params, jnp.ones((1, 4)))
      >>> masks = js.narrowing.drop_masks(trace, {"up[1]": [1]})
      >>> masks["up"].tolist(), masks["down"].tolist()
      ([[True, False, True]], [[True], [False], [True]])
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    cut = plan(trace, drop, allow=allow, masks=True).cut
    found = []
    for dims in trace.dims.values():
        mask = cut.mask(dims)
        found.append(mask if mask.size > 1 else np.array(True))
    return jax.tree.unflatten(trace.treedef, found)


def _check_sizes(cut: Cut, at: Trace, first: Cut, trace: Trace) -> None:
    for path, dims in trace.dims.items():
        if cut.shape(at.dims[path]) != first.shape(dims):
            shapes = [tuple(x.shape) for x in jax.tree.leaves(at.inputs)]
            raise ValueError(
                f"{path}: for inputs of shapes {shapes} the model uses it otherwise "
                "than with those that it was traced with. Trace it with these."
            )


def _runner(
    trace: Trace,
    wanted: Plan,
    norms: Norms,
    positions: Positions,
    allow: Collection[str],
) -> Callable[..., Any]:
    def build(at: Trace) -> Callable[..., list[Any]]:
        # Another trace has axes of its own, by the same names.
        cut, flags = wanted.cut, {*allow, "unread"}
        if at is not trace:
            again = plan(at, wanted.drop, allow=flags, norms=norms, positions=positions)
            cut = like(wanted.cut, trace, again.cut, at)
            _check_sizes(cut, at, wanted.cut, trace)
        return as_sharded(at, resized(at, cut, norms, positions))

    size = wanted.cut.size

    def whole(i: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an input that comes without what was dropped (`allow`)."""
        if i >= len(trace.input_dims) or len(shape) != len(trace.input_dims[i]):
            return shape
        pairs = zip(shape, trace.input_dims[i], strict=True)
        return tuple(d.size if size(d) != d.size else n for n, d in pairs)

    program_for = by_shape(trace, build, whole=whole)
    shapes = list(map(wanted.cut.shape, trace.dims.values()))
    return model_of(trace, program_for, shapes, "the narrowed model")
