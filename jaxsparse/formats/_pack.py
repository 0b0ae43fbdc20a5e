"""Trees of parameters with packed kernels in their place."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsparse import _checks, patterns
from jaxsparse._typing import PyTree, Where
from jaxsparse.formats._bitmap import Bitmap, bitmap_bytes, bitmap_of
from jaxsparse.formats._condensed import (
    Condensed,
    condensed_bytes,
    condensed_of,
)
from jaxsparse.formats._csr import Csr16, csr_bytes, csr_of
from jaxsparse.formats._int8 import Int8Tiles, int8_bytes, int8_tiles_of
from jaxsparse.formats._nm import nm_bytes, nm_of
from jaxsparse.formats._tiles import (
    check_divides,
    tiles_bytes,
    tiles_of,
)
from jaxsparse.formats._weight import Weight, weight_of
from jaxsparse.formats.dense import PackedArray
from jaxsparse.patterns import NM, Balanced, Block
from jaxsparse.tree import (
    AxesRule,
    is_rules,
    kernel_axes,
    leaves_with_paths,
    like,
    matching,
    matrix_view,
    resolve_axes,
    select,
)

Format = (
    type[Bitmap]
    | type[Csr16]
    | type[Condensed]
    | type[Int8Tiles]
    | NM
    | Block
    | Balanced
)
"""A format: a class, or the pattern of N:M groups or tiles."""

ROUNDED = frozenset({Int8Tiles.__name__})
"""The formats, by name, whose weights are not those that were packed."""

_MAKERS: dict[Any, Any] = {
    Bitmap: bitmap_of,
    Csr16: csr_of,
    Condensed: condensed_of,
    Int8Tiles: int8_tiles_of,
}
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
    """Store pruned kernels in a sparse format.

    The result has packed arrays in place of kernels, each a pytree of arrays with
    static shapes. It passes through `jax.jit`, `vmap` and `save`, and keeps the
    kernel's sharding (split along its outputs and layers). Parameters that stay dense
    are masked, so `unpack` returns `js.patterns.apply(params, masks)` bit for bit
    (except for `Int8Tiles`, which rounds). It works on the host: call it outside of
    jit, or with masks that are constants there.

    A format is

    - `formats.Bitmap`: the kept values and a bit a weight. Any mask.
    - `formats.Csr16`: the kept values and the input of each. Any mask.
    - `formats.Condensed`: masks of whole inputs and outputs.
    - `js.NM(2, 4)`: at most 2 of each 4 weights, stored as `formats.Nm`.
    - `js.Block((1, 4))`, `js.Balanced((1, 128))`: whole tiles, stored as
      `formats.Tiles`.
    - `formats.Int8Tiles`: weights rounded to int8. Any mask, smallest and quickest with
      those of `js.Block((4, 1))`. Never chosen unless asked for.
    - None: the smallest exact format of each kernel, or dense where that is the
      smallest. See `js.kernels` for which formats are quick, and on which platform.

    Args:
      params: a tree of arrays.
      masks: a tree of bools with its structure; each broadcasts to its parameter.
      format: one format for all, or a mapping from paths or regular expressions; the
        first match applies, and parameters without a match stay dense.
      where: which parameters are packed; by default those of two axes or more whose
        mask is not a scalar.
      axes: the input, output and batch axes, as for `js.patterns.masks`.

    Returns:
      The tree with packed kernels.

    Raises:
      ValueError: a mask without the structure of its format, with the first tile or
        group; tiles or groups that do not divide a kernel; a kernel without weights;
        masks that do not fit; an expression that matches nothing; for `Int8Tiles` a
        weight that is not finite.
      TypeError: anything other than a format; masks that are traced or not of bools;
        for `Int8Tiles` weights that are traced or not of floating point.

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
    packed = {path: pack_one(weights[path], own) for path, own in formats.items()}
    there = {path: x for path, x in packed.items() if x is not None}
    return with_packed(params, masks, there)


