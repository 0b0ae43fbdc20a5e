"""Does a mask obey its pattern, and how sparse is it?"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._sharded import sharded_like
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.patterns._algebra import count
from jaxsparse.patterns._masks import check_masks
from jaxsparse.patterns._spec import NM, Balanced, Block, Channel, Pattern
from jaxsparse.patterns._units import block_scores, channel_scores
from jaxsparse.patterns.nm import group_inputs
from jaxsparse.tree import (
    Axes,
    AxesRule,
    kernel_axes,
    leaves_with_paths,
    like,
    resolve_axes,
    select,
)


def sparsity_of(masks: PyTree, params: PyTree) -> PyTree:
    """Return the sparsity that each mask reaches on its parameter.

    Args:
      masks: a tree of bools.
      params: the parameters; only their shapes are read.

    Returns:
      A tree of Python floats, the fraction of each parameter that is removed.

    Raises:
      ValueError: masks of another structure, or that do not broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.ones(2)}
      >>> js.patterns.sparsity_of(js.prune(params, 0.25).masks, params)
      {'b': 0.0, 'w': 0.25}
    """
    share = lambda w, kept: 1.0 - kept / max(1, np.size(w))
    return jax.tree.map(share, params, count(masks, params))


def verify(
    masks: PyTree,
    params: PyTree,
    *,
    pattern: Pattern,
    where: Where = None,
    axes: AxesRule = None,
) -> None:
    """Raise an error unless the masks follow a pattern, naming the first that does not.

    Use it on masks from elsewhere, or changed by hand, before a format or a compute
    kernel relies on them.

    Args:
      masks: a tree of bools.
      params: the parameters; only their shapes are read.
      pattern: `NM`: at most `keep` of every `of` inputs are kept; `Block`: each tile is
        kept or removed whole; `Balanced`: so too, and as many for each group of
        outputs of a layer; `Channel`: each slice; `Unstructured`: any mask passes.
      where: which parameters are checked.
      axes: as for `masks`.

    Raises:
      ValueError: a mask violates the pattern; the message has its path and the first
        group.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> masks = {"kernel": jnp.array([[True], [True], [True], [False]])}
      >>> js.patterns.verify(masks, masks, pattern=js.NM(keep=2, of=4), where=".")
      Traceback (most recent call last):
        ...
      ValueError: kernel: group 0 keeps 3 of 4, against NM(keep=2, of=4).
    """
    _checks.check_pattern(Pattern, pattern)
    masks = like(masks, params, name="masks")
    check_masks(masks, params)
    selected = jax.tree.leaves(select(params, where))
    stated = resolve_axes(params, axes)
    for (path, mask), w, take in zip(
        leaves_with_paths(masks), jax.tree.leaves(params), selected, strict=True
    ):
        if take:
            full = jnp.broadcast_to(mask, jnp.shape(w))
            _verify_one(path, full, pattern, stated)


def _verify_one(path: str, mask: Array, pattern: Pattern, stated) -> None:
    match pattern:
        case NM(keep=keep, of=of):
            kernel = kernel_axes(path, mask, stated)
            kept = _kept_in_groups(path, mask, pattern, kernel)
            if bool(jnp.any(kept > keep)):
                worst = int(jnp.argmax(kept > keep))
                raise ValueError(
                    f"{path}: group {worst} keeps {int(kept[worst])} of {of}, against "
                    f"{pattern}."
                )
        case Block() | Balanced():
            kernel = kernel_axes(path, mask, stated)
            tiles = Block(pattern.shape, reduce="max")
            any_of = lambda m: block_scores(path, m, tiles, kernel)
            _all_or_none(path, mask, pattern, any_of)
            if isinstance(pattern, Balanced):
                _same_in_each_group(path, any_of(mask), pattern, kernel)
        case Channel(axis=axis):
            slices = Channel(axis, reduce="max")
            any_of = lambda m: channel_scores(path, m, slices, stated.get(path))
            _all_or_none(path, mask, pattern, any_of)
        case _:
            pass


def _kept_in_groups(path: str, mask: Array, pattern: NM, axes: Axes) -> Array:
    def kept(mask: Array) -> Array:
        grouped, axis = group_inputs(path, mask, pattern, axes)
        return jnp.ravel(jnp.sum(grouped, axis=axis))

    return sharded_like(kept, mask)


def _all_or_none(path: str, mask: Array, pattern: Pattern, any_of) -> None:
    both = lambda mask: jnp.ravel(any_of(mask) & any_of(~mask))
    broken = sharded_like(both, mask)
    if bool(jnp.any(broken)):
        raise ValueError(
            f"{path}: unit {int(jnp.argmax(broken))} is kept in part, against "
            f"{pattern}."
        )


def _same_in_each_group(path: str, kept: Array, pattern: Balanced, axes: Axes) -> None:
    """Raises unless the groups of each layer keep as many tiles."""
    order = (*axes.batch, *axes.output, *axes.input)
    groups = math.prod(kept.shape[a] for a in axes.output)
    layers = math.prod(kept.shape[a] for a in axes.batch)
    tiles = np.asarray(kept).transpose(order).reshape(layers, groups, -1)
    counts = tiles.sum(-1)
    wrong = counts != counts[:, :1]
    if wrong.any():
        layer, group = np.unravel_index(np.argmax(wrong), wrong.shape)
        raise ValueError(
            f"{path}: group {group} of {pattern.shape[1]} outputs keeps "
            f"{counts[layer, group]} tiles, the first group of its layer keeps "
            f"{counts[layer, 0]}, against {pattern}."
        )
