"""Selection: scores, a sparsity and a pattern become masks."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._sharded import sharded_like
from jaxsparse._typing import Array, PyTree, Sparsity, Where
from jaxsparse.patterns._counts import count_dtype, removed_count
from jaxsparse.patterns._floor import top_k_with_floor
from jaxsparse.patterns._nm import group_inputs, nm_mask
from jaxsparse.patterns._rows import together, top_k_masks_of_each
from jaxsparse.patterns._shards import (
    AxisName,
    Split,
    names_along,
    pieces,
    splits_of,
)
from jaxsparse.patterns._spec import NM, Block, Channel, Pattern, Unstructured
from jaxsparse.patterns._threshold import top_k_masks
from jaxsparse.patterns._units import (
    batch_axes,
    block_scores,
    channel_scores,
    expand_blocks,
)
from jaxsparse.tree import (
    Axes,
    AxesRule,
    kernel_axes,
    leaves_with_paths,
    resolve_axes,
    select,
)


def masks(
    scores: PyTree,
    sparsity: Sparsity = None,
    *,
    pattern: Pattern = Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    min_keep: int = 1,
    axis_name: AxisName | None = None,
) -> PyTree:
    """Masks that keep the highest scores.

    In every competing group of `n` units exactly `floor(s * n + 1/2)` are removed, the
    lowest scores first; among equal scores the one with the lower flat index is kept.
    The result is the same eager and jitted, on one device and on many.

    No layer vanishes: `min_keep` of its units stay. In a group of one layer, or of one
    output, fewer are removed where `floor(s * n + 1/2)` would leave less. Where all
    layers compete, the best `min_keep` of each come first and the best of all others
    after them, so that the total stays exact unless that many are more than it keeps.

    Args:
      scores: a tree of floating-point arrays, one score a weight, larger = keep.
      sparsity: the fraction to remove, in [0, 1); a number, a traced scalar, or (not
        in the global scope) a tree of them with the structure of `scores`, as
        `jaxsparse.allocations` makes. May be left out for `NM`, which has its own.
      pattern: what lives or dies together, and who competes with whom.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: the input, output and batch axes of kernels whose layout is not flax's;
        one `jaxsparse.tree.Axes` for all or a mapping from regular expressions.
      min_keep: how many units (weights, tiles or channels) each group and each layer
        keeps at least, or all of a smaller one. A layer is a parameter, or one index of
        its batch axes where these are stated. 0: a layer may lose everything. `NM`
        keeps `keep` of every group whatever this is.
      axis_name: under `jax.shard_map`, where `scores` are shards: the mesh axes over
        which counts are added up, so that the masks are the shards of those that one
        device would choose. A name or a tuple of names says that what differs along
        them is split along its first axis (with `check_vma=False`, everything that
        takes part); for other splits give the tree of `PartitionSpec` that `shard_map`
        has as its `in_specs`. `()`: each device has a model of its own. Outside of
        `shard_map`, where arrays are whole, it has no effect.

    Returns:
      A tree of bools with the structure of `scores`, True = kept. Each leaf broadcasts
      to its parameter: full shape for weights and tiles, size 1 on the other axes (but
      for batch axes) for `Channel`, a scalar True for what does not take part.

    Raises:
      ValueError: a sparsity outside [0, 1), a group size that does not divide its
        axis, a `where` or an axes rule that matches nothing, NaN scores (in eager use;
        under jit NaN counts as the lowest score), a negative `min_keep`; shards under
        `shard_map` of which no `axis_name` says what they are shards of.
      TypeError: scores that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> kernel = jnp.array([[1.0, 8.0], [7.0, 2.0], [6.0, 3.0], [4.0, 5.0]])
      >>> scores = {"kernel": kernel}
      >>> js.patterns.masks(scores, 0.5)["kernel"].astype(int).tolist()
      [[0, 1], [1, 0], [1, 0], [0, 1]]
      >>> two_of_four = js.patterns.masks(scores, pattern=js.NM(keep=2, of=4))
      >>> two_of_four["kernel"].sum(0).tolist()
      [2, 2]
    """
    selected = jax.tree.leaves(select(scores, where))
    named = leaves_with_paths(scores)
    chosen = [
        (i, path, x)
        for i, ((path, x), take) in enumerate(zip(named, selected, strict=True))
        if take
    ]
    for _, path, x in chosen:
        _checks.check_floating(path, x)
    _checks.check_no_nan({path: x for _, path, x in chosen})
    _checks.check_positive_int(min_keep, name="min_keep", least=0)
    sparsities = _sparsities(scores, sparsity, pattern)
    stated = resolve_axes(scores, axes)
    result: list[Array] = [jnp.asarray(np.True_) for _ in named]
    named_chosen = [(path, x) for _, path, x in chosen]
    splits = splits_of(scores, named_chosen, axis_name, pattern)
    if isinstance(pattern, NM) or pattern.scope != "global":
        found = _masks_of_each(
            [
                _Part(x, keep, kernel, split)
                for (i, path, x), split in zip(chosen, splits, strict=True)
                for kernel in [_axes_for(path, x, pattern, stated)]
                for n in [_group_size(path, x, pattern, kernel, split)]
                for keep in [_keep(path, n, sparsities[i], pattern, min_keep)]
            ],
            pattern,
        )
        for (i, _, _), mask in zip(chosen, found, strict=True):
            result[i] = mask
    elif chosen:
        leaf_axes = tuple(_axes_for(p, x, pattern, stated) for _, p, x in chosen)
        arrays = [x for _, _, x in chosen]
        n = sum(
            _group_size(p, x, pattern, a, split)
            for (_, p, x), a, split in zip(chosen, leaf_axes, splits, strict=True)
        )
        keep = n - removed_count(sparsities[chosen[0][0]], n)
        keep = jnp.asarray(keep, count_dtype(n))
        static = pattern, leaf_axes, tuple(splits), min_keep
        together = _mask_all(arrays, keep, *static)
        for (i, _, _), mask in zip(chosen, together, strict=True):
            result[i] = mask
    return jax.tree.unflatten(jax.tree.structure(scores), result)


class _Part(NamedTuple):
    """A parameter that takes part: its scores, and how many of a group stay."""

    x: Array
    keep: Array
    axes: Axes | None
    split: Split


def _masks_of_each(parts: list[_Part], pattern: Pattern) -> list[Array]:
    """Masks of parameters that do not compete with each other."""
    found: list[Any] = [None] * len(parts)
    for group in _joint(parts, pattern):
        xs, keep, axes, _ = zip(*(parts[i] for i in group), strict=True)
        for i, mask in zip(group, _mask_many(xs, keep, pattern, axes), strict=True):
            found[i] = mask
    previous = None
    for i, (x, keep, axes, split) in enumerate(parts):
        if found[i] is None:
            if previous is not None and isinstance(pattern, Unstructured):
                keep = _after(previous, keep)
            found[i] = previous = _mask_one(x, keep, pattern, axes, split)
    return found


def _joint(parts: list[_Part], pattern: Pattern) -> list[list[int]]:
    """Which parameters go through one program; see `together`."""

    def whole(part: _Part) -> bool:
        competing = _competing(part.x.ndim, pattern, part.axes)
        return len(competing) == part.x.ndim

    if isinstance(pattern, NM):
        return []
    fit = [i for i, part in enumerate(parts) if whole(part)]
    units = [
        jax.eval_shape(
            lambda x, axes=parts[i].axes: _units("", x, pattern, axes),
            jax.ShapeDtypeStruct(parts[i].x.shape, parts[i].x.dtype),
        )
        for i in fit
    ]
    groups = together([parts[i].x for i in fit], units)
    return [[fit[i] for i in group] for group in groups]


def _after(previous: Array, keep: Array) -> Array:
    """`keep`, once the mask of the previous parameter is there.

    Under jit XLA would otherwise work on all parameters at once, and hold the scratch
    memory of each of them. (Where there is a mesh, one entry is not at hand.)
    """
    spread = not jax.typeof(previous).sharding.mesh.empty
    if _checks.is_concrete(previous) or spread or not previous.size:
        return keep
    return keep + jnp.minimum(previous[(0,) * previous.ndim].astype(keep.dtype), 0)


def _sparsities(scores: PyTree, sparsity: Sparsity, pattern: Pattern) -> list:
    """One sparsity a leaf."""
    if sparsity is None:
        if not isinstance(pattern, NM):
            raise ValueError(
                f"{pattern} needs a sparsity, the fraction of weights to remove."
            )
        sparsity = pattern.sparsity
    count = len(jax.tree.leaves(scores))
    if jax.tree_util.all_leaves([sparsity]):
        _checks.check_sparsity(sparsity)
        return [sparsity] * count
    if not isinstance(pattern, NM) and pattern.scope == "global":
        raise ValueError(
            "In the global scope all weights compete for one budget, so it takes one "
            "sparsity and finds each parameter's; got a tree. Pass a number, or "
            "scope='layer'."
        )
    _checks.same_structure(sparsity, scores, name="sparsity", of="scores")
    for path, value in leaves_with_paths(sparsity):
        _checks.check_sparsity(value, name=f"{path}: sparsity")
    return jax.tree.leaves(sparsity)


def _axes_for(path: str, x: Array, pattern: Pattern, stated) -> Axes | None:
    """The axes that the pattern has to know; None where it needs none."""
    needed = isinstance(pattern, NM | Block) or (
        isinstance(pattern, Unstructured) and pattern.scope == "output"
    )
    return kernel_axes(path, x, stated) if needed else stated.get(path)


def _keep(path: str, n: int, sparsity, pattern: Pattern, min_keep: int) -> Array:
    removed = removed_count(sparsity, n)
    if isinstance(pattern, NM):
        most = pattern.of - pattern.keep
        if isinstance(removed, int) and removed > most:
            raise ValueError(
                f"{path}: {pattern} removes at most {most} of {pattern.of}, a sparsity "
                f"of {pattern.sparsity:g}; asked for {sparsity:g}. Leave the sparsity "
                "out, or choose another pattern."
            )
    else:
        most = max(0, n - min_keep)
    if isinstance(removed, int):  # of a number, for which nothing is compiled
        removed = min(removed, most)
    else:
        removed = jnp.minimum(removed, most)
    return jnp.asarray(n - removed, count_dtype(n))


def _group_size(
    path: str, x: Array, pattern: Pattern, axes: Axes | None, split: Split
) -> int:
    """How many units compete in one group of this parameter.

    Says which parameter it is that a pattern does not fit; the jitted functions below
    do not know its path, so that parameters of equal shape share one compilation.
    """
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    match pattern:
        case NM(of=of):
            assert axes is not None
            jax.eval_shape(lambda x: group_inputs(path, x, pattern, axes)[0], shape)
            _check_groups_lie_on_one_device(path, x, pattern, axes, split)
            return of
        case Unstructured():
            units, split_units = shape, split
        case _:
            units = jax.eval_shape(lambda x: _units(path, x, pattern, axes), shape)
            split_units = _split_of_units(split, pattern, axes)
    if pattern.scope == "global":
        competing = tuple(range(x.ndim))
    else:
        competing = _competing(x.ndim, pattern, axes)
    here = math.prod(units.shape[a] for a in competing)
    return here * pieces(names_along(split_units, competing))


def _check_groups_lie_on_one_device(
    path: str, x: Array, pattern: NM, axes: Axes, split: Split
) -> None:
    cut = x.shape[axes.input[-1]] % pattern.of
    if names_along(split, axes.input) and cut:
        raise ValueError(
            f"{path}: a shard of shape {tuple(x.shape)} ends within a group of "
            f"{pattern} along axis {axes.input[-1]}. Split it at multiples of "
            f"{pattern.of}."
        )


def _split_of_units(split: Split, pattern: Pattern, axes: Axes | None) -> Split:
    """How the units' scores are split: what a `Channel` adds up is so no more."""
    if not isinstance(pattern, Channel):
        return split
    ndim = len(split)
    apart = (pattern.axis % ndim, *batch_axes(pattern, ndim, axes))
    return tuple(names if a in apart else () for a, names in enumerate(split))


