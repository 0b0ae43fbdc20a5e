"""Which axes of a kernel are contracted, produced, or merely carried."""

import dataclasses
import numbers
import warnings
from collections.abc import Mapping
from typing import Any

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.tree._classes import by_class
from jaxsparse.tree._paths import leaves_with_paths
from jaxsparse.tree._rules import matching


@dataclasses.dataclass(frozen=True)
class Axes:
    """The input, output and batch axes of a kernel.

    Attributes:
      input: the axes that a layer contracts with its input, slowest first. N:M groups
        run along them: their product is `d_in`.
      output: the axes that a layer produces.
      batch: axes that are carried along: layers stacked by a scan, experts. Each of
        their indices is a layer of its own and competes on its own.

    Negative axes count from the end. Every axis of the parameter is in exactly one.

    Example:
      >>> import jaxsparse as js
      >>> query = js.Axes(input=(0,), output=(1, 2))        # (in, heads, head_dim)
      >>> attention_out = js.Axes(input=(0, 1), output=(2,))  # (heads, head_dim, out)
      >>> torch_linear = js.Axes(input=(1,), output=(0,))
      >>> stacked = js.Axes(input=(1,), output=(2,), batch=(0,))
    """

    input: tuple[int, ...]
    output: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("input", "output", "batch"):
            axes = getattr(self, name)
            if not isinstance(axes, tuple | list) or not all(
                isinstance(a, numbers.Integral) for a in axes
            ):
                raise TypeError(
                    f"Axes: {name} must be a tuple of integers, such as (0,); got "
                    f"{axes!r}."
                )
            object.__setattr__(self, name, tuple(axes))

    def normalised(self, path: str, ndim: int) -> "Axes":
        """The same axes counted from the front, checked against a parameter.

        Args:
          path: the parameter's path, for the message.
          ndim: its number of axes.

        Returns:
          Axes without negative numbers.

        Raises:
          ValueError: an axis is missing, named twice or out of range.
        """
        named = (*self.input, *self.output, *self.batch)
        in_range = all(-ndim <= a < ndim for a in named)
        if not in_range or sorted(a % ndim for a in named) != list(range(ndim)):
            raise ValueError(
                f"{path}: {self} does not name each of the parameter's {ndim} axes "
                "exactly once."
            )
        front = lambda axes: tuple(a % ndim for a in axes)
        return Axes(front(self.input), front(self.output), front(self.batch))


AxesRule = Axes | Mapping[str, Axes] | None
"""One `Axes` for all, a mapping from paths or regular expressions, or the default."""


def default_axes(path: str, leaf: Any) -> Axes:
    """Return flax's axes: dense `(in, out)`, convolution `(*window, in, out)`.

    Args:
      path: the parameter's path, for the message.
      leaf: the parameter; only its number of axes is read.

    Returns:
      All axes but the last as input, the last as output.

    Raises:
      ValueError: three axes, which may be a one-dimensional convolution, an attention
        kernel or a stack of matrices; state them.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.tree.default_axes("conv/kernel", jnp.ones((3, 3, 8, 16)))
      Axes(input=(0, 1, 2), output=(3,), batch=())
    """
    if not hasattr(leaf, "ndim"):
        _checks.check_arrays(abstract=True, leaf=leaf)
    if leaf.ndim == 3:
        raise ValueError(
            f"{path}: a kernel of three axes, here {tuple(leaf.shape)}, may be a "
            "one-dimensional convolution (window, in, out), attention (in, heads, "
            "head_dim) or (heads, head_dim, out), or stacked layers (layer, in, out). "
            "State which, for instance axes={r'query/kernel$': Axes(input=(0,), "
            "output=(1, 2))}."
        )
    if leaf.ndim < 2:
        raise ValueError(
            f"{path}: a parameter of shape {tuple(leaf.shape)} has no input and output "
            "axes. Leave it out with `where`, or use js.Unstructured()."
        )
    return Axes(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))


def resolve_axes(params: PyTree, axes: AxesRule) -> dict[str, Axes]:
    """Return the stated axes by path. Leaves that are no arrays have none.

    Args:
      params: the parameters, or anything of their structure and shapes.
      axes: see `AxesRule`; in a mapping the first rule that matches wins, and a rule
        that is a path matches that path alone.

    Returns:
      A dictionary from path to axes with an entry where the caller stated something, or
      where the class of a layer does (Equinox's modules).

    Raises:
      ValueError: an expression matches no path or cannot be read, or axes do not fit
        their parameter.
      TypeError: neither `Axes` nor a mapping from expressions to `Axes`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"conv": jnp.ones((3, 3, 8, 16)), "query": jnp.ones((16, 4, 4))}
      >>> js.tree.resolve_axes(params, {"query": js.Axes(input=(0,), output=(-2, -1))})
      {'query': Axes(input=(0,), output=(1, 2), batch=())}
    """
    _checks.check_axes(axes)
    leaves = [(p, x) for p, x in leaves_with_paths(params) if hasattr(x, "ndim")]
    if not leaves:
        return {}
    if isinstance(axes, Axes):
        # One statement for all speaks of the kernels; vectors have no two sides.
        return {p: axes.normalised(p, x.ndim) for p, x in leaves if x.ndim >= 2}
    stated = {
        found.path: _outputs_first(found.leaf.ndim, found.ndim)
        for found in by_class(params)
        if found.ndim and 2 <= found.ndim <= found.leaf.ndim
    }
    shapes = dict(leaves)
    found = matching({} if axes is None else axes, shapes, name="axes")
    for path, value in found.items():
        stated[path] = value.normalised(path, shapes[path].ndim)
    return stated


def _outputs_first(ndim: int, own: int) -> Axes:
    """Of `[*stacked, out, in, *window]`."""
    lead = ndim - own
    return Axes(tuple(range(lead + 1, ndim)), (lead,), tuple(range(lead)))


def kernel_axes(path: str, leaf: Any, stated: Mapping[str, Axes]) -> Axes:
    """Return the stated axes of a parameter, or the default with a warning.

    An array does not say which of its axes are inputs. Without stated axes the layout
    of flax is assumed, and a warning says so once.

    Args:
      path: the parameter's path.
      leaf: the parameter.
      stated: the result of `resolve_axes`.

    Returns:
      Its axes.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.tree.kernel_axes("dense", jnp.ones((2, 3)), {})
      Axes(input=(0,), output=(1,), batch=())
    """
    _checks.check_mapping(Axes, "js.tree.resolve_axes(params, axes)", stated=stated)
    if path in stated:
        return stated[path]
    found = default_axes(path, leaf)
    warnings.warn(_GUESSED, stacklevel=2)
    return found


_GUESSED = (
    "No axes are stated for some kernels, so flax's layout is assumed: inputs first, "
    "outputs last, (in, out) or (*window, in, out). Others store (out, in): torch, "
    "Equinox, some of Hugging Face's Flax models; and transposed convolutions. Groups "
    "along the wrong axis are of no use to hardware. State them: axes=trace.axes with "
    "trace = js.trace(apply_fn, params, inputs), js.prune(..., trace=trace), or "
    "axes=js.Axes(input=(0,), output=(1,))."
)
