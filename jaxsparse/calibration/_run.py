"""Statistics of all inputs of a model, in one pass over calibration data."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._compiled import Keyed
from jaxsparse._host import on_host
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.calibration._stats import RunningStats, finalize, merge, unseen
from jaxsparse.calibration.capture import capture
from jaxsparse.calibration.first_nan import (
    check_batch,
    check_params,
    finite,
    input_flags,
    not_finite,
)
from jaxsparse.calibration.rows import contribution, flattened, placed, reading_key
from jaxsparse.calibration.selection import selected_kernels
from jaxsparse.calibration.statistics import Statistics
from jaxsparse.calibration.weights import batch_weight, weight_of_rows
from jaxsparse.program import flatten, key_of
from jaxsparse.tracing import Kernel, Trace, retrace


def run(
    trace: Trace,
    params: PyTree,
    batches: Iterable[Any],
    *,
    gram: bool = True,
    where: Where = None,
    weight: Callable[..., Array] | None = None,
    host: bool = False,
) -> Statistics:
    """Collect statistics of the inputs of each kernel from calibration data.

    Means, second moments and (with `gram`) the matrices `X^T X / n` of the inputs of
    every kernel, in the order of its own columns: a convolution's patches, an attention
    kernel's heads. Kernels that read the same input share one. Each expert counts its
    own tokens: by `ragged_dot` those of its group; where experts are a batch axis of a
    product, the rows that are not all 0, as a dispatch leaves them.

    All statistics describe the given model. `jaxsparse.oneshot.layerwise` takes the
    inputs of each layer from the pruned layers before it.

    Memory: the statistics (a gram of `d_in^2` floats for each distinct input) and the
    activations of one batch.

    Args:
      trace: what `jaxsparse.trace` found. Batches of other shapes are traced again.
      params: the parameters.
      batches: for each step the model's inputs, a tuple where it takes several.
      gram: whether to keep the gram matrices.
      where: which kernels take part; see `jaxsparse.tree.select`. By default
        `trace.where` selects by use, without tied embeddings. Parameters that the trace
        cannot follow stay dense by default, and `Statistics.left_dense` says why.
      weight: `weight(*inputs)` gives one number of at least 0 for each sample of a
        batch (the first axis of its first input), such as the importance of a diffusion
        timestep; or for each index of more leading axes. For batches of padded
        sequences that is `weight=lambda ids, mask: mask`, `[batch, tokens]`: rows of
        weight 0 do not count.
      host: keeps the running statistics in host memory between batches.

    Returns:
      A `Statistics`.

    Raises:
      ValueError: no batches or an empty one; other parameters than those traced; a
        parameter that `where` names and the trace could not follow; NaN or Inf in a
        parameter, a batch or an activation, with the first place; a weight of another
        shape, negative or NaN, or one whose entries do not cover the rows of some
        kernel.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.ones((2, 3))}
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> stats = js.calibration.run(trace, params, [x, x])
      >>> stats.of("w").gram
      Array([[5., 1.],
             [1., 2.]], dtype=float32)
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_arrays(params=params)
    _checks.check_batches(batches)
    _checks.check_bool(gram=gram, host=host)
    kernels, left_dense = selected_kernels(trace, params, where)
    by_input = {kernel.input: kernel for kernel in reversed(kernels.values())}
    names = [path for path in kernels if path in by_input]  # as the model reads them
    leaves = jax.tree.leaves(params)
    check_params(trace.paths, leaves, kernels)
    flags: list[tuple[Array, Array]] = []
    compiled: dict[Any, Any] = {}
    states: dict[str, RunningStats] | None = None
    for number, batch in enumerate(batches):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        check_batch(inputs, number)
        key = str(jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), inputs))
        if key not in compiled:
            here = retrace(trace, params, jax.tree.map(jnp.asarray, inputs))
            again = {name: here.kernels[k.path] for name, k in by_input.items()}
            run_batch = _flagged(pass_over(here, again, gram=gram), names)
            own = _key(here, again, names, gram=gram, weighted=weight is not None)
            compiled[key] = Keyed(run_batch, own)
        by_row = batch_weight(weight, inputs, number)
        found, flag = compiled[key](leaves, inputs, by_row)
        flags.append(flag)
        if states is not None:
            before = jax.tree.map(jnp.asarray, states)
            found = {name: merge(before[name], found[name]) for name in before}
        states = found
        if host:
            states = jax.tree.map(np.asarray, states)
    if states is None:
        raise ValueError("batches: there are none. Was the iterator used up before?")
    # At the end, so that nothing waits for a batch.
    _check_flags(flags, names, trace.paths, leaves)
    entries = tuple((path, k.input, k.view) for path, k in kernels.items())
    changes = tuple((path, k.changes) for path, k in kernels.items() if k.changes)
    known = {name: finalize(s) for name, s in states.items()}
    stats = Statistics(known, entries, changes, tuple(left_dense.items()))
    if all(_checks.is_concrete(known.count) for known in stats.inputs.values()):
        _warn_unseen(stats)
    return stats