def _competing(ndim: int, pattern: Pattern, axes: Axes | None) -> tuple[int, ...]:
    """The axes along which units compete; the others number the groups."""
    if isinstance(pattern, Unstructured) and pattern.scope == "output":
        assert axes is not None
        return tuple(sorted(axes.input))
    batch = batch_axes(pattern, ndim, axes)
    return tuple(a for a in range(ndim) if a not in batch)


def _units(
    path: str,
    x: Array,
    pattern: Pattern,
    axes: Axes | None,
    split: Split | None = None,
) -> Array:
    match pattern:
        case Channel():
            return channel_scores(path, x, pattern, axes, split)
        case Block():
            assert axes is not None
            return block_scores(path, x, pattern, axes)
        case _:
            return x


def _expand(mask: Array, shape: tuple[int, ...], pattern: Pattern) -> Array:
    return expand_blocks(mask, shape) if isinstance(pattern, Block) else mask


# Jitted, so that an eager caller compiles once for each shape: a loop whose body is a
# fresh closure would compile at every call. Inside the caller's jit this is inlined.
@functools.partial(jax.jit, static_argnames=("pattern", "axes", "split"))
def _mask_one(
    x: Array, keep: Array, pattern: Pattern, axes: Axes | None, split: Split
) -> Array:
    def one(xs: list[Array], keep: Array) -> list[Array]:
        (x,) = xs
        if isinstance(pattern, NM):
            assert axes is not None
            return [nm_mask("", x, keep, pattern, axes)]
        units = _units("", x, pattern, axes, split)
        competing = _competing(x.ndim, pattern, axes)
        splits = [_split_of_units(split, pattern, axes)]
        (mask,) = top_k_masks([units], keep, axes=competing, splits=splits)
        return [_expand(mask, x.shape, pattern)]

    return sharded_like(one, [x], keep)[0]


