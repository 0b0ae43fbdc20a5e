"""What a residual branch is worth: how much it turns its input, and the output."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import Array, PyTree
from jaxsparse.calibration.first_nan import check_batch
from jaxsparse.depth._blocks import Join, ResidualBlock, residual_blocks
from jaxsparse.depth._branches import flat_of
from jaxsparse.depth._flat_program import Flat
from jaxsparse.depth._gates import with_gates
from jaxsparse.depth._rewrite import runnable
from jaxsparse.narrowing.retracing import by_shape
from jaxsparse.program import Step
from jaxsparse.tracing import Trace
from jaxsparse.tracing.leaves import checked_leaves


def block_similarity(
    trace: Trace, params: PyTree, batches: Iterable[Any], *, join: Join = None
) -> dict[str, float]:
    """Measure how little a block changes its input, E cos(x, x + f(x)) over tokens.

    Remove the blocks of greatest similarity first: He et al. (LLM-Drop, 2024,
    arXiv:2406.15786) for attention and feed-forward sublayers; Men et al. (ShortGPT,
    2024, arXiv:2403.03853) for whole layers (`join`), where block influence is one
    minus the similarity. x is the value of the stream, before any norm of the branch.

    The cosine is taken over the last axis, in float32 or, if the activations are wider,
    in their type; 0 where either is 0 altogether. Each token (each position of the
    other axes) counts the same, also over batches of different sizes. No activations
    are kept: one compiled function for each shape returns sums.

    Differs from the reference implementation, whose removal of consecutive layers
    reads the similarity of a gap one layer too long: here `join` says which layers go
    together and it is measured over exactly those.

    Args:
      trace: from `js.trace`.
      params: the parameters.
      batches: for each step the model's inputs, a tuple where it takes several.
      join: as given to `residual_blocks`; a joined block is measured from the input of
        its first branch to the sum with its last.

    Returns:
      By name of `residual_blocks`, in the model's order.

    Raises:
      ValueError: no batches, a model without residual branches, parameters of another
        structure or other shapes, a similarity that is NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.array([[0.0, 1.0], [1.0, 0.0]])}
      >>> apply_fn = lambda params, x: x + x @ params["w"]
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> found = js.depth.block_similarity(trace, params, [x])
      >>> round(found["w"], 4)  # (cos(45 degrees) + 1) / 2
      0.8536
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_arrays(params=params)
    _checks.check_batches(batches)
    names = list(residual_blocks(trace, join=join))

    def build(at: Trace) -> Callable[..., Any]:
        found = at.once(flat_of)
        known = residual_blocks(at, join=join)
        run, counts = _cosines(found, [known[name] for name in names])
        return lambda leaves, inputs: (jnp.stack(run(leaves, inputs)), counts)

    sums, counts = _summed(trace, params, batches, build)
    return _by_name(names, sums / counts)


def _cosines(
    found: Flat, known: list[ResidualBlock]
) -> tuple[Callable[..., Any], np.ndarray]:
    """A program that gives each block's sum of cosines, and how many are summed."""
    flat = found.steps
    outs = itertools.chain(*(step.outs for step in flat.steps))
    # The greatest number of a variable; those above it are free.
    number = max(itertools.chain(outs, flat.arguments, flat.constants))
    new: dict[int, list[Step]] = {}
    results, counts = [], []
    for block in known:
        first, last = (found.additions[block.additions[i]] for i in (0, -1))
        begin, end = found.steps.steps[first], found.steps.steps[last]
        x = begin.ins[block.additions[0].stream]
        number += 1
        made = {"ins": (x, end.outs[0]), "outs": (number,), "eqn": None}
        look = end._replace(name="cosine", run=_cosine, text="", **made)
        new.setdefault(last, [end]).append(look)
        results.append(number)
        shape = end.eqn.outvars[0].aval.shape
        counts.append(math.prod(shape[:-1]))
    steps = itertools.chain(*(new.get(i, [s]) for i, s in enumerate(flat.steps)))
    flat = dataclasses.replace(flat, steps=tuple(steps), results=tuple(results))
    return runnable(found, flat, {}), np.array(counts, float)


