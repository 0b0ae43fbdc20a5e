"""Sets of weights: unite, intersect, compare, count, list and move masks."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import count_dtype
from jaxsparse._together import each
from jaxsparse._typing import Array, PyTree
from jaxsparse.patterns._masks import check_masks
from jaxsparse.tree import leaves_with_paths, like, map_with_path, nearest


class Overlap(NamedTuple):
    """The agreement of two masks.

    Attributes:
      total: the overlap over all parameters that either of them prunes, a float.
      parameters: the overlap of each parameter, a tree of floats.
    """

    total: float
    parameters: PyTree


def union(*masks: PyTree) -> PyTree:
    """Keep the weights that any mask keeps.

    Args:
      *masks: trees of bools of one structure. Leaves at the same path broadcast
        together, so a mask of channels, `(1, d_out)`, can be combined with one of
        weights.

    Returns:
      A tree of bools with the structure of the first.

    Raises:
      ValueError: no masks, masks of another structure, or shapes that do not broadcast;
        the message has the path.
      TypeError: a leaf whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([False, False])}
      >>> js.patterns.union(a, b)["w"].tolist()
      [True, False]
    """
    return _combine(_any_of, masks, name="union")


def intersection(*masks: PyTree) -> PyTree:
    """Keep the weights that all masks keep.

    Args:
      *masks: as for `union`.

    Returns:
      A tree of bools with the structure of the first.

    Raises:
      ValueError: as for `union`.
      TypeError: a leaf whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> weights = {"w": jnp.array([[True, False], [True, True]])}
      >>> channels = {"w": jnp.array([[True, False]])}
      >>> js.patterns.intersection(weights, channels)["w"].tolist()
      [[True, False], [True, False]]
    """
    return _combine(_all_of, masks, name="intersection")


def overlap(first: PyTree, second: PyTree, params: PyTree) -> Overlap:
    """Compare two masks by the intersection over union of the weights they keep.

    `|A and B| / |A or B|` (Jaccard), where A and B are the weights that each mask
    keeps: 1 for equal masks, 0 for masks without a weight in common. Two independent
    random masks of sparsity `s` overlap by about `(1 - s) / (1 + s)`. If neither keeps
    a weight, the overlap is 1.

    Args:
      first: a tree of bools.
      second: a tree of bools.
      params: the parameters; only their shapes are read.

    Returns:
      The overlap of each parameter, and that of all parameters which either mask
      prunes. The total leaves out parameters that both keep whole, which would hide the
      difference; it is 1 if there are no others.

    Raises:
      ValueError: masks of another structure, or that do not broadcast.
      TypeError: a leaf whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.array([4.0, 3.0, 2.0, 1.0]), "b": jnp.ones(2)}
      >>> a = {"w": jnp.array([True, True, False, False]), "b": jnp.array(True)}
      >>> b = {"w": jnp.array([True, False, True, False]), "b": jnp.array(True)}
      >>> found = js.patterns.overlap(a, b, params)
      >>> round(found.total, 3), found.parameters["b"]
      (0.333, 1.0)
    """
    # As trees of the same containers, whatever those of the masks are.
    pair = [like(m, params, name=n) for m, n in ((first, "first"), (second, "second"))]
    both = jax.tree.leaves(count(intersection(*pair), params))
    either = jax.tree.leaves(count(union(*pair), params))
    sizes = [np.size(w) for w in jax.tree.leaves(params)]
    ratio = lambda a, b: a / b if b else 1.0
    # An intersection as large as the parameter: neither mask prunes it.
    pruned = [(a, b) for a, b, n in zip(both, either, sizes, strict=True) if a < n]
    return Overlap(
        total=ratio(sum(a for a, _ in pruned), sum(b for _, b in pruned)),
        parameters=jax.tree.unflatten(
            jax.tree.structure(params), list(map(ratio, both, either))
        ),
    )


def count(masks: PyTree, params: PyTree) -> PyTree:
    """Count the weights that each mask keeps.

    Args:
      masks: a tree of bools.
      params: the parameters; only their shapes are read.

    Returns:
      A tree of Python integers with the structure of `params`;
      `sum(jax.tree.leaves(...))` gives the model's total.

    Raises:
      ValueError: masks of another structure, or that do not broadcast.
      TypeError: a leaf whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> masks = {"w": jnp.array([[True, False]]), "b": jnp.array(True)}
      >>> js.patterns.count(masks, params)
      {'b': 2, 'w': 3}
    """
    masks = like(masks, params, name="masks")
    check_masks(masks, params)
    leaves, treedef = jax.tree.flatten(params)
    kept = jax.tree.leaves(masks)
    counted = each(_kept, kept)
    _checks.check_known("a count of masks", masks=treedef.unflatten(counted))
    found = jax.device_get(counted)
    # Each entry of a mask stands for as many weights as it broadcasts to.
    return treedef.unflatten([
        int(n) * (np.size(w) // max(1, np.size(mask)))
        for n, mask, w in zip(found, kept, leaves, strict=True)
    ])


def indices(masks: PyTree, params: PyTree) -> PyTree:
    """List the weights that each mask keeps.

    The lists' lengths depend on the masks' values, so this runs on the host and not
    under jit. `~mask` in every leaf lists what is removed.

    Args:
      masks: a tree of bools.
      params: the parameters; only their shapes are read.

    Returns:
      A tree of NumPy vectors of int64: flat indices in row-major order, increasing, so
      that `w.reshape(-1)[index]` are the kept weights.

    Raises:
      ValueError: masks of another structure, or that do not broadcast.
      TypeError: a leaf whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.ones((2, 3))}
      >>> masks = {"w": jnp.array([[True, False, True]])}
      >>> js.patterns.indices(masks, params)["w"].tolist()
      [0, 2, 3, 5]
    """
    masks = like(masks, params, name="masks")
    check_masks(masks, params)
    _checks.check_arrays(masks=masks)
    flat = lambda m, w: np.flatnonzero(np.broadcast_to(jax.device_get(m), np.shape(w)))
    return jax.tree.map(lambda w, m: flat(m, w), params, masks)


def transfer(
    masks: PyTree,
    params: PyTree,
    *,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    strict: bool = True,
) -> PyTree:
    """Move masks to another checkpoint of the model, parameter by parameter.

    A parameter takes the mask at its own path, or at the path that `rename` gives. If
    only one of the two has a head for a task, pass `strict=False`.

    Args:
      masks: a tree of bools.
      params: the other checkpoint's parameters; only paths and shapes are looked at.
      rename: the path of the mask for the path of a parameter: a function, or a mapping
        whose missing paths stay as they are. Several parameters may share one mask.
      strict: whether each parameter must have a mask, and each mask be used. Otherwise
        parameters without one are kept whole, and masks without one are left out.

    Returns:
      Masks with the structure of `params`; new arrays only for parameters kept whole.

    Raises:
      ValueError: a parameter without a mask or a mask without a parameter, with the
        nearest paths; a mask that does not broadcast to its parameter; no parameter
        that has a mask.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> masks = {"encoder": {"kernel": jnp.array([True, False])}}
      >>> params = {"student": {"kernel": jnp.ones(2)}, "head": {"bias": jnp.ones(2)}}
      >>> moved = js.patterns.transfer(
      ...     masks, params, rename={"student/kernel": "encoder/kernel"}, strict=False)
      >>> moved["student"]["kernel"].tolist(), moved["head"]["bias"].tolist()
      ([True, False], True)
    """
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_bools(masks)
    _checks.check_bool(strict=strict)
    given = dict(leaves_with_paths(masks))
    if rename is None:
        source: Callable[[str], str] = lambda path: path
    elif isinstance(rename, Mapping):
        source = lambda path: rename.get(path, path)
    else:
        _checks.check_callable(1, rename=rename)
        source = rename
    wanted = {path: source(path) for path, _ in leaves_with_paths(params)}
    if isinstance(rename, Mapping):
        _check_known(rename, wanted)
    without = [path for path in wanted if wanted[path] not in given]
    unused = [path for path in given if path not in wanted.values()]
    if without and (strict or len(without) == len(wanted)):
        path = without[0]
        raise ValueError(
            f"{path}: there is no mask at {wanted[path]!r} ({len(without)} of "
            f"{len(wanted)} parameters have none). The nearest masks: "
            f"{nearest(wanted[path], list(given))}. State the path with rename=, or "
            "keep such parameters whole with strict=False."
        )
    if unused and strict:
        raise ValueError(
            f"{unused[0]}: no parameter takes this mask ({len(unused)} of {len(given)} "
            f"masks are not used). The nearest parameters: "
            f"{nearest(unused[0], list(wanted))}. State the path with rename=, or "
            "leave such masks out with strict=False."
        )
    moved = map_with_path(lambda path, _: given.get(wanted[path], np.True_), params)
    moved = jax.tree.map(jnp.asarray, moved)
    check_masks(moved, params)
    return moved


def _check_known(rename: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises if a path to rename is none of the parameters'."""
    for path in rename:
        if path not in wanted:
            raise ValueError(
                f"rename: {path!r} is no parameter. The nearest paths: "
                f"{nearest(path, list(wanted))}."
            )


