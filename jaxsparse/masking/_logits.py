"""MaskLLM: N:M masks drawn from a distribution over all patterns of a group."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._straight import with_derivative_of
from jaxsparse._typing import Array, PyTree, Tree, Where
from jaxsparse.patterns import NM, check_masks
from jaxsparse.patterns.nm import group_inputs, ungroup_inputs
from jaxsparse.tree import (
    Axes,
    AxesRule,
    kernel_axes,
    keys_like,
    leaves_with_paths,
    like,
    map_with_path,
    resolve_axes,
    select,
)

_MOST = 1024  # patterns of a group; 8:16 has 12,870


def init_mask_logits(
    params: PyTree,
    *,
    pattern: NM,
    key: Array,
    masks: PyTree = None,
    strength: float = 3.0,
    std: float = 0.01,
    where: Where = None,
    axes: AxesRule = None,
) -> PyTree:
    """Draw logits over the N:M patterns of each group, optionally about a prior.

    A group of `of` weights has `C = of choose keep` patterns. The logits are normal
    numbers of deviation `std`; a prior mask `m0` adds `strength * sd * (<c, m0> - keep
    / 2)` to that of pattern `c`, where `sd` is the deviation of the numbers drawn. At
    the paper's strength of 3, a few percent of 2:4 groups still begin with another
    pattern than the prior's; at 8 none do. See `masked_by_logits`.

    Args:
      params: the parameters; only their shapes are read.
      pattern: N:M.
      key: a typed key.
      masks: the prior: masks of this pattern, from `jaxsparse.oneshot.layerwise` say,
        with the structure of `params`.
      strength: the strength of the prior; 3 in the paper.
      std: the deviation of the numbers drawn.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.

    Returns:
      A tree with the structure of `params`: for a kernel `[d_in, d_out]` an array
      `[d_in / of, C, d_out]` of float32, None for parameters that take no part.

    Raises:
      ValueError: `of` does not divide the inputs of a kernel; a pattern with more than
        1,024 choices; masks that do not fit.
      TypeError: a pattern other than N:M, a `key` that is not a random key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.arange(8.0).reshape(4, 2)}
      >>> masks = js.prune(params, pattern=js.NM(2, 4)).masks
      >>> logits = js.masking.init_mask_logits(
      ...     params, pattern=js.NM(2, 4), key=jax.random.key(0), masks=masks)
      >>> logits["kernel"].shape
      (1, 6, 2)
    """
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_key(key)
    _checks.check_number(least=0, strength=strength)
    _checks.check_number(above=0, std=std)
    chosen = candidates(pattern)
    stated, taken = resolve_axes(params, axes), select(params, where)
    prior = jax.tree.map(lambda _: None, params)
    if masks is not None:
        prior = like(masks, params, name="masks")
        check_masks(prior, params)

    def draw(path: str, w: Array, take: bool, key: Array, kept: Array | None):
        if not take:
            return None
        grouped = functools.partial(
            group_inputs, path, pattern=pattern, axes=kernel_axes(path, w, stated)
        )
        dtype = wide_dtype(w.dtype)
        axis, shape = _shape_of_logits(grouped, w, len(chosen))
        noise = std * jax.random.normal(key, shape, dtype)
        if kept is None:
            return noise
        kept = grouped(jnp.broadcast_to(kept, w.shape))[0].astype(dtype)
        shared = _over_candidates(kept, chosen.T, axis)
        return noise + strength * jnp.std(noise) * (shared - pattern.keep / 2)

    leaves, treedef = jax.tree.flatten(params)
    rest = [jax.tree.leaves(x, is_leaf=lambda x: x is None) for x in (taken, prior)]
    keys = jax.tree.leaves(keys_like(key, params))
    paths = [path for path, _ in leaves_with_paths(params)]
    return treedef.unflatten([
        draw(*given)
        for given in zip(paths, leaves, rest[0], keys, rest[1], strict=True)
    ])


def masked_by_logits(
    params: Tree,
    logits: PyTree,
    *,
    pattern: NM,
    key: Array,
    temperature: float | Array = 4.0,
    scale: float | Array = 100.0,
    hard: bool = False,
    axes: AxesRule = None,
    groups_at_once: int | None = None,
) -> Tree:
    """Return the parameters under soft N:M masks that are drawn from logits.

    For each group of weights `y = softmax((scale * pi + gumbel) / temperature)` over
    the patterns `c` of the group, and the mask is `sum_c y_c c`, entries between 0 and
    1. Its gradient trains the logits `pi`; the weights are frozen, so close over them::

        def loss_fn(logits, batch, key, step):
            masked = js.masking.masked_by_logits(
                params, logits, pattern=js.NM(2, 4), key=key,
                temperature=optax.linear_schedule(4.0, 0.05, steps)(step),
                scale=optax.linear_schedule(1e2, 5e2, steps)(step))
            kept = sum(jnp.sum(w**2) for w in jax.tree.leaves(masked))
            return task_loss(masked, batch) - 1e-5 * kept

    (`kept` keeps weights large, so that their gradients do not fade; its factor falls
    to 0 in the paper.) `masks_of_logits` returns the final masks. Fang et al. (2024,
    MaskLLM, arXiv:2409.17481): `js.oneshot.layerwise`'s masks as a prior, AdamW at 5e-5
    for 2,000 steps.

    Differs from the reference implementation, which keeps one-hot patterns and their
    products for whole layers: here one sum over patterns is taken, `groups_at_once`
    groups at a time, and computed anew for the gradient. It supports every N:M.

    Args:
      params: the parameters.
      logits: as `init_mask_logits` makes.
      pattern: the same N:M.
      key: a typed key; a new one in each step.
      temperature: the temperature of the softmax; a lower one is closer to a single
        pattern. It goes from 4 to 0.05 in the paper.
      scale: the factor of the logits, relative to the noise. It goes from 100 to 500 in
        the paper.
      hard: whether to use the likeliest pattern in the forward pass, with the soft
        mask's derivative.
      axes: as for `jaxsparse.patterns.masks`.
      groups_at_once: the number of groups along the inputs to compute at a time, to
        save memory; it must divide their number. None computes all at once.

    Returns:
      Parameters of the same structure.

    Raises:
      ValueError: logits that do not fit the parameters and the pattern; a number of
        groups at once that does not divide.
      TypeError: a pattern other than N:M, a `key` that is not a random key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.arange(1.0, 5.0)[:, None]}
      >>> logits = {"kernel": jnp.array([[[0.0], [0], [0], [0], [0], [9]]])}
      >>> js.masking.masked_by_logits(
      ...     params, logits, pattern=js.NM(2, 4), key=jax.random.key(0))
      {'kernel': Array([[0.],
             [0.],
             [3.],
             [4.]], dtype=float32)}
    """
    _checks.check_arrays(params=params, logits=logits)
    _checks.check_key(key)
    _checks.check_bool(hard=hard)
    chosen = candidates(pattern)

    def soft(pi: Array, key: Array, axis: int) -> Array:
        noise = jax.random.gumbel(key, pi.shape, pi.dtype)
        heat = jnp.asarray(temperature, pi.dtype)
        y = jax.nn.softmax((jnp.asarray(scale, pi.dtype) * pi + noise) / heat, axis)
        mask = _over_candidates(y, chosen, axis)
        if not hard:
            return mask
        return with_derivative_of(mask, _best(y, chosen, axis))

    def one(path: str, w: Array, pi: Array, key: Array, own: Axes) -> Array:
        grouped, axis = group_inputs(path, w, pattern, own)
        mask = _in_chunks(soft, pi, key, axis, groups_at_once, path)
        return ungroup_inputs(grouped * mask.astype(w.dtype), w.shape, pattern, own)

    keys = dict(leaves_with_paths(keys_like(key, params)))
    masked = lambda path, w, pi, own: one(path, w, pi, keys[path], own)
    return _map(params, logits, pattern, axes, masked)


def masks_of_logits(
    logits: PyTree, params: PyTree, *, pattern: NM, axes: AxesRule = None
) -> PyTree:
    """Return the masks of the likeliest patterns.

    Args:
      logits: as `init_mask_logits` makes, trained or not.
      params: the parameters; only their shapes are read.
      pattern: the same N:M.
      axes: as for `jaxsparse.patterns.masks`.

    Returns:
      A tree of bools with the structure of `params`, True = kept, a scalar True for
      parameters without logits.

    Raises:
      ValueError: logits that do not fit the parameters and the pattern.
      TypeError: a pattern other than N:M.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.ones((4, 1))}
      >>> logits = {"kernel": jnp.array([[[0.0], [0], [0], [0], [0], [9]]])}
      >>> masks = js.masking.masks_of_logits(logits, params, pattern=js.NM(2, 4))
      >>> masks["kernel"][:, 0].tolist()
      [False, False, True, True]
    """
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_arrays(logits=logits)
    chosen = candidates(pattern)

    def one(path: str, w: Array, pi: Array, own: Axes) -> Array:
        shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
        axis, _ = _shape_of_logits(
            lambda x: group_inputs(path, x, pattern, own), shape, len(chosen)
        )
        return ungroup_inputs(_best(pi, chosen, axis), w.shape, pattern, own)

    dense = lambda _: jnp.asarray(np.True_)
    return _map(params, logits, pattern, axes, one, dense)


@functools.cache
def candidates(pattern: NM) -> np.ndarray:
    """The patterns of a group, `[C, of]` of bools: 1100, 1010, 1001, 0110, ..."""
    if not isinstance(pattern, NM):
        raise TypeError(
            f"Logits are over N:M patterns, as js.NM(2, 4); got {pattern!r}."
        )
    count = math.comb(pattern.of, pattern.keep)
    if count > _MOST:
        raise ValueError(
            f"{pattern} has {count:,} patterns of a group, and a logit for each would "
            f"be {count // pattern.of:,} numbers a weight; at most {_MOST:,} patterns."
        )
    found = np.zeros((count, pattern.of), np.bool_)
    for row, kept in zip(
        found, itertools.combinations(range(pattern.of), pattern.keep), strict=True
    ):
        row[list(kept)] = True
    return found


def _over_candidates(x: Array, weights: np.ndarray, axis: int) -> Array:
    """`sum_i x_i weights_ij` along an axis."""
    wide = jnp.asarray(weights, x.dtype)
    summed = jnp.tensordot(x, wide, ((axis,), (0,)), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(summed, -1, axis)


def _best(logits: Array, chosen: np.ndarray, axis: int) -> Array:
    """The likeliest pattern of each group, the first among equals."""
    index = jnp.argmax(logits, axis)
    return jnp.moveaxis(jnp.asarray(chosen)[index], -1, axis)


def _in_chunks(
    soft: Any, pi: Array, key: Array, axis: int, count: int | None, path: str
) -> Array:
    """`soft(pi, key, axis)`, some groups at a time, and anew for the gradient."""
    again = jax.checkpoint(soft, static_argnums=2)
    total = pi.shape[axis - 1]
    if count is None or count >= total:
        return again(pi, key, axis)
    if count < 1 or total % count:
        raise ValueError(
            f"{path}: groups_at_once={count} does not divide the {total} groups along "
            "its inputs."
        )
    turns = total // count
    lead = jnp.moveaxis(pi, axis - 1, 0)
    parts = lead.reshape(turns, count, *lead.shape[1:])
    one = lambda given: again(jnp.moveaxis(given[0], 0, axis - 1), given[1], axis)
    masks = lax.map(one, (parts, jax.random.split(key, turns)))
    masks = jnp.moveaxis(masks, axis, 1)  # the groups, behind the turns
    return jnp.moveaxis(masks.reshape(total, *masks.shape[2:]), 0, axis - 1)


def _shape_of_logits(grouped: Any, w: Any, count: int) -> tuple[int, tuple[int, ...]]:
    """The axis of the patterns, and the shape of a parameter's logits."""
    shape = jax.ShapeDtypeStruct(jnp.shape(w), jnp.float32)
    axis = 0

    def group(x: Array) -> Array:
        nonlocal axis
        split, axis = grouped(x)
        return split

    split = jax.eval_shape(group, shape).shape
    return axis, (*split[:axis], count, *split[axis + 1 :])


def _paths(params: PyTree) -> list[str]:
    return [path for path, _ in leaves_with_paths(params)]


def _map(
    params: PyTree,
    logits: PyTree,
    pattern: NM,
    axes: AxesRule,
    one: Any,
    other: Any = lambda w: w,
) -> PyTree:
    """`one(path, w, logits, axes)` for parameters with logits, which have to fit."""
    named = dict(leaves_with_paths(logits))
    strange = sorted(set(named) - set(_paths(params)))
    if strange or not named:
        raise ValueError(
            f"Logits for {strange or 'nothing'}: they have the structure of the "
            "parameters; js.masking.init_mask_logits(params, ...) makes them."
        )
    stated = resolve_axes(params, axes)

    def each(path: str, w: Array) -> Array:
        if path not in named:
            return other(w)
        own, pi = kernel_axes(path, w, stated), named[path]
        group = lambda x: group_inputs(path, x, pattern, own)
        expected = _shape_of_logits(group, w, len(candidates(pattern)))[1]
        if pi.shape != expected:
            raise ValueError(
                f"{path}: logits of shape {pi.shape}; {pattern} of a parameter of "
                f"shape {tuple(w.shape)} has {expected}."
            )
        return one(path, w, pi, own)

    return map_with_path(each, params)
