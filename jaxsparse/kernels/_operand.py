"""A packed kernel on its way through a program: moved about, and not yet made dense.

A model may reshape, transpose and cast a kernel before it contracts it. A packed kernel
stays as it is, and an array of indices follows where each of its weights would be.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.formats.dense import is_packed, matrices_of
from jaxsparse.tree import Axes, MatrixView, from_matrices, matrix_view, to_matrices


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """A kernel that a program holds.

    Attributes:
      path: the parameter's path.
      value: the packed kernel; or a dense one, where only shapes are asked for.
      view: of the layers that are there.
      dtype: the type that the program sees.
      moves: an array of the shape that the program sees, with the place of each weight
        in the kernel of `view`; None where it is seen as it is stored.
    """

    path: str
    value: Any
    view: MatrixView
    dtype: Any
    moves: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """What the program sees."""
        return self.view.shape if self.moves is None else self.moves.shape

    @property
    def index(self) -> np.ndarray:
        """`moves`, also where nothing was moved. As large as the kernel: not kept."""
        return _plain(self.view) if self.moves is None else self.moves

    @property
    def is_whole(self) -> bool:
        """Whether the program sees it as it is stored."""
        if self.moves is None:
            return True
        same = self.moves.shape == self.view.shape
        return same and np.array_equal(self.moves, _plain(self.view))


def _plain(view: MatrixView) -> np.ndarray:
    """The places of weights in their own order."""
    return np.arange(math.prod(view.shape), dtype=np.int32).reshape(view.shape)


def layer_of(operand: Operand, value: Any) -> Operand:
    """What a turn of a scan gets of it: `value` is its slice along the first axis."""
    axes, shape = operand.view.axes, operand.view.shape[1:]
    less = lambda own: tuple(a - 1 for a in own)
    own = Axes(less(axes.input), less(axes.output), less(axes.batch[1:]))
    return Operand(operand.path, value, matrix_view(shape, own), operand.dtype)


def has_layers(operand: Operand) -> bool:
    """Whether its first axis numbers layers that are apart in memory."""
    view = operand.view
    first = view.axes.batch[:1] == (0,) and view.split == view.shape
    return first and operand.is_whole


def moved(eqn: Any, operand: Operand) -> Operand | None:
    """What an equation makes of it; None if that is more than a move or a cast."""
    out, p, size = eqn.outvars[0].aval, eqn.params, math.prod(operand.shape)
    match eqn.primitive.name:
        case "convert_element_type" if jnp.issubdtype(out.dtype, jnp.floating):
            return dataclasses.replace(operand, dtype=out.dtype)
        case "copy" | "copy_p" | "sharding_constraint":
            return operand
        case "reshape" if p.get("dimensions") is None:
            moves = operand.index.reshape(out.shape)
        case "squeeze":
            moves = operand.index.reshape(out.shape)
        case "transpose":
            moves = operand.index.transpose(p["permutation"])
        case "broadcast_in_dim" if (
            math.prod(out.shape) == size
            and tuple(sorted(p["broadcast_dimensions"])) == p["broadcast_dimensions"]
        ):
            moves = operand.index.reshape(out.shape)
        case _:
            return None
    return dataclasses.replace(operand, moves=moves)


def dense_of(operand: Operand) -> Array:
    """The dense array that the program sees."""
    value = operand.value
    if is_packed(value):
        value = from_matrices(matrices_of(value), operand.view)
    if not operand.is_whole:
        value = value.reshape(-1)[operand.index]
    return value.astype(operand.dtype)


class Reading(NamedTuple):
    """How a contraction reads a kernel: orders of inputs and outputs; None as stored.

    Attributes:
      inputs: for each input of the kernel its place among the contracted ones.
      outputs: for each output of the contraction its place among the kernel's.
    """

    inputs: np.ndarray | None
    outputs: np.ndarray | None


def reading_of(
    operand: Operand, contracted: Sequence[int], batch: Sequence[int]
) -> Reading | None:
    """How it is read; None if that is not as its own matrices."""
    view, shape = operand.view, operand.shape
    free = [a for a in range(len(shape)) if a not in contracted and a not in batch]
    layers = math.prod(view.batch)
    if math.prod(shape[a] for a in batch) != layers:
        return None
    if math.prod(shape[a] for a in contracted) != view.d_in:
        return None
    axes = view.axes
    stored = (tuple(batch), tuple(contracted), tuple(free))
    if operand.moves is None and stored == (axes.batch, axes.input, axes.output):
        return Reading(None, None)
    index = operand.index
    seen = index.transpose((*batch, *contracted, *free))
    seen = seen.reshape(layers, view.d_in, view.d_out)
    own = to_matrices(_plain(view), view).reshape(layers, view.d_out, view.d_in)
    own = own.swapaxes(1, 2)
    if np.array_equal(seen, own):
        return Reading(None, None)
    # Where each weight is among the kernel's own matrices.
    place = np.empty(index.size, np.int64)
    place[own.reshape(-1)] = np.arange(index.size)
    at = place[seen]
    rows, columns = at[0, :, 0] // view.d_out, at[0, 0, :] % view.d_out
    layer = np.arange(layers)[:, None, None]
    expected = (layer * view.d_in + rows[:, None]) * view.d_out + columns[None, :]
    if not np.array_equal(at, expected):
        return None
    plain_order = lambda order: np.array_equal(order, np.arange(order.size))
    inputs = None if plain_order(rows) else np.argsort(rows)
    return Reading(inputs, None if plain_order(columns) else columns)


Multiply = Callable[[Array, Operand], Array]
"""Of inputs `[*batch, rows, d_in]` and a kernel the product `[*batch, rows, d_out]`."""


def contraction(
    eqn: Any, operand: Operand, x: Array, side: int, multiply: Multiply
) -> Array | None:
    """The result of a `dot_general` whose operand number `side` is a packed kernel."""
    contracted, batch = eqn.params["dimension_numbers"]
    own, other = contracted[side], contracted[1 - side]
    reading = reading_of(operand, own, batch[side])
    if reading is None:
        return None
    x_batch = batch[1 - side]
    free = [a for a in range(x.ndim) if a not in other and a not in x_batch]
    shape = operand.shape
    k_free = [a for a in range(len(shape)) if a not in own and a not in batch[side]]
    sizes = [x.shape[a] for a in x_batch], [x.shape[a] for a in free]
    rows = x.transpose((*x_batch, *free, *other))
    rows = rows.reshape(*operand.view.batch, math.prod(sizes[1]), operand.view.d_in)
    if reading.inputs is not None:
        rows = rows[..., reading.inputs]
    y = multiply(rows, operand)
    if reading.outputs is not None:
        y = y[..., reading.outputs]
    produced = [shape[a] for a in k_free]
    y = y.reshape(*sizes[0], *sizes[1], *produced)
    if side == 0:  # the free axes of the left operand come first
        b, f, k = len(sizes[0]), len(sizes[1]), len(produced)
        order = (*range(b), *range(b + f, b + f + k), *range(b, b + f))
        y = y.transpose(order)
    return y.astype(eqn.outvars[0].aval.dtype)


def convolution(
    eqn: Any, operand: Operand, x: Array, multiply: Multiply
) -> Array | None:
    """The result of a convolution: a product of its windows, each made one row."""
    p, rank = eqn.params, len(operand.shape)
    numbers = p["dimension_numbers"]
    kernel, out = numbers.rhs_spec, numbers.out_spec
    plain = p["feature_group_count"] == p["batch_group_count"] == 1
    if not plain or any(d != 1 for d in p["lhs_dilation"]):
        return None
    reading = reading_of(operand, (*kernel[2:], kernel[1]), ())
    if reading is None:
        return None
    window = [operand.shape[a] for a in kernel[2:]]
    batch, features, *space = numbers.lhs_spec
    image = x.transpose((batch, *space, features))
    rows = windows(image, window, p)
    flat = rows.reshape(
        *operand.view.batch, math.prod(rows.shape[:-1]), operand.view.d_in
    )
    flat = flat if reading.inputs is None else flat[..., reading.inputs]
    y = multiply(flat, operand)
    y = y if reading.outputs is None else y[..., reading.outputs]
    y = y.reshape(*rows.shape[:-1], operand.view.d_out)
    # From batch, places, features to where the result has them.
    back = (out[0], *out[2:], out[1])
    order = tuple(back.index(a) for a in range(rank))
    return y.transpose(order).astype(eqn.outvars[0].aval.dtype)


def windows(image: Array, window: Sequence[int], p: Mapping[str, Any]) -> Array:
    """`[batch, *places, window and features]` of an image `[batch, *space, features]`.

    Slices that are put side by side: XLA's own way is a convolution with an identity.
    """
    low, high = zip(*p["padding"], strict=True) if window else ((), ())
    edges = [(a, b, 0) for a, b in zip(low, high, strict=True)]
    whole = (0, 0, 0)
    zero = jnp.zeros((), image.dtype)
    padded = lax.pad(image, zero, (whole, *edges, whole))
    steps, spread = p["window_strides"], p["rhs_dilation"]
    sizes = padded.shape[1:-1]
    places = [
        (n - (w - 1) * d - 1) // s + 1
        for n, w, d, s in zip(sizes, window, spread, steps, strict=True)
    ]
    parts = []
    for at in np.ndindex(*window):
        begin = [i * d for i, d in zip(at, spread, strict=True)]
        ends = [
            b + (n - 1) * s + 1 for b, n, s in zip(begin, places, steps, strict=True)
        ]
        own = tuple(slice(b, e, s) for b, e, s in zip(begin, ends, steps, strict=True))
        parts.append(padded[(slice(None), *own)])
    return jnp.concatenate(parts, axis=-1)
