"""Trees of parameters with packed kernels in their place, and back."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.formats._bitmap import Bitmap, bitmap_bytes, bitmap_matrices, bitmap_of
from jaxsparse.formats._condensed import (
    Condensed,
    condensed_bytes,
    condensed_matrices,
    condensed_of,
)
from jaxsparse.formats._csr import Csr16, csr_bytes, csr_matrices, csr_of
from jaxsparse.formats._nm import Nm, nm_bytes, nm_matrices, nm_of
from jaxsparse.formats._tiles import (
    Tiles,
    check_divides,
    tiles_bytes,
    tiles_matrices,
    tiles_of,
)
from jaxsparse.formats._weight import Weight, weight_of
from jaxsparse.patterns import NM, Balanced, Block
from jaxsparse.tree import (
    AxesRule,
    from_matrices,
    is_rules,
    kernel_axes,
    leaves_with_paths,
    like,
    matching,
    matrix_view,
    resolve_axes,
    select,
)

PackedArray = Bitmap | Csr16 | Nm | Tiles | Condensed
"""What stands in the place of a kernel."""

Format = type[Bitmap] | type[Csr16] | type[Condensed] | NM | Block | Balanced
"""A format: a class, or the pattern of N:M groups or tiles."""

_TILES = ((1, 128), (16, 16), (1, 4))
_GROUPS = (NM(2, 4), NM(1, 4), NM(4, 8))


def pack(
    params: PyTree,
    masks: PyTree,
    *,
    format: Format | Mapping[str, Format] | None = None,
    where: Where = None,
    axes: AxesRule = None,
) -> PyTree:
    """Put kernels into a sparse format: arrays that are as small as what is kept.

    The result has packed arrays in the place of kernels, each a pytree of arrays with
    static shapes: it passes through `jax.jit`, `vmap` and `save`, and lies where the
    kernel did (split along its outputs and layers). `unpack` gives back
    `js.patterns.apply(params, masks)`, bit for bit and in the same type. It works on
    the host: call it outside of jit, or with masks that are constants there.

    A format is

    - `formats.Bitmap`: the kept values and a bit a weight. Any mask.
    - `formats.Csr16`: the kept values and the input of each. Any mask.
    - `formats.Condensed`: masks of whole inputs and outputs.
    - `js.NM(2, 4)`: at most so many of each group, stored as `formats.Nm`.
    - `js.Block((1, 4))`, `js.Balanced((1, 128))`: whole tiles, stored as
      `formats.Tiles`.
    - None: for each kernel the one of these with the fewest bytes, or dense where that
      is the smallest. `js.kernels` says which of them is quick, and on what.

    Args:
      params: a tree of arrays.
      masks: a tree of bools with its structure; each broadcasts to its parameter.
      format: one for all, or a mapping from paths or regular expressions; the first
        that matches counts, and parameters that none matches stay dense.
      where: which parameters are packed; by default those of two axes or more whose
        mask is not a scalar.
      axes: the input, output and batch axes, as for `js.patterns.masks`.

    Returns:
      The tree with packed kernels.

    Raises:
      ValueError: a mask without the structure of its format, with the first tile or
        group; tiles or groups that do not divide a kernel; a kernel without weights;
        masks that do not fit; an expression that matches nothing.
      TypeError: something else than a format; masks that are traced or not of bools.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 0.5)
      >>> packed = js.formats.pack(params, masks, format=js.formats.Csr16)
      >>> packed["kernel"].values.tolist(), packed["kernel"].columns.tolist()
      ([[3.0, 4.0]], [[0, 1]])
      >>> js.formats.unpack(packed)["kernel"].tolist()
      [[3.0, 0.0], [0.0, 4.0]]
    """
    weights = weights_of(params, masks, where=where, axes=axes)
    formats = _formats(params, format, weights)
    packed = {path: _packed(weights[path], own) for path, own in formats.items()}
    leaves = leaves_with_paths(params)
    found = [w if packed.get(path) is None else packed[path] for path, w in leaves]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def weights_of(
    params: PyTree, masks: PyTree, *, where: Where, axes: AxesRule
) -> dict[str, Weight]:
    """The kernels to pack, by path."""
    _checks.check_arrays(params=params)
    masks = like(masks, params, name="masks")
    patterns.check_masks(masks, params)
    _checks.check_known("formats.pack", masks=masks)
    stated = resolve_axes(params, axes)
    chosen = jax.tree.leaves(select(params, where)) if where is not None else None
    found = {}
    rows = zip(leaves_with_paths(params), jax.tree.leaves(masks), strict=True)
    for i, ((path, w), mask) in enumerate(rows):
        takes = np.ndim(w) >= 2 and np.ndim(mask) > 0 if chosen is None else chosen[i]
        if not takes:
            continue
        if not w.size:
            raise ValueError(
                f"{path}: a kernel of shape {tuple(w.shape)} has no weights. Leave it "
                "out with `where`."
            )
        view = matrix_view(tuple(w.shape), kernel_axes(path, w, stated))
        found[path] = weight_of(path, w, mask, view)
    return found


def _formats(
    params: PyTree, format: Any, weights: Mapping[str, Weight]
) -> dict[str, Format | None]:
    """The format of each kernel; None where it is to be found."""
    if format is None:
        return dict.fromkeys(weights)
    if not isinstance(format, Mapping):
        _check_format("format", format)
        return dict.fromkeys(weights, format)
    for rule, own in format.items():
        _check_format(f"format[{rule!r}]", own)
    if not is_rules(params, dict.fromkeys(format, 0)):
        return {path: format[path] for path in weights}
    none = "none of the kernels to pack"
    return matching(format, list(weights), name="format", none=none)


def _check_format(name: str, format: Any) -> None:
    if format in (Bitmap, Csr16, Condensed) or isinstance(
        format, NM | Block | Balanced
    ):
        return
    raise TypeError(
        f"{name} must be formats.Bitmap, Csr16 or Condensed, a pattern such as "
        f"js.NM(2, 4) or js.Balanced((1, 128)), or None; got {_checks.shown(format)}."
    )


def _packed(weight: Weight, format: Format | None) -> PackedArray | None:
    """One kernel; None where dense is the smallest."""
    format = smallest(weight) if format is None else format
    match format:
        case None:
            return None
        case NM():
            return nm_of(weight, format)
        case Block(shape=tile) | Balanced(shape=tile):
            check_divides(weight, tile)
            return tiles_of(weight, tile)
    made: Any = {Bitmap: bitmap_of, Csr16: csr_of, Condensed: condensed_of}
    return made[format](weight)


def bytes_of_each(weight: Weight) -> dict[Format, int]:
    """What a kernel takes in each format whose structure its mask has."""
    found: dict[Format, int] = {}
    tries: list[tuple[Format, Any]] = [
        (Condensed, condensed_bytes),
        *((Block(t), functools.partial(_tiled_bytes, tile=t)) for t in _TILES),
        *((nm, functools.partial(nm_bytes, pattern=nm)) for nm in _GROUPS),
        (Bitmap, bitmap_bytes),
        (Csr16, csr_bytes),
    ]
    for format, count in tries:
        try:
            found[format] = count(weight)
        except ValueError:  # it has another structure
            continue
    return found


def _tiled_bytes(weight: Weight, tile: tuple[int, int]) -> int:
    check_divides(weight, tile)
    return tiles_bytes(weight, tile)


def smallest(weight: Weight) -> Format | None:
    """The format of the fewest bytes; None where that is the dense one."""
    sizes = bytes_of_each(weight)
    best = min(sizes, key=lambda format: sizes[format])
    return best if sizes[best] < weight.kept.size * weight.itemsize else None


def is_packed(x: Any) -> bool:
    """Whether this is a packed kernel."""
    return isinstance(x, PackedArray)


def unpack(packed: PyTree) -> PyTree:
    """Give back the dense parameters, in which removed weights are 0.

    Jitted, XLA may fuse it into what uses the weights; `js.kernels` multiplies without
    the dense array.

    Args:
      packed: a tree of `pack`, or a packed array.

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


