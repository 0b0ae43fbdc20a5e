"""Statistics of the inputs of all kernels, by path."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.tracing.changes import Change, check_plain
from jaxsparse.tree import Axes, MatrixView


class InputStats(NamedTuple):
    """The statistics of the inputs `x` of a kernel: `n` rows of `d_in` numbers.

    Batch axes are those of the kernel's view: experts, stacked layers, the groups of a
    convolution. Rows may be weighted; then `count` is the sum of the weights.

    Attributes:
      count: `[*batch]`, float32 (float64 for float64 inputs, like all others). Where it
        is 0 no row was seen and the others are 0.
      mean: `[*batch, d_in]`, `E[x]`.
      square: `[*batch, d_in]`, `E[x^2]`; `sqrt` of it is the column norm, for one row.
      variance: `[*batch, d_in]`, `E[(x - E[x])^2]`.
      gram: `[*batch, d_in, d_in]`, `E[x x^T]`, or None where it was not asked for.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.calibration.init((), 2, gram=False)
      >>> state = js.calibration.update(state, jnp.array([[1.0, 2.0], [3.0, 2.0]]))
      >>> js.calibration.finalize(state).mean
      Array([2., 2.], dtype=float32)
    """

    count: Array
    mean: Array
    square: Array
    variance: Array
    gram: Array | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["kernels", "changes", "dense"],
)
@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of a model's inputs; kernels that read the same input share one.

    Attributes:
      inputs: by the name of an input.
      kernels: for each kernel its path, the name of its input, and how it is read.
      changes: by path the changes that the model makes to a kernel before it is
        contracted, as in `js.tracing.Kernel.changes`.
      dense: the paths and reasons of `left_dense`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.calibration.init((), 2, gram=False)
      >>> state = js.calibration.update(state, jnp.array([[1.0, 2.0], [3.0, 2.0]]))
      >>> view = js.tree.matrix_view((2, 4), js.Axes(input=(0,), output=(1,)))
      >>> stats = js.calibration.Statistics(
      ...     inputs={"x": js.calibration.finalize(state)},
      ...     kernels=(("query/kernel", "x", view), ("key/kernel", "x", view)),
      ... )
      >>> stats.of("key/kernel").mean
      Array([2., 2.], dtype=float32)
      >>> stats.axes
      {'^query/kernel$': Axes(input=(0,), output=(1,), batch=()),
       '^key/kernel$': Axes(input=(0,), output=(1,), batch=())}
    """

    inputs: dict[str, InputStats]
    kernels: tuple[tuple[str, str, MatrixView], ...]
    changes: tuple[tuple[str, tuple[Change, ...]], ...] = ()
    dense: tuple[tuple[str, str], ...] = ()

    @property
    def left_dense(self) -> dict[str, str]:
        """The parameters that the default selection left out, by path, with the reason.

        These look like kernels, but the trace could not follow them, or their inputs
        are not real numbers.
        """
        return dict(self.dense)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the kernels."""
        return tuple(path for path, _, _ in self.kernels)

    @property
    def axes(self) -> dict[str, Axes]:
        """The kernels' axes, to be passed to `js.patterns.masks(..., axes=...)`.

        Each is under a regular expression that matches its path alone. Where a view
        splits an axis into batches and outputs (the groups of a convolution), the axis
        counts as outputs. A kernel that is split otherwise has no axes and is left out.
        """
        found = {path: _own_axes(view) for path, _, view in self.kernels}
        return {f"^{re.escape(p)}$": axes for p, axes in found.items() if axes}

    def of(self, path: str) -> InputStats:
        """The statistics of the inputs that meet a kernel.

        Args:
          path: the kernel's path.

        Returns:
          Its `InputStats`.

        Raises:
          KeyError: the kernel has no statistics.
        """
        return self.inputs[self._entry(path)[1]]

    def view(self, path: str) -> MatrixView:
        """How a kernel is read as matrices.

        Args:
          path: the kernel's path.

        Returns:
          Its `MatrixView`.

        Raises:
          KeyError: the kernel has no statistics.
        """
        return self._entry(path)[2]

    def check_plain(self, path: str) -> None:
        """Raise an error unless the model contracts a kernel as it is stored.

        A score of the stored weights would not be a score of the weights in use. Masks
        are fine.

        Args:
          path: the kernel's path.

        Raises:
          ValueError: it is scaled, standardized or changed otherwise, with the line.
        """
        check_plain(path, dict(self.changes).get(path, ()))

    def _entry(self, path: str) -> tuple[str, str, MatrixView]:
        for entry in self.kernels:
            if entry[0] == path:
                return entry
        raise KeyError(
            f"There are no statistics of {path!r}; there are of {list(self.paths)}."
        )


def _own_axes(view: MatrixView) -> Axes | None:
    """The axes of the kernel's own shape, or None where no axes say the same."""
    if view.split == view.shape:
        return view.axes
    found: dict[str, tuple[int, ...]] = {"input": (), "output": (), "batch": ()}
    for axis, taken in enumerate(view.parts):
        if math.prod(view.split[a] for a in taken) != view.shape[axis]:
            return None
        # Parts of size 1 say nothing, but a kernel has outputs also where it has one.
        told = [a for a in taken if view.split[a] > 1 or a in view.axes.output]
        kinds = {k for k in found for a in told or taken if a in getattr(view.axes, k)}
        if kinds == {"output", "batch"}:
            kinds = {"output"}
        if len(kinds) > 1:
            return None
        found[kinds.pop()] += (axis,)
    return Axes(**found)


def check_statistics(stats: Any) -> None:
    """Raises a TypeError unless `stats` are statistics of a model's inputs."""
    made_by = "js.calibration.run(trace, params, batches)"
    _checks.check_is(Statistics, made_by, stats=stats)