def with_packed(
    params: PyTree, masks: PyTree, packed: Mapping[str, PackedArray]
) -> PyTree:
    """The parameters with packed kernels; others are masked, and those alone copied."""
    named = leaves_with_paths(params)
    masks = jax.tree.leaves(like(masks, params, name="masks"))
    pairs = zip(named, masks, strict=True)
    pruned = {path: (w, m) for (path, w), m in pairs if np.ndim(m) or not bool(m)}
    rest = {path: both for path, both in pruned.items() if path not in packed}
    dense = {path: w for path, (w, _) in rest.items()}
    masked = patterns.apply(dense, {path: m for path, (_, m) in rest.items()})
    own = {**dict(named), **masked, **packed}
    return jax.tree.unflatten(jax.tree.structure(params), [own[p] for p, _ in named])


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
        check_format("format", format)
        return dict.fromkeys(weights, format)
    for rule, own in format.items():
        check_format(f"format[{rule!r}]", own)
    if not is_rules(params, dict.fromkeys(format, 0)):
        return {path: format[path] for path in weights}
    none = "none of the kernels to pack"
    return matching(format, list(weights), name="format", none=none)


def check_format(name: str, format: Any) -> None:
    known = isinstance(format, type) and format in _MAKERS
    if known or isinstance(format, NM | Block | Balanced):
        return
    raise TypeError(
        f"{name} must be formats.Bitmap, Csr16, Condensed or Int8Tiles, a pattern such "
        f"as js.NM(2, 4) or js.Balanced((1, 128)), or None; got "
        f"{_checks.shown(format)}."
    )


def pack_one(weight: Weight, format: Format | None) -> PackedArray | None:
    """Pack one kernel; None where dense is the smallest."""
    format = smallest(weight) if format is None else format
    match format:
        case None:
            return None
        case NM():
            return nm_of(weight, format)
        case Block(shape=tile) | Balanced(shape=tile):
            check_divides(weight, tile)
            return tiles_of(weight, tile)
    return _MAKERS[format](weight)


def bytes_of_each(weight: Weight) -> dict[Format, int]:
    """Return the bytes of a kernel in each exact format whose structure it has."""
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


def sizes(
    params: PyTree, masks: PyTree, *, where: Where = None, axes: AxesRule = None
) -> dict[str, dict[str, int]]:
    """Count the bytes of pruned kernels in each format, without packing them.

    `js.report.format_table` shows them.

    Args:
      params: a tree of arrays.
      masks: a tree of bools with its structure.
      where: as for `pack`.
      axes: as for `pack`.

    Returns:
      For each kernel's path the bytes by the format's name, "dense" first, and last
      `Int8Tiles`, which rounds. A format is left out if the mask does not have its
      structure.

    Raises:
      ValueError: as for `pack`.
      TypeError: as for `pack`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> kernel = jnp.arange(4096.0).reshape(64, 64)
      >>> params, masks = js.prune({"kernel": kernel}, 0.9, axes=js.Axes((0,), (1,)))
      >>> js.formats.sizes(params, masks, axes=js.Axes((0,), (1,)))["kernel"]
      {'dense': 16384, 'Bitmap': 2152, 'Csr16': 2720, 'Int8Tiles': 1284}
    """
    found = {}
    for path, weight in weights_of(params, masks, where=where, axes=axes).items():
        each = bytes_of_each(weight)
        named = {_name(format): count for format, count in each.items()}
        found[path] = {"dense": weight.kept.size * weight.itemsize, **named}
        with contextlib.suppress(TypeError, ValueError):  # not every kernel is rounded
            found[path][Int8Tiles.__name__] = int8_bytes(weight)
    return found


def _name(format: Format) -> str:
    match format:
        case NM(keep=keep, of=of):
            return f"NM({keep}, {of})"
        case Block(shape=shape) | Balanced(shape=shape):
            return f"Block({shape})"
    return format.__name__


def _tiled_bytes(weight: Weight, tile: tuple[int, int]) -> int:
    check_divides(weight, tile)
    return tiles_bytes(weight, tile)


def smallest(weight: Weight) -> Format | None:
    """The format of the fewest bytes; None where that is the dense one."""
    sizes = bytes_of_each(weight)
    best = min(sizes, key=lambda format: sizes[format])
    return best if sizes[best] < weight.kept.size * weight.itemsize else None
