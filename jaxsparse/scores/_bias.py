"""What the bias of a layer takes over from inputs that are removed."""

import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import Array


def bias_compensation(w: Array, mean: Array, kept: Array) -> Array:
    """Return what to add to the bias for removed inputs, `sum_j W_ij E[x_j]`.

    With it the layer's output keeps its mean over the calibration rows. An et al.
    (2023, arXiv:2312.11983); it holds for single weights as well as for channels.

    Args:
      w: the kernel before it is pruned, `[*batch, d_out, d_in]`, as
        `js.tree.to_matrices` makes it.
      mean: the inputs' mean, `[*batch, d_in]`.
      kept: bools, True = kept, for inputs `[*batch, d_in]` or for weights
        `[*batch, d_out, d_in]`.

    Returns:
      `[*batch, d_out]`, in the kernel's dtype.

    Raises:
      ValueError: a mean or a mask of another shape.
      TypeError: a mask whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> w, mean = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([10.0, 1.0])
      >>> js.scores.bias_compensation(w, mean, jnp.array([True, False]))
      Array([2., 4.], dtype=float32)
    """
    _checks.check_arrays(w=w, mean=mean, kept=kept)
    if jnp.ndim(w) < 2:
        raise ValueError(f"w must be [*batch, d_out, d_in], got shape {jnp.shape(w)}.")
    for name, x in (("w", w), ("mean", mean)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be real floating point, got {x.dtype}.")
    *batch, _, d_in = jnp.shape(w)
    if jnp.shape(mean) != (*batch, d_in):
        raise ValueError(
            f"A kernel of shape {jnp.shape(w)} has a mean of shape {(*batch, d_in)}, "
            f"got {jnp.shape(mean)}."
        )
    if jnp.shape(kept) not in ((*batch, d_in), jnp.shape(w)):
        raise ValueError(
            f"The mask has shape {jnp.shape(kept)}: it must have that of the mean, "
            f"{jnp.shape(mean)}, or that of the kernel, {jnp.shape(w)}."
        )
    if kept.dtype != jnp.bool_:
        raise TypeError(f"A mask holds bools, True = kept; got {kept.dtype}.")
    wide = max(w.dtype, mean.dtype, key=lambda dtype: dtype.itemsize)
    by_weight = kept if kept.ndim == w.ndim else kept[..., None, :]
    lost = jnp.where(by_weight, jnp.zeros((), wide), w.astype(wide))
    return jnp.sum(lost * mean[..., None, :].astype(wide), axis=-1).astype(w.dtype)
