"""What is done with masks: apply, pack into bits, count."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _bits, _checks
from jaxsparse._dtypes import count_dtype
from jaxsparse._sharded import sharded_like
from jaxsparse._together import each
from jaxsparse._typing import Array, PyTree, Tree
from jaxsparse.tree import leaves_with_paths, like


class Pruned(NamedTuple):
    """A pruned model.

    Attributes:
      params: the parameters; removed weights are exactly 0.
      masks: a tree of bools, True = kept.
    """

    params: PyTree
    masks: PyTree


def apply(params: Tree, masks: PyTree) -> Tree:
    """Set removed weights to zero: `w <- w where mask, else 0`.

    It selects and does not multiply: NaN and Inf under a False mask become 0, and no
    -0.0 appears.

    Args:
      params: a tree of arrays.
      masks: a tree of bools with its structure, or with leaves at the same paths (as
        `nnx.as_pure(state)` has for an NNX state); each broadcasts to its parameter.

    Returns:
      The pruned parameters, of the same dtypes and shardings.

    Raises:
      ValueError: another structure, or a mask that does not broadcast.
      TypeError: a mask whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> masks = {"w": jnp.array([True, False])}
      >>> js.patterns.apply({"w": jnp.array([1.0, jnp.nan])}, masks)
      {'w': Array([1., 0.], dtype=float32)}
    """
    _checks.check_arrays(params=params)
    masks = like(masks, params, name="masks")
    check_masks(masks, params)
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(each(_where_kept, leaves, jax.tree.leaves(masks)))


def _where_kept(w: Array, mask: Array) -> Array:
    if jnp.issubdtype(w.dtype, jax.dtypes.extended):
        return w  # a random key, as an NNX state holds: there is no zero of its type
    w = jnp.asarray(w)
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


def check_masks(masks: PyTree, params: PyTree) -> None:
    """Raise an error unless `masks` are masks of `params`.

    Args:
      masks: a tree of bools to check.
      params: the parameters; only their shapes are read.

    Raises:
      ValueError: another structure, or a mask that does not broadcast to its parameter.
      TypeError: a leaf whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.ones((2, 3))}
      >>> js.patterns.check_masks({"w": jnp.array([[True, False, True]])}, params)
      >>> js.patterns.check_masks({"w": jnp.array([True, False])}, params)
      Traceback (most recent call last):
        ...
      ValueError: w: a mask of shape (2,) does not broadcast ...
    """
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_bools(masks)
    masks = like(masks, params, name="masks")
    for (path, mask), w in zip(
        leaves_with_paths(masks), jax.tree.leaves(params), strict=True
    ):
        shape, full = jnp.shape(mask), jnp.shape(w)
        if not _checks.broadcasts(shape, full):
            raise ValueError(
                f"{path}: a mask of shape {shape} does not broadcast to its parameter "
                f"of shape {full}. It must have that shape, size 1 on some axes, or be "
                "a scalar."
            )


def kept_count(mask: Array, shape: tuple[int, ...]) -> Array:
    """Count the weights of a parameter that its mask keeps.

    Args:
      mask: a mask that broadcasts to `shape`.
      shape: the parameter's shape.

    Returns:
      An integer scalar, int32 (int64 for 2**31 weights and more).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> int(js.patterns.kept_count(jnp.array([[True, False]]), (3, 2)))
      3
    """
    if getattr(mask, "dtype", None) != np.bool_:
        raise TypeError(f"mask must be an array of bools, got {_checks.shown(mask)}.")
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape must be a tuple of integers, got {shape!r}.")
    for n in shape:
        _checks.check_positive_int(n, name="shape", least=0)
    if not _checks.broadcasts(mask.shape, shape):
        raise ValueError(
            f"mask: the shape {tuple(mask.shape)} does not broadcast to {tuple(shape)}."
        )
    size = math.prod(shape)
    repeats = size // max(1, mask.size)
    dtype = count_dtype(size)
    return jnp.sum(mask, dtype=dtype) * jnp.asarray(repeats, dtype)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Packed masks, eight weights per byte.

    A pytree: `bits` are its leaves, `shapes` are static.

    Attributes:
      bits: a tree of uint8 vectors; the first weight is the highest bit.
      shapes: the masks' shapes, in the order of the leaves.
    """

    bits: PyTree
    shapes: tuple[tuple[int, ...], ...]


jax.tree_util.register_dataclass(Packed, data_fields=["bits"], meta_fields=["shapes"])


def pack(masks: PyTree) -> Packed:
    """Pack masks into bits: one byte holds eight weights.

    Args:
      masks: a tree of bools.

    Returns:
      The bits and the masks' shapes.

    Raises:
      TypeError: a leaf whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> packed = js.patterns.pack({"w": jnp.array([[True, False, True]])})
      >>> packed.bits["w"].tolist(), packed.shapes
      ([160], ((1, 3),))
    """
    _checks.check_bools(masks)
    bits = jax.tree.map(lambda m: sharded_like(_packed, jnp.asarray(m)), masks)
    return Packed(bits, tuple(jnp.shape(m) for m in jax.tree.leaves(masks)))


@jax.jit
def _packed(mask: Array) -> Array:
    return _bits.pack(jnp.ravel(mask), 0)


def unpack(packed: Packed) -> PyTree:
    """Turn packed bits into masks again.

    Args:
      packed: what `pack` returned.

    Returns:
      The masks, bit for bit.

    Raises:
      ValueError: bits that do not belong to their shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> masks = {"w": jnp.array([[True, False, True]])}
      >>> js.patterns.unpack(js.patterns.pack(masks))["w"].tolist()
      [[True, False, True]]
    """
    _checks.check_is(Packed, "js.patterns.pack(masks)", packed=packed)
    masks = []
    named = leaves_with_paths(packed.bits)
    for (path, bits), shape in zip(named, packed.shapes, strict=True):
        size = _bits.packed_shape((math.prod(shape),), 0)
        if bits.shape != size:
            raise ValueError(
                f"{path}: a mask of shape {shape} takes {size[0]} packed bytes, got an "
                f"array of shape {bits.shape}."
            )
        masks.append(_unpacked(bits, shape))
    return jax.tree.unflatten(jax.tree.structure(packed.bits), masks)


@functools.partial(jax.jit, static_argnames="shape")
def _unpacked(bits: Array, shape: tuple[int, ...]) -> Array:
    return _bits.unpack(bits, (math.prod(shape),), 0).reshape(shape)