def _warn_unseen(stats: Statistics) -> None:
    for path in unseen(stats):
        count = on_host(stats.of(path).count)
        at = [",".join(map(str, place)) for place in np.argwhere(count == 0)]
        where = f" (batch index {'; '.join(at)})" if count.ndim else ""
        warnings.warn(
            f"{path}{where}: no row reached it, so nothing is known of its inputs, and "
            "scores and solvers fall back to magnitude there. More calibration data "
            "may reach it.",
            stacklevel=3,
        )


def pass_over(
    trace: Trace, kernels: dict[str, Kernel], *, gram: bool
) -> Callable[..., dict[str, RunningStats]]:
    """A function of parameters and inputs that returns the statistics of a batch."""
    readings = {
        reading.site.address: (kernel, reading)
        for kernel in kernels.values()
        for reading in kernel.readings
    }
    # One equation may read several of them, as a fused kernel is concatenated.
    several = [
        (name, reading)
        for name, kernel in kernels.items()
        for reading in kernel.readings
    ]
    scans = {address: reading.scans for address, (_, reading) in readings.items()}

    def rows_of(reading: Any, weight: Array | None) -> Any:
        return None if weight is None else weight_of_rows(trace, reading, weight)

    def statistics(
        leaves: list[Array], inputs: Any, weight: Array | None
    ) -> dict[str, RunningStats]:
        def look(address: Any, eqn: Any, operands: list[Any]) -> Any:
            return {
                str(i): contribution(
                    reading,
                    eqn,
                    operands,
                    gram=gram,
                    sample=rows_of(reading, weight),
                    weight=weight,
                )
                for i, (name, reading) in enumerate(several)
                if reading.site.address == address
            }

        flat = [*leaves, *jax.tree.leaves(inputs)]
        _, found = capture(trace.program, flat, look, scans)
        states: dict[str, RunningStats] = {}
        for i, (name, reading) in enumerate(several):
            part = found[reading.site.address][str(i)]
            states[name] = _placed(states.get(name), part, kernels[name], reading)
        return states

    return statistics


def _key(
    trace: Trace,
    kernels: dict[str, Kernel],
    names: list[str],
    *,
    gram: bool,
    weighted: bool,
) -> Any:
    """All that the statistics of a batch depend on, beside parameters and inputs."""
    flat = flatten(trace.program, len(trace.paths), (), ())
    looks = tuple(
        (name, k.view.batch, k.view.d_in, reading_key(r, 0), r.batch.tobytes())
        for name, k in kernels.items()
        for r in k.readings
    )
    constants = tuple(map(id, trace.program.consts))
    steps = key_of(flat.steps, (*flat.arguments, *flat.constants), flat.results)
    # Which sample a row is of, the trace knows alone.
    return steps, constants, looks, tuple(names), gram, trace if weighted else None


def _flagged(
    statistics: Callable[..., dict[str, RunningStats]], names: list[str]
) -> Callable[..., Any]:
    """With what tells where NaN is: which statistics are finite, which inputs not."""

    def run(leaves: list[Array], inputs: Any, weight: Array | None) -> Any:
        found = statistics(leaves, inputs, weight)
        return found, (finite([found[name] for name in names]), input_flags(inputs))

    return run


def _check_flags(
    flags: list[tuple[Array, Array]],
    names: list[str],
    paths: tuple[str, ...],
    leaves: list[Any],
) -> None:
    for number, (whole, bad_inputs) in enumerate(flags):
        if _checks.is_concrete(whole) and not np.all(found := on_host(whole)):
            first = names[int(np.argmin(found))]
            raise not_finite(first, number, bad_inputs, paths, leaves)


def _placed(
    state: RunningStats | None, part: RunningStats, kernel: Kernel, reading: Any
) -> RunningStats:
    """Adds what one equation saw at its place among the kernel's batch indices."""
    view, at = kernel.view, reading.batch.reshape(-1)
    scans = len(reading.scans)
    lead = part.count.ndim
    assert lead == scans + 1, "a leading axis for each scan, and one of the equation"
    total = int(np.prod(view.batch)) if view.batch else 1
    part = placed(flattened(part), at, total)
    shaped = jax.tree.map(lambda x: x.reshape(*view.batch, *x.shape[1:]), part)
    return shaped if state is None else merge(state, shaped)
