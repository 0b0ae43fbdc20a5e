"""Selection: scores, a sparsity and a pattern become masks."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import count_dtype
from jaxsparse._typing import Array, PyTree, Sparsity, Where
from jaxsparse.patterns._counts import freed_count, removed_count
from jaxsparse.patterns._masks import check_masks
from jaxsparse.patterns._programs import (
    Part,
    competing_axes,
    masks_of_all,
    masks_of_each,
    split_of_units,
    units_of,
)
from jaxsparse.patterns._shards import AxisName, splits_of
from jaxsparse.patterns._sparsities import keep_of, sparsities_of
from jaxsparse.patterns._spec import (
    NM,
    Balanced,
    Block,
    Channel,
    Pattern,
    Unstructured,
)
from jaxsparse.patterns.earlier_masks import Revived, check_budget, sink, without_gone
from jaxsparse.patterns.nm import group_inputs
from jaxsparse.ranking.shards import Split, names_along, pieces
from jaxsparse.tree import (
    Axes,
    AxesRule,
    by_rules,
    kernel_axes,
    leaves_with_paths,
    like,
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
    masks: PyTree = None,
    axis_name: AxisName | None = None,
) -> PyTree:
    """Make masks that keep the highest scores.

    In every competing group of `n` units exactly `floor(s * n + 1/2)` are removed, the
    lowest scores first; among equal scores the one with the lower flat index is kept.
    The result is the same eager and jitted, on one device and on many.

    No layer vanishes: `min_keep` of its units stay. A layer or an output where `floor(s
    * n + 1/2)` would leave fewer loses fewer. Where all layers compete, the best
    `min_keep` of each come first and the best of all others after them, so that the
    total stays exact unless that many are more than it keeps.

    Args:
      scores: a tree of floating-point arrays, one score a weight, larger = keep.
      sparsity: the fraction to remove, in [0, 1); a number, a traced scalar, or (not in
        the global scope) a tree of them with the structure of `scores`, as
        `jaxsparse.allocations` makes, or a mapping from paths or regular expressions,
        as `{"l0/kernel": 0.5, r"attn": 0.7}`: the first that matches counts, and what
        none matches stays dense (see `jaxsparse.tree.by_rules`). A traced one cannot be
        checked: it is clipped to [0, 1], and NaN removes nothing. May be left out for
        `NM`, which has its own.
      pattern: which weights are removed together, and which compete.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: the input, output and batch axes of kernels whose layout is not flax's;
        one `jaxsparse.tree.Axes` for all or a mapping from regular expressions.
      min_keep: how many units (weights, tiles or channels) each group and each layer
        keeps at least, or all of a smaller one. A layer is a parameter, or one index of
        its batch axes where these are stated. 0: a layer may lose everything. `NM`
        keeps `keep` of every group whatever this is.
      masks: the masks of earlier pruning. Removed weights stay removed whatever their
        score, and count toward the sparsity. A unit (tile, channel) counts as removed
        if all of it is; one that has lost some of its weights competes with the rest,
        without them. An N:M group that has lost more than the pattern removes keeps
        fewer than `keep`.
      axis_name: under `jax.shard_map`, where `scores` are shards: the mesh axes over
        which counts are added up, so that each shard gets its part of the masks that
        one device would choose. A name or a tuple of names means that scores which
        differ along them are split along their first axis (with `check_vma=False`, all
        scores that take part). For other splits pass the tree of `PartitionSpec` that
        `shard_map` has as its `in_specs`. `()`: each device has a model of its own.
        Outside of `shard_map`, where arrays are whole, it has no effect.

    Returns:
      A tree of bools with the structure of `scores`, True = kept. Each leaf broadcasts
      to its parameter: full shape for weights and tiles, size 1 on the other axes (but
      for batch axes) for `Channel`, a scalar True for parameters that do not take part.

    Raises:
      ValueError: a sparsity outside [0, 1), a group size that does not divide its axis,
        a `where` or an axes rule that matches nothing, NaN scores (in eager use; under
        jit NaN counts as the lowest score), a negative `min_keep`; `masks` that remove
        more than the sparsity does, in all or in a competing group (in eager use; under
        jit that stays removed); shards under `shard_map` without an `axis_name`.
      TypeError: scores that are not floating-point arrays, or a value that is no
        pattern.

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
    options = {"pattern": pattern, "where": where, "axes": axes, "min_keep": min_keep}
    found, revived = choose(
        scores, sparsity, masks=masks, axis_name=axis_name, **options
    )
    check_budget(revived, pattern)
    return found


def check_further(
    params: PyTree, masks: PyTree, sparsity: Sparsity, **options: Any
) -> None:
    """Raises where masks remove more than a sparsity, before there are scores."""
    equal = jax.tree.map(_equal_scores, params)
    revived = choose(equal, sparsity, masks=masks, **options)[1]
    check_budget(revived, options["pattern"])


def _equal_scores(w: Array) -> Array:
    if jnp.issubdtype(w.dtype, jax.dtypes.extended):
        return w  # a random key, as an NNX state holds
    return jnp.zeros_like(w, dtype=jnp.float32)