def _combine(
    operation: Callable[..., Array], masks: tuple[PyTree, ...], *, name: str
) -> PyTree:
    """One tree of bools from several."""
    if not masks:
        raise ValueError(f"{name} takes at least one tree of masks; got none.")
    for tree in masks:
        _checks.check_bools(tree)
    first = masks[0]
    trees = [first, *(like(m, first, name="masks", of="the first") for m in masks[1:])]
    for path, *leaves in _by_path(trees):
        shapes = [np.shape(x) for x in leaves]
        if len({len(s) for s in shapes if s}) > 1 or not _broadcast(shapes):
            raise ValueError(
                f"{path}: masks of the shapes {', '.join(map(str, shapes))} do not "
                "broadcast together. Each is that of the parameter, has size 1 on some "
                "axes, or is a scalar."
            )
    columns = [jax.tree.leaves(tree) for tree in trees]
    found = each(operation, *columns)
    return jax.tree.unflatten(jax.tree.structure(first), found)


def _any_of(*masks: Array) -> Array:
    return functools.reduce(jnp.logical_or, map(jnp.asarray, masks))


def _all_of(*masks: Array) -> Array:
    return functools.reduce(jnp.logical_and, map(jnp.asarray, masks))


def _by_path(trees: list[PyTree]) -> list[tuple]:
    rest = [jax.tree.leaves(tree) for tree in trees[1:]]
    return [
        (path, leaf, *others)
        for (path, leaf), *others in zip(
            leaves_with_paths(trees[0]), *rest, strict=True
        )
    ]


def _broadcast(shapes: list[tuple[int, ...]]) -> bool:
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True


def _kept(mask: Array) -> Array:
    return jnp.sum(mask, dtype=count_dtype(np.size(mask)))
