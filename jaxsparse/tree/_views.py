"""A kernel as a batch of matrices `[d_out, d_in]`, which is what solvers work on."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from jaxsparse import _checks
from jaxsparse.tree._axes import Axes

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)
"""Of NumPy what is given as such."""


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A view of a parameter as matrices.

    Attributes:
      shape: the parameter's shape.
      split: the shape to which `axes` refer. It differs from `shape` only where a part
        of an axis is a batch: a grouped convolution `(*window, in/g, out)` is read as
        `(*window, in/g, g, out/g)`.
      axes: the input, output and batch axes of `split`.

    Example:
      >>> import jaxsparse as js
      >>> axes = js.Axes(input=(0, 1, 2), output=(3,))
      >>> view = js.tree.matrix_view((3, 3, 8, 16), axes)
      >>> view.batch, view.d_out, view.d_in
      ((), 16, 72)
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    axes: Axes

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the batch axes."""
        return tuple(self.split[a] for a in self.axes.batch)

    @property
    def d_out(self) -> int:
        """The rows of a matrix."""
        return math.prod(self.split[a] for a in self.axes.output)

    @property
    def d_in(self) -> int:
        """The columns of a matrix: the length of a row of inputs."""
        return math.prod(self.split[a] for a in self.axes.input)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of `shape` the axes of `split` that it consists of."""
        found, left, last = [], list(range(len(self.split))), len(self.shape) - 1
        for axis, size in enumerate(self.shape):
            own: list[int] = []
            while left and (
                not own or axis == last or math.prod(self.split[a] for a in own) < size
            ):
                own.append(left.pop(0))
            found.append(tuple(own))
        return tuple(found)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of `split` in the order batch, output, input."""
        return self.axes.batch + self.axes.output + self.axes.input


def matrix_view(
    shape: tuple[int, ...], axes: Axes, *, split: tuple[int, ...] | None = None
) -> MatrixView:
    """Return the view of a parameter of this shape.

    Args:
      shape: the parameter's shape.
      axes: its axes, or those of `split`.
      split: see `MatrixView`.

    Returns:
      A `MatrixView`.

    Raises:
      ValueError: `axes` do not name each axis once, or `split` is of another size.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.matrix_view((8, 4, 2), js.Axes(input=(0,), output=(1, 2))).d_out
      8
    """
    for name, sizes in (("shape", shape), ("split", shape if split is None else split)):
        if not isinstance(sizes, tuple | list):
            raise TypeError(f"{name} must be a tuple of integers, got {sizes!r}.")
        for n in sizes:
            _checks.check_positive_int(n, name=name, least=0)
    _checks.check_is(Axes, "js.Axes(input=(0,), output=(1,))", axes=axes)
    split = tuple(shape) if split is None else tuple(split)
    if math.prod(split) != math.prod(shape):
        raise ValueError(
            f"split {split} holds not as much as the shape {shape}: "
            f"{math.prod(split)} entries for {math.prod(shape)}."
        )
    return MatrixView(tuple(shape), split, axes.normalised("kernel", len(split)))


def to_matrices(w: AnyArray, view: MatrixView) -> AnyArray:
    """Return the parameter as `[*batch, d_out, d_in]`.

    Args:
      w: an array of the parameter's shape.
      view: the parameter's view.

    Returns:
      The same numbers; the last input axis is the fastest.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> view = js.tree.matrix_view((2, 3), js.Axes(input=(0,), output=(1,)))
      >>> js.tree.to_matrices(jnp.ones((2, 3)), view).shape
      (3, 2)
    """
    _check_array("w", w, view, lambda view: view.shape)
    ordered = w.reshape(view.split).transpose(view.order)
    return ordered.reshape(*view.batch, view.d_out, view.d_in)  # pyrefly: ignore


def from_matrices(matrices: AnyArray, view: MatrixView) -> AnyArray:
    """Undo `to_matrices`.

    Args:
      matrices: `[*batch, d_out, d_in]`.
      view: the parameter's view.

    Returns:
      An array of the parameter's shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> view = js.tree.matrix_view((2, 3), js.Axes(input=(0,), output=(1,)))
      >>> js.tree.from_matrices(jnp.ones((3, 2)), view).shape
      (2, 3)
    """
    shape = lambda view: (*view.batch, view.d_out, view.d_in)
    _check_array("matrices", matrices, view, shape)
    order = view.order
    w = matrices.reshape([view.split[a] for a in order])
    inverse = [order.index(a) for a in range(len(order))]
    return w.transpose(inverse).reshape(view.shape)  # pyrefly: ignore


def _check_array(name: str, x: Any, view: Any, shape: Callable[[Any], Any]) -> None:
    _checks.check_is(MatrixView, "js.tree.matrix_view(shape, axes)", view=view)
    _checks.check_arrays(**{name: x})
    if tuple(x.shape) != tuple(shape(view)):
        raise ValueError(
            f"{name} has the shape {tuple(x.shape)}, the view is of {shape(view)}."
        )
