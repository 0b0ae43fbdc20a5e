"""Some of a kernel's matrices: taken out, and put back.

Where the batch axes come first they are taken before they are transposed, so that of a
stack of layers no other is copied.
"""

import functools

import jax
import numpy as np
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.tree import Axes, MatrixView, from_matrices, to_matrices


@functools.partial(jax.jit, static_argnames="view")
def matrices_at(w: Array, places: np.ndarray, view: MatrixView) -> Array:
    """Some of a kernel's matrices, `[places, d_out, d_in]`."""
    if not view.batch:  # there is no other
        return to_matrices(w, view)[None]
    few = _of_few(view, len(places))
    if few is not None:
        flat = w.reshape(-1, *few.shape[1:])
        if len(places) == 1:  # the turn of a scan: a stretch of memory
            return to_matrices(lax.dynamic_slice_in_dim(flat, places[0], 1), few)
        return to_matrices(flat[places], few)
    matrices = to_matrices(w, view)
    return matrices.reshape(-1, *matrices.shape[-2:])[places]


def _replaced(w: Array, places: np.ndarray, new: Array, view: MatrixView) -> Array:
    """The parameter with some of its matrices replaced."""
    new = new.astype(w.dtype)
    if not view.batch:
        return from_matrices(new[0], view)
    few = _of_few(view, len(places))
    if few is not None:
        flat = w.reshape(-1, *few.shape[1:])
        part = from_matrices(new, few)
        if len(places) == 1:
            flat = lax.dynamic_update_slice_in_dim(flat, part, places[0], 0)
        else:
            flat = flat.at[places].set(part)
        return flat.reshape(view.shape)
    old = to_matrices(w, view)
    flat = old.reshape(-1, *old.shape[-2:])
    return from_matrices(flat.at[places].set(new).reshape(old.shape), view)


replaced = jax.jit(_replaced, static_argnames="view")
replaced_in_place = jax.jit(_replaced, static_argnames="view", donate_argnums=0)


def _of_few(view: MatrixView, count: int) -> MatrixView | None:
    """The view of `count` matrices, where the batch axes come first; else None."""
    axes, first = view.axes, len(view.batch)
    if axes.batch != tuple(range(first)) or view.split != view.shape:
        return None
    moved = lambda own: tuple(a - first + 1 for a in own)
    shape = (count, *view.shape[first:])
    few = Axes(input=moved(axes.input), output=moved(axes.output), batch=(0,))
    return MatrixView(shape, shape, few)