@functools.partial(jax.jit, static_argnames=("pattern", "axes"))
def _mask_many(
    xs: tuple[Array, ...],
    keep: tuple[Array, ...],
    pattern: Pattern,
    axes: tuple[Axes | None, ...],
) -> list[Array]:
    units = [_units("", x, pattern, a) for x, a in zip(xs, axes, strict=True)]
    kept = top_k_masks_of_each(units, keep)
    return [_expand(m, x.shape, pattern) for m, x in zip(kept, xs, strict=True)]


@functools.partial(jax.jit, static_argnames=("pattern", "axes", "splits", "min_keep"))
def _mask_all(
    xs: list[Array],
    keep: Array,
    pattern: Pattern,
    axes: tuple[Axes | None, ...],
    splits: tuple[Split, ...],
    min_keep: int,
) -> list[Array]:
    def together(xs: list[Array], keep: Array) -> list[Array]:
        units = [
            _units("", x, pattern, a, split)
            for x, a, split in zip(xs, axes, splits, strict=True)
        ]
        # Parameters of different types compete in the type that holds them all.
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*units)
        units = [u.astype(dtype) for u in units]
        layers = [_competing(x.ndim, pattern, a) for x, a in zip(xs, axes, strict=True)]
        apart = [
            _split_of_units(split, pattern, a)
            for split, a in zip(splits, axes, strict=True)
        ]
        kept = top_k_with_floor(units, keep, layers, apart, min_keep)
        return [_expand(m, x.shape, pattern) for m, x in zip(kept, xs, strict=True)]

    return sharded_like(together, xs, keep)