def _cosine(x: Any, y: Any) -> list[Any]:
    dtype = wide_dtype(y.dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    size = lambda v: jnp.sqrt(jnp.sum(v * v, axis=-1))
    norms = size(x) * size(y)
    dots = jnp.sum(x * y, axis=-1)
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    none = norms <= jnp.finfo(dtype).tiny  # a NaN is not none
    return [jnp.sum(jnp.where(none, zero, dots / jnp.where(none, one, norms)))]


def output_losses(
    trace: Trace, params: PyTree, batches: Iterable[Any], *, join: Join = None
) -> dict[str, float]:
    """Measure the mean squared change of the output when each block alone is removed.

    Output losses of blocks nearly add up, so `knapsack` can choose a set of blocks:
    Zhang et al. (LAPTOP-Diff, 2024, arXiv:2404.11098). With n blocks it runs n + 1
    forward passes per batch in one compiled function, one after another; it needs the
    memory of one pass and one result.

    Args:
      trace: from `js.trace`.
      params: the parameters.
      batches: for each step the model's inputs, a tuple where it takes several.
      join: as given to `residual_blocks`.

    Returns:
      By name of `residual_blocks` the mean over all numbers of the output (of all
      floating arrays in it) and all batches.

    Raises:
      ValueError: no batches, a model without residual branches or without floating
        point results, parameters of another structure or other shapes, a loss that is
        NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = [{"w": jnp.full((1, 1), i)} for i in (1.0, 2.0)]
      >>> def apply_fn(params, x):
      ...     for p in params:
      ...         x = x + x @ p["w"]
      ...     return x
      >>> x = jnp.ones((2, 1))
      >>> trace = js.trace(apply_fn, params, x)
      >>> js.depth.output_losses(trace, params, [x])  # 6 becomes 3, 6 becomes 2
      {'0': 9.0, '1': 16.0}
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_arrays(params=params)
    _checks.check_batches(batches)
    names = tuple(residual_blocks(trace, join=join))

    def build(at: Trace) -> Callable[..., Any]:
        program = with_gates(at, names, join)
        outs = [v.aval for v in at.program.jaxpr.outvars]
        floating = [
            i for i, x in enumerate(outs) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        count = sum(outs[i].size for i in floating)
        if not count:
            raise ValueError(
                "The model's results are not floating point, so they have no distance. "
                "Return logits or hidden states from apply_fn."
            )
        rows = np.concatenate([np.ones((1, len(names))), 1 - np.eye(len(names))])

        def losses(leaves: list[Any], inputs: list[Any]) -> Any:
            def one(whole: list[Array], row: tuple[Any, Any]) -> Any:
                first, gates = row
                found = program(leaves, inputs, list(gates))
                found = [jnp.asarray(found[i]) for i in floating]
                whole = [
                    jnp.where(first, a, b) for a, b in zip(found, whole, strict=True)
                ]
                return whole, _squares(found, whole)

            zeros = [jnp.zeros(outs[i].shape, outs[i].dtype) for i in floating]
            first = jnp.arange(len(rows)) == 0
            _, sums = jax.lax.scan(one, zeros, (first, jnp.asarray(rows)))
            return sums[1:], np.full(len(names), float(count))

        return losses

    sums, counts = _summed(trace, params, batches, build)
    return _by_name(list(names), sums / counts)


def _squares(found: list[Array], whole: list[Array]) -> Array:
    wide = [wide_dtype(x.dtype) for x in whole]
    widest = max(wide, key=lambda dtype: jnp.finfo(dtype).bits)
    parts = [
        jnp.sum(jnp.square(a.astype(t) - b.astype(t))).astype(widest)
        for a, b, t in zip(found, whole, wide, strict=True)
    ]
    return sum(parts[1:], parts[0])


def _summed(
    trace: Trace,
    params: PyTree,
    batches: Iterable[Any],
    build: Callable[[Trace], Callable[..., tuple[Any, Any]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts over all batches, added up in float64."""
    leaves = checked_leaves(trace, params)
    program_for = by_shape(trace, build)

    @jax.jit
    def run(leaves: list[Any], inputs: Any) -> Any:
        program, _ = program_for(leaves, inputs)
        return program(leaves, jax.tree.leaves(inputs))

    found = []
    for number, batch in enumerate(batches):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        check_batch(inputs, number)
        found.append(run(leaves, inputs))
    if not found:
        raise ValueError("batches: there are none. Was the iterator used up before?")
    sums, counts = (
        np.sum([np.asarray(x, np.float64) for x in xs], axis=0)
        for xs in zip(*found, strict=True)
    )
    return sums, counts


def _by_name(names: list[str], values: np.ndarray) -> dict[str, float]:
    for name, value in zip(names, values, strict=True):
        if math.isnan(value):
            raise ValueError(
                f"{name}: what was measured is NaN. Look for NaN in the parameters and "
                "the batches."
            )
    return dict(zip(names, values.tolist(), strict=True))