def choose(
    scores: PyTree,
    sparsity: Sparsity,
    *,
    pattern: Pattern,
    where: Where,
    axes: AxesRule,
    min_keep: int = 1,
    masks: PyTree = None,
    axis_name: AxisName | None = None,
    of: Callable[[PyTree], PyTree] | None = None,
    free: float | Array | None = None,
) -> tuple[PyTree, Revived]:
    """`masks`, and what would have come back if `masks` had let it.

    `free` leaves a fraction of what each competing group keeps free, for others to take
    its place: that many are removed besides.
    """
    _checks.check_pattern(Pattern, pattern)
    _checks.check_arrays(scores=scores)
    sparsity, where = by_rules(scores, sparsity, where)
    selected = jax.tree.leaves(select(scores, where))
    if of is not None and (
        masks is not None or not _read_often(scores, selected, pattern)
    ):
        scores, of = of(scores), None
    named = leaves_with_paths(scores)
    before = None
    if masks is not None:
        masks = like(masks, scores, name="masks")
        check_masks(masks, scores)
        before = jax.tree.leaves(masks)
    chosen = [
        (i, path, x)
        for i, ((path, x), take) in enumerate(zip(named, selected, strict=True))
        if take
    ]
    for _, path, x in chosen:
        _checks.check_floating(path, x)
    _checks.check_no_nan({
        path: x if before is None else jnp.where(before[i], x, 0)
        for i, path, x in chosen
    })
    _checks.check_positive_int(min_keep, name="min_keep", least=0)
    sparsities = sparsities_of(scores, sparsity, pattern)
    stated = resolve_axes(scores, axes)
    result: list[Array] = [jnp.asarray(np.True_) for _ in named]
    named_chosen = [(path, x) for _, path, x in chosen]
    splits = splits_of(scores, named_chosen, axis_name, pattern)
    gone: dict[int, Array] = {}
    if before is not None:
        sunk = []
        for (i, path, x), split in zip(chosen, splits, strict=True):
            own = _axes_for(path, x, pattern, stated)
            _group_size(path, x, pattern, own, split)  # says what does not fit
            x, gone[i] = sink(x, before[i], pattern, own, split)
            sunk.append((i, path, x))
        chosen = sunk
    if isinstance(pattern, NM) or pattern.scope != "global":
        found = masks_of_each(
            [
                Part(x, keep, kernel, split)
                for (i, path, x), split in zip(chosen, splits, strict=True)
                for kernel in [_axes_for(path, x, pattern, stated)]
                for n in [_group_size(path, x, pattern, kernel, split)]
                for keep in [
                    _less(keep_of(path, n, sparsities[i], pattern, min_keep), free)
                ]
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
        keep = _less(jnp.asarray(keep, count_dtype(n)), free)
        static = pattern, leaf_axes, tuple(splits), min_keep, of
        together = masks_of_all(arrays, keep, *static)
        for (i, _, _), mask in zip(chosen, together, strict=True):
            result[i] = mask
    revived: Revived = []
    if before is not None:
        for i, path, _ in chosen:
            result[i], back = without_gone(result[i], before[i], gone[i])
            revived.append((path, sparsities[i], back))
        result = [kept if i in gone else before[i] for i, kept in enumerate(result)]
    return jax.tree.unflatten(jax.tree.structure(scores), result), revived


def _less(keep: Array, free: float | Array | None) -> Array:
    return keep if free is None else keep - freed_count(free, keep)


def _read_often(scores: PyTree, selected: list[bool], pattern: Pattern) -> bool:
    """Whether what takes part is read in many passes as it is, all in one type."""
    if not isinstance(pattern, Unstructured) or pattern.scope != "global":
        return False
    pairs = zip(jax.tree.leaves(scores), selected, strict=True)
    dtypes = {x.dtype for x, take in pairs if take}
    floats = [d for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return len(dtypes) == len(floats) == 1 and floats[0].itemsize > 1


def _axes_for(path: str, x: Array, pattern: Pattern, stated) -> Axes | None:
    """The axes that the pattern has to know; None where it needs none."""
    needed = isinstance(pattern, NM | Block | Balanced) or (
        isinstance(pattern, Unstructured) and pattern.scope == "output"
    )
    axes = kernel_axes(path, x, stated) if needed else stated.get(path)
    if isinstance(pattern, Channel) and pattern.axis == -1 and axes is not None:
        _warn_of_inputs(path, x.ndim - 1, axes)
    return axes


def _warn_of_inputs(path: str, last: int, axes: Axes) -> None:
    """Warns where the default axis of `Channel` is an input axis."""
    if last not in axes.input or not axes.output:
        return
    warnings.warn(
        f"{path}: the last axis, of which Channel() removes slices, is an input axis "
        f"here ({axes}). For output channels write Channel(axis={axes.output[0]}); "
        f"Channel(axis={last}) removes inputs without this warning.",
        stacklevel=2,
    )


def _group_size(
    path: str, x: Array, pattern: Pattern, axes: Axes | None, split: Split
) -> int:
    """How many units compete in one group of this parameter.

    Says which parameter it is that a pattern does not fit; the programs do
    not know its path, so that parameters of equal shape share one compilation.
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
            units = jax.eval_shape(lambda x: units_of(path, x, pattern, axes), shape)
            split_units = split_of_units(split, pattern, axes)
    if pattern.scope == "global":
        competing = tuple(range(x.ndim))
    else:
        competing = competing_axes(x.ndim, pattern, axes)
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