def matrices_of(packed: PackedArray) -> Array:
    """The dense matrices `[*batch, d_out, d_in]`, of as many layers as are there."""
    match packed:
        case Bitmap():
            return bitmap_matrices(packed)
        case Csr16():
            return csr_matrices(packed)
        case Nm():
            return nm_matrices(packed)
        case Tiles():
            return tiles_matrices(packed)
        case Condensed():
            return condensed_matrices(packed)


@jax.jit
def _dense(packed: PackedArray) -> Array:
    return from_matrices(matrices_of(packed), packed.view)


def values(packed: PyTree) -> PyTree:
    """Return the kept values: the part of packed parameters that is trained.

    A tree of plain floating-point arrays, of which any optax optimizer keeps moments
    that are as small. `with_values` puts them back:

        loss = lambda v, x: loss_fn(js.formats.with_values(packed, v), x)
        grads = jax.grad(loss)(js.formats.values(packed), x)

    Args:
      packed: a tree of `pack`, or a packed array.

    Returns:
      The tree with the values in the place of packed kernels; other leaves as they are.

    Raises:
      TypeError: something else.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 0.5)
      >>> packed = js.formats.pack(params, masks, format=js.formats.Csr16)
      >>> js.formats.values(packed)
      {'kernel': Array([[3., 4.]], dtype=float32)}
    """
    check_tree(packed)
    one = lambda x: x.values if is_packed(x) else x
    return jax.tree.map(one, packed, is_leaf=is_packed)


def with_values(packed: PyTree, values: PyTree) -> PyTree:
    """Put other values into packed parameters, under the same mask.

    Args:
      packed: a tree of `pack`, or a packed array.
      values: a tree as `values` gives it.

    Returns:
      The tree with these values.

    Raises:
      ValueError: values of another structure, or of other shapes.
      TypeError: something else than packed parameters.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 0.5)
      >>> packed = js.formats.pack(params, masks, format=js.formats.Csr16)
      >>> halved = {"kernel": js.formats.values(packed)["kernel"] / 2}
      >>> js.formats.unpack(js.formats.with_values(packed, halved))["kernel"].tolist()
      [[1.5, 0.0], [0.0, 2.0]]
    """
    check_tree(packed)
    one = lambda x: x.values if is_packed(x) else x
    plain = jax.tree.map(one, packed, is_leaf=is_packed)
    _checks.check_like(plain, of="packed", values=values)
    leaves, treedef = jax.tree.flatten(packed, is_leaf=is_packed)
    put = lambda x, own: dataclasses.replace(x, values=own) if is_packed(x) else own
    new = [put(x, own) for x, own in zip(leaves, jax.tree.leaves(values), strict=True)]
    return jax.tree.unflatten(treedef, new)
