"""How sparse each parameter is: asked, reached, counted, and what it takes to store."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks, patterns, transforms
from jaxsparse._typing import Array, PyTree
from jaxsparse._zeros import nonzero
from jaxsparse.report._tables import Row, Table
from jaxsparse.tree import (
    by_rules,
    leaves_with_paths,
    like,
    map_with_path,
    select,
    unwrap_variables,
    why_dense,
)


def table(
    params: PyTree,
    masks: PyTree = None,
    *,
    asked: Any = None,
    opt_state: PyTree = None,
    title: str = "Sparsity",
) -> Table:
    """Tabulate the sparsity of each parameter and of the whole model.

    It reads values and waits for the device once: call it outside jit.

    Args:
      params: a tree of arrays, or of `jax.ShapeDtypeStruct` when masks are given.
      masks: a tree of bools with its structure; each leaf broadcasts to its parameter.
        None: the masks in `opt_state`; without one, weights that are not exactly 0
        count as kept in the parameters of `jaxsparse.tree.select(params)`, and the
        other parameters count as not pruned.
      asked: the requested sparsity: a number, shown against each pruned parameter, a
        tree of numbers with the structure of `params` (see `jaxsparse.allocations`), or
        a mapping from paths or regular expressions.
      opt_state: the state of any chain with a pruning transformation: where masks come
        from if none are given, and the count of weights that leaked in training.
      title: the heading.

    Returns:
      The table.

    Raises:
      ValueError: masks or `asked` of another structure, a mask that does not broadcast,
        no pruning in `opt_state`, an `asked` outside [0, 1), traced arrays where values
        are needed.
      TypeError: a leaf that is not an array, a mask whose dtype is not bool, an `asked`
        that is not a number.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, -4.0]])}
      >>> params["bias"] = jnp.ones(2)
      >>> params, masks = js.prune(params, 0.5)
      >>> t = js.report.table(params, masks, asked=0.5)
      >>> t.total.kept, t.total.size, t.pruned.reached
      (4, 6, 0.5)
      >>> [(row.path, row.reached, row.packed_bytes) for row in t.rows]
      [('bias', 0.0, 8), ('kernel', 0.5, 9)]
    """
    params, asked = unwrap_variables(params), unwrap_variables(asked)
    _checks.check_is_part("params", params)
    named = leaves_with_paths(params)
    for path, w in named:
        _check_parameter(path, w)
    if masks is not None:
        masks = unwrap_variables(masks)
    elif opt_state is not None:
        masks = transforms.masks_of(opt_state)
    else:
        masks = map_with_path(_mask_of_zeros, params, select(params))
    masks = like(masks, params, name="masks")
    patterns.check_masks(masks, params)
    states = transforms.find_states(unwrap_variables(opt_state))
    counts = [
        _counts(path, w, mask)
        for (path, w), mask in zip(named, jax.tree.leaves(masks), strict=True)
    ]
    # All at once: each wait for a device costs more than the sums themselves.
    counts, in_state = jax.device_get((counts, [s.leaked for s in states]))
    rows = tuple(
        _row(path, w, mask, want, int(kept), int(leaked))
        for (path, w), mask, want, (kept, leaked) in zip(
            named, jax.tree.leaves(masks), _asked(asked, params), counts, strict=True
        )
    )
    return Table(
        rows,
        _sum("pruned parameters", [row for row in rows if row.pruned]),
        _sum("total", rows),
        title,
        max((int(np.max(n)) for n in in_state), default=0),
    )


def _check_parameter(path: str, w: Any) -> None:
    if not (hasattr(w, "shape") and hasattr(w, "dtype")):
        raise TypeError(
            f"{path or 'params'}: a parameter is an array or a "
            f"jax.ShapeDtypeStruct, got {w!r} of type {type(w).__name__}."
        )
    if not _checks.is_concrete(w) and not isinstance(w, jax.ShapeDtypeStruct):
        raise ValueError(f"{path}: {_NO_VALUES.format('a tracer')}")


def _mask_of_zeros(path: str, w: Any, take: bool) -> Any:
    if not take:
        return np.True_
    if not _checks.is_concrete(w):
        raise ValueError(
            f"{path}: without masks, a weight counts as removed when it is 0, but a "
            "jax.ShapeDtypeStruct has no values. Give masks or opt_state."
        )
    return nonzero(w)


def _asked(asked: Any, params: PyTree) -> list[Any]:
    named = leaves_with_paths(params)
    if asked is None:
        return [None] * len(named)
    if jax.tree_util.all_leaves([asked]):
        _checks.check_sparsity(asked, name="asked")
        return [_ForPruned(float(asked))] * len(named)
    asked, _ = by_rules(params, asked, name="asked")
    asked = like(asked, params, name="asked")
    values = jax.tree.leaves(asked)
    for (path, _), value in zip(named, values, strict=True):
        _checks.check_sparsity(value, name=f"{path}: asked")
    return [float(value) for value in values]


class _ForPruned(float):
    """A number that was asked of all pruned parameters, and of no others."""


def _counts(path: str, w: Any, mask: Any) -> tuple[Any, Any]:
    if not _checks.is_concrete(mask):
        raise ValueError(f"{path}: its mask is {_NO_VALUES.format('a placeholder')}")
    # In 64 bits, also where JAX's 64-bit mode is off: a sum may pass 2**31, and a
    # small number in numpy's float64 must not become 0 on the way to the device.
    with jax.enable_x64(True):
        kept = _sum_of(mask)
        number = jnp.issubdtype(w.dtype, np.number)
        if _checks.is_concrete(w) and number:
            return kept, _sum_of_leaked(w, mask)
    return kept, 0


@jax.jit
def _sum_of(mask: Array) -> Array:
    return jnp.sum(mask, dtype=np.int64)


@jax.jit
def _sum_of_leaked(w: Array, mask: Array) -> Array:
    return jnp.sum(nonzero(w) & ~mask, dtype=np.int64)


def _row(
    path: str, w: Any, mask: Any, asked: float | None, kept: int, leaked: int
) -> Row:
    size = math.prod(w.shape)
    few = kept <= max(1.0, math.sqrt(mask.size) / 10) and mask.size > 1
    kept *= size // max(1, mask.size)
    pruned = mask.ndim > 0 or kept < size
    if isinstance(asked, _ForPruned):
        asked = float(asked) if pruned else None
    item = w.dtype.itemsize
    # What has fewer than two axes nobody misses.
    why = "" if pruned or len(w.shape) < 2 else why_dense(path, w) or ""
    return Row(
        path=path,
        shape=tuple(w.shape),
        dtype=str(w.dtype),
        asked=asked,
        reached=(size - kept) / max(1, size),
        kept=kept,
        size=size,
        dense_bytes=size * item,
        packed_bytes=kept * item + -(-size // 8) if pruned else size * item,
        leaked=leaked,
        pruned=pruned,
        nearly_empty=few and pruned,
        why=why,
    )


def _sum(path: str, rows: Sequence[Row]) -> Row:
    size, kept = sum(r.size for r in rows), sum(r.kept for r in rows)
    types = {r.dtype for r in rows}
    asked = None
    if any(r.asked is not None for r in rows):
        # One number for all stays that number: a mean would round it.
        alike = len({r.asked for r in rows}) == 1
        mean = math.fsum((r.asked or 0.0) * r.size for r in rows) / max(1, size)
        asked = rows[0].asked if alike else mean
    return Row(
        path=path,
        shape=(),
        dtype="mixed" if len(types) > 1 else "".join(types),
        asked=asked,
        reached=(size - kept) / max(1, size),
        kept=kept,
        size=size,
        dense_bytes=sum(r.dense_bytes for r in rows),
        packed_bytes=sum(r.packed_bytes for r in rows),
        leaked=sum(r.leaked for r in rows),
        pruned=any(r.pruned for r in rows),
    )


_NO_VALUES = (
    "{} without values, and the table counts values. Call js.report.table outside jit."
)
