"""From packed kernels back to dense ones, and to the values that are trained."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse import _checks
from jaxsparse._sharded import fitting, with_auto_axes
from jaxsparse._typing import Array, PyTree
from jaxsparse.formats._condensed import Condensed
from jaxsparse.formats._int8 import Int8Tiles
from jaxsparse.formats._nm import Nm
from jaxsparse.formats.dense import PackedArray, is_packed, matrices_of
from jaxsparse.tree import from_matrices, path_str


def unpack(packed: PyTree) -> PyTree:
    """Return the dense parameters, in which removed weights are 0.

    Under jit, XLA may fuse it into the operations that use the weights; `js.kernels`
    multiplies without the dense array. For `Int8Tiles` it returns `scale * q`, which is
    within `scale / 2` of the weight; for all other formats it returns the packed
    weights bit for bit.

    Args:
      packed: a tree from `pack`, or a packed array.

    Returns:
      The tree with dense kernels.

    Raises:
      TypeError: something else.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"kernel": jnp.array([[3.0], [1.0]])}, 0.5)
      >>> js.formats.unpack(js.formats.pack(params, masks))["kernel"].tolist()
      [[3.0], [0.0]]
    """
    check_tree(packed)
    one = lambda x: _dense(x) if is_packed(x) else x
    return jax.tree.map(one, packed, is_leaf=is_packed)


def check_tree(packed: PyTree) -> None:
    """Raises unless this is a tree of arrays, packed or not."""
    if is_packed(packed) or isinstance(packed, jax.Array):
        return
    leaves = jax.tree.leaves(packed, is_leaf=is_packed)
    _checks.check_arrays(packed=[x for x in leaves if not is_packed(x)])
    if not any(map(is_packed, leaves)):
        raise TypeError(
            "packed: no packed kernel is in it; pass what js.formats.pack(params, "
            f"masks) gives, got {_checks.shown(packed)}."
        )


@jax.jit
def _dense(packed: PackedArray) -> Array:
    own = matrices_of if isinstance(packed, Int8Tiles) else _exact
    make = lambda x: from_matrices(own(x), x.view)
    return with_auto_axes(make, functools.partial(_spec, packed), packed)


@jax.custom_jvp
def _exact(packed: PackedArray) -> Array:
    """`matrices_of`, bit for bit: XLA computes with 16 bits in 32, which alters NaN."""
    dtype = packed.values.dtype
    whole = jnp.dtype(f"uint{8 * dtype.itemsize}")
    bits = lax.bitcast_convert_type(packed.values, whole)
    dense = matrices_of(dataclasses.replace(packed, values=bits))
    return lax.bitcast_convert_type(dense, dtype)


@_exact.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (packed,), (change,) = primals, tangents
    own = dataclasses.replace(packed, values=change.values)
    return _exact(packed), matrices_of(own)


def _spec(packed: PackedArray, dense: Any) -> PartitionSpec:
    """Layers and outputs lie as those of the values."""
    axes, view = packed.view.axes, packed.view
    if view.split != view.shape:
        return PartitionSpec()
    given = jax.typeof(packed.values).sharding.spec
    given = (*given, *[None] * packed.values.ndim)
    last = isinstance(packed, Nm | Condensed)
    at = packed.values.ndim - 1 if last else len(axes.batch)
    parts: list[Any] = [None] * dense.ndim
    for axis, part in zip(axes.batch, given, strict=False):
        parts[axis] = part
    if axes.output:
        parts[axes.output[0]] = given[at]
    sharding = NamedSharding(
        jax.typeof(packed.values).sharding.mesh, PartitionSpec(*parts)
    )
    return fitting(sharding, dense.shape).spec


def values(packed: PyTree) -> PyTree:
    """Return the kept values: the part of packed parameters that is trained.

    A tree of plain floating-point arrays, for which any optax optimizer keeps equally
    small moments. `with_values` puts them back:

        loss = lambda v, x: loss_fn(js.formats.with_values(packed, v), x)
        grads = jax.grad(loss)(js.formats.values(packed), x)

    Args:
      packed: a tree from `pack`, or a packed array.

    Returns:
      The tree with the values in the place of packed kernels; other leaves as they are.

    Raises:
      TypeError: something else; `Int8Tiles`, whose values are integers.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 0.5)
      >>> packed = js.formats.pack(params, masks, format=js.formats.Csr16)
      >>> js.formats.values(packed)
      {'kernel': Array([[3., 4.]], dtype=float32)}
    """
    check_tree(packed)
    _check_trains(packed)
    one = lambda x: x.values if is_packed(x) else x
    return jax.tree.map(one, packed, is_leaf=is_packed)


def _check_trains(packed: PyTree) -> None:
    """Raises for a kernel whose values cannot be trained."""
    leaves = jax.tree_util.tree_leaves_with_path(packed, is_leaf=is_packed)
    for keys, x in leaves:
        if isinstance(x, Int8Tiles):
            raise TypeError(
                f"{path_str(keys) or 'packed'}: the values of Int8Tiles are rounded "
                "integers and cannot be trained. Train in another format, such as "
                "formats.Csr16, and pack what comes out as Int8Tiles."
            )


def with_values(packed: PyTree, values: PyTree) -> PyTree:
    """Put other values into packed parameters, under the same mask.

    Args:
      packed: a tree from `pack`, or a packed array.
      values: a tree as `values` gives it.

    Returns:
      The tree with these values.

    Raises:
      ValueError: values of another structure, or of other shapes.
      TypeError: anything other than packed parameters; `Int8Tiles` among them.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 0.5)
      >>> packed = js.formats.pack(params, masks, format=js.formats.Csr16)
      >>> halved = {"kernel": js.formats.values(packed)["kernel"] / 2}
      >>> js.formats.unpack(js.formats.with_values(packed, halved))["kernel"].tolist()
      [[1.5, 0.0], [0.0, 2.0]]
    """
    check_tree(packed)
    _check_trains(packed)
    one = lambda x: x.values if is_packed(x) else x
    plain = jax.tree.map(one, packed, is_leaf=is_packed)
    _checks.check_like(plain, of="packed", values=values)
    leaves, treedef = jax.tree.flatten(packed, is_leaf=is_packed)
    put = lambda x, own: dataclasses.replace(x, values=own) if is_packed(x) else own
    new = [put(x, own) for x, own in zip(leaves, jax.tree.leaves(values), strict=True)]
    return jax.tree.unflatten(treedef, new)
