"""BatchNorm's statistics, estimated again after pruning."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import widen
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import leaves_with_paths


def batch_statistics(
    update: Callable[[PyTree, Any], PyTree], stats: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Estimate a model's BatchNorm statistics anew, as the mean over batches.

    Pruned weights have other activations, and the running means and variances of the
    dense network no longer fit them; to estimate them again needs no labels, and brings
    back much of what one-shot pruning costs a convolutional network. The mean over all
    batches is taken, and not a running mean of the last ones.

    `update` is the training forward of the model, `s <- m s + (1 - m) b` with the
    statistics `b` of the batch. Its momentum `m`, of each layer, is found from the
    first batch: the statistics of the batch do not depend on `s`, so three values of
    `s` tell both, and whether the rule is of this form. So it works for any library::

        def update(stats, x):                                       # Linen
            variables = {"params": params, "batch_stats": stats}
            return model.apply(variables, x, train=True, mutable=["batch_stats"])[1][
                "batch_stats"]

        graph, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        def update(stats, x):                                       # NNX
            model = nnx.merge(graph, params, stats, rest)
            model.train()
            model(x)
            return nnx.state(model, nnx.BatchStat)

    Args:
      update: `update(stats, batch) -> stats`. Jit it.
      stats: the present statistics; only their structure, shapes and types are used,
        and entries that are no floating-point arrays, as counters, are kept.
      batches: inputs of equal size, at least one.

    Returns:
      A tree with the structure of `stats`.

    Raises:
      ValueError: no batch; statistics that do not follow the rule above (the message
        names the first), perhaps because `update` runs in inference mode.
      TypeError: an `update` that is not a function of two arguments.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> def update(stats, x):
      ...     return {"mean": 0.9 * stats["mean"] + 0.1 * x.mean()}
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
      >>> js.calibration.batch_statistics(update, {"mean": jnp.zeros(())}, batches)
      {'mean': Array(4., dtype=float32)}
    """
    _checks.check_callable(2, update=update)
    _checks.check_arrays(stats=stats)
    _checks.check_batches(batches)
    named = leaves_with_paths(stats)
    treedef = jax.tree.structure(stats)
    zeros = [jnp.zeros_like(s) if _is_running(s) else s for _, s in named]

    def updated(values: list[Array], batch: Any) -> list[Array]:
        found = update(treedef.unflatten(values), batch)
        _checks.check_like(stats, of="stats", **{"what update returns": found})
        return [widen(x) for x in jax.tree.leaves(found)]

    totals: list[Array] = []
    parts: list[float] = []
    count = 0
    for batch in batches:
        found = updated(zeros, batch)
        if not count:
            totals = [jnp.zeros_like(x) for x in found]
            again = functools.partial(updated, batch=batch)
            parts = _parts_of_batch(named, found, again)
        totals = [t + x / p for t, x, p in zip(totals, found, parts, strict=True)]
        count += 1
    if not count:
        raise ValueError(
            "batches: there is none, so there is nothing to estimate from."
        )
    return treedef.unflatten([
        (t / count).astype(s.dtype) if _is_running(s) else s
        for (_, s), t in zip(named, totals, strict=True)
    ])


def _is_running(s: Array) -> bool:
    return jnp.issubdtype(s.dtype, jnp.floating)


def _parts_of_batch(
    named: list[tuple[str, Array]],
    zero: list[Array],
    updated: Callable[[list[Array]], list[Array]],
) -> list[float]:
    """`1 - m` of each entry, from the updates of 0, of a number and of its double.

    The number is about as large as what the batch adds, so that nothing is lost in the
    difference.
    """
    numbers = [
        2.0 ** np.ceil(np.log2(1 + float(jnp.max(jnp.abs(x), initial=0)))) for x in zero
    ]

    def of(times: int) -> list[Array]:
        return updated([
            jnp.full_like(s, times * number) if _is_running(s) else s
            for (_, s), number in zip(named, numbers, strict=True)
        ])

    rows = zip(named, numbers, zero, of(1), of(2), strict=True)
    return [_part(*row) if _is_running(row[0][1]) else 1.0 for row in rows]


def _part(
    named: tuple[str, Array], number: float, zero: Array, one: Array, two: Array
) -> float:
    """`1 - m` of one array; raises where the update has another form."""
    values = (np.asarray(x, np.float64) / number for x in (zero, one, two))
    at_zero, at_one, at_two = values
    if not at_zero.size:
        return 1.0
    tolerance = 32 * float(jnp.finfo(named[1].dtype).eps)
    m = np.mean(at_one - at_zero)
    off = np.abs(np.stack([at_one - at_zero - m, at_two - at_one - m]))
    if not np.all(off <= tolerance) or not m < 1 - tolerance:
        raise ValueError(
            f"{named[0]}: it does not follow s <- m s + (1 - m) b with m < 1. Does "
            "`update` run the training forward, and return what that has updated?"
        )
    return float(1 - m)
