"""`Condensed`: a kernel without the inputs and outputs that are removed whole."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array
from jaxsparse.formats._weight import Weight, index_type, placed, taken
from jaxsparse.tree import MatrixView


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "inputs", "outputs"],
    meta_fields=["view"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Condensed:
    """A kernel whose removed weights are whole inputs and whole outputs.

    The kept weights form a smaller dense matrix, which is quick on every platform.

    Attributes:
      values: `[*batch, kept inputs, kept outputs]`.
      inputs: `[*batch, kept inputs]`, uint16 or uint32: their numbers, ascending; None
        where all are kept.
      outputs: `[*batch, kept outputs]`, likewise.
      view: the kernel's shape and axes.
    """

    values: Array
    inputs: Array | None
    outputs: Array | None
    view: MatrixView


def condensed_of(weight: Weight) -> Condensed:
    """Packs a kernel."""
    inputs, outputs = kept_sides(weight)
    d_in, d_out = weight.view.d_in, weight.view.d_out
    layer = np.arange(len(inputs))[:, None, None] * d_out
    index = (layer + outputs[:, None, :]) * d_in + inputs[:, :, None]
    batch = weight.view.batch
    values = taken(weight.matrices.reshape(-1), index)
    values = values.reshape(*batch, *values.shape[1:])
    if isinstance(values, np.ndarray):
        values = placed(values, weight.place, values.ndim - 1)

    def numbers(side: np.ndarray, size: int, axis: int | None) -> Array | None:
        if side.shape[1] == size:
            return None
        shaped = side.reshape(*batch, side.shape[1]).astype(index_type(size))
        return placed(shaped, weight.place, axis)

    own = numbers(inputs, d_in, None), numbers(outputs, d_out, len(batch))
    return Condensed(values, *own, weight.view)


def kept_sides(weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the inputs and outputs that are kept, `[layers, kept]` each."""
    *batch, d_out, d_in = weight.kept.shape
    kept = weight.kept.reshape(math.prod(batch), d_out, d_in)
    outputs, inputs = np.any(kept, axis=2), np.any(kept, axis=1)
    odd = outputs[:, :, None] & inputs[:, None, :] & ~kept
    if odd.any():
        layer, output, at = np.unravel_index(np.argmax(odd), odd.shape)
        of = f" of layer {layer}" if batch else ""
        raise ValueError(
            f"{weight.path}: the weight of input {at} and output {output}{of} is "
            "removed, but neither of them whole. formats.Condensed holds masks of "
            "whole inputs and outputs, such as those of js.Channel; formats.Bitmap "
            "has any mask."
        )
    for name, side in (("inputs", inputs), ("outputs", outputs)):
        counts = side.sum(1)
        if (counts != counts[0]).any():
            first = int(np.argmax(counts != counts[0]))
            raise ValueError(
                f"{weight.path}: layer {first} keeps {counts[first]} {name}, layer 0 "
                f"keeps {counts[0]}. Layers of one array are condensed to one size; "
                "keep the same number in each, or unstack them."
            )
    numbers = lambda side: np.nonzero(side)[1].reshape(len(side), -1)
    return numbers(inputs), numbers(outputs)


def condensed_bytes(weight: Weight) -> int:
    """What it takes; an error where the mask has another structure."""
    inputs, outputs = kept_sides(weight)
    sizes = zip((inputs, outputs), (weight.view.d_in, weight.view.d_out), strict=True)
    indices = sum(x.size * index_type(n).itemsize for x, n in sizes if x.shape[1] < n)
    values = len(inputs) * inputs.shape[1] * outputs.shape[1]
    return values * weight.itemsize + indices


def condensed_matrices(packed: Condensed) -> Array:
    """The dense matrices `[*batch, d_out, d_in]`."""
    *batch, n_in, n_out = packed.values.shape
    d_out, d_in = packed.view.d_out, packed.view.d_in

    def one(values: Array, inputs: Array, outputs: Array) -> Array:
        dense = jnp.zeros((d_out, d_in), values.dtype)
        at = dense.at[outputs[:, None], inputs[None, :]]
        return at.set(values.T, unique_indices=True)

    layers = math.prod(batch)
    numbers = lambda x, n, size: (
        jnp.broadcast_to(jnp.arange(size), (layers, size))
        if x is None
        else x.reshape(layers, n).astype(jnp.int32)
    )
    dense = jax.vmap(one)(
        packed.values.reshape(layers, n_in, n_out),
        numbers(packed.inputs, n_in, d_in),
        numbers(packed.outputs, n_out, d_out),
    )
    return dense.reshape(*batch, d_out, d_in)
