"""`sparsify`: a traced model whose pruned kernels are multiplied in packed form."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.formats import Format
from jaxsparse.formats.weights import Weight, weight_of, with_packed
from jaxsparse.kernels._evaluate import evaluate
from jaxsparse.kernels._layers import Layer, Uses, chosen_of
from jaxsparse.kernels._model import model_of
from jaxsparse.kernels._operand import Operand
from jaxsparse.kernels._rules import MEASURED, Rules
from jaxsparse.program import abstract
from jaxsparse.tracing import Trace, retrace
from jaxsparse.tree import leaves_with_paths, like, select


class Sparsified(NamedTuple):
    """The result of `sparsify`.

    Attributes:
      apply_fn: `apply_fn(params, *inputs)`, for parameters like `params` below.
      params: the parameters, with packed kernels.
      layers: by path how each pruned kernel is run; `print(sparsified)` shows them.
    """

    apply_fn: Callable[..., Any]
    params: PyTree
    layers: Mapping[str, Layer]

    def __str__(self) -> str:
        head = ("kernel", "engine", "format", "sparsity", "rows", "bytes")
        rows: list[tuple[str, ...]] = [(*head, "dense ms", "packed ms", "why dense")]
        for path, x in self.layers.items():
            times = (
                "-" if math.isnan(t) else f"{t:.3f}" for t in (x.dense_ms, x.packed_ms)
            )
            share = f"{100 * x.sparsity:.1f} %"
            cells = x.engine, x.format, share, f"{x.rows:,}", f"{x.bytes:,}"
            rows.append((path, *cells, *times, x.why))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        pad = lambda row: (c.ljust(w) for c, w in zip(row, widths, strict=True))
        return "\n".join("  ".join(pad(row)).rstrip() for row in rows)


def sparsify(
    trace: Trace,
    params: PyTree,
    masks: PyTree,
    *,
    format: Format | None = None,
    where: Where = None,
    rules: Rules = MEASURED,
    measure: bool = False,
) -> Sparsified:
    """Run a pruned, traced model with packed kernels.

    The traced program is evaluated with the products of pruned kernels replaced by
    `js.kernels.matmul`: dense layers, attention projections, experts, layers of a scan,
    and convolutions without groups, whose windows become rows (as large as the windows
    together). Kernels may be reshaped, transposed and cast before; they are not made
    dense for that. jit, grad, vmap and sharding work as before, and inputs of other
    shapes are traced anew.

    A kernel is packed if a rule says that an engine is quicker than a dense product for
    the rows of the traced shapes. All others, and those that the program needs as an
    array (grouped convolutions, a norm of the weights), stay dense arrays with zeros;
    `print(sparsified)` says which and why.

    Args:
      trace: the trace from `js.trace`.
      params: the parameters.
      masks: a tree of bools with their structure.
      format: the format of all kernels; by default for each the first of `Condensed`,
        tiles from large to small and `Csr16` that its mask has and a rule takes.
        `js.formats.Int8Tiles` is never a default: it rounds weights and activations, an
        error of about 1 % in each product, and has no gradient.
      where: which kernels may be packed; by default all that a mask prunes.
      rules: which engine is quick; see `js.kernels.choose`.
      measure: whether to time each kernel here, dense and by the engines that the rules
        name for its format (whatever their limits), and to take the quickest: some
        tenths of a second for each kernel of another shape, rows and sparsity.

    Returns:
      The function, the parameters for it, and how each pruned kernel is run. Saved by
      `js.checkpoint.save`, the parameters run in a process of their own with
      `js.kernels.packed_apply(trace)`.

    Raises:
      ValueError: parameters of another model, masks that do not fit; with `format` a
        mask of another structure.
      TypeError: anything other than a trace or rules, traced masks.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.arange(8192.0).reshape(64, 128)}
      >>> x = jnp.ones((1, 64))
      >>> trace = js.trace(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
      >>> pruned = js.prune(params, 0.9, pattern=js.Balanced((1, 128)), trace=trace)
      >>> sparse = js.kernels.sparsify(trace, *pruned)
      >>> sparse.layers["w"].engine, sparse.apply_fn(sparse.params, x).shape
      ('gathered', (1, 128))
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_is(Rules, "js.kernels.Rules(...)", rules=rules)
    _checks.check_bool(measure=measure)
    _checks.check_arrays(params=params)
    masks = like(masks, params, name="masks")
    patterns.check_masks(masks, params)
    _checks.check_known("kernels.sparsify", masks=masks, params=params)
    retrace(trace, params, trace.inputs)  # raises for those of another model
    pruned = _pruned(trace, params, masks, where)
    uses = _uses(trace, params, pruned)
    timed: dict[Any, list[float]] | None = {} if measure else None
    chosen = {
        path: chosen_of(weight, uses[path], format, rules, timed)
        for path, weight in pruned.items()
    }
    layers = {path: found.layer for path, found in chosen.items()}
    packed = {p: x.packed for p, x in chosen.items() if x.packed is not None}
    engines = {p: x.engine for p, x in chosen.items() if x.engine is not None}
    new = with_packed(params, masks, packed)
    return Sparsified(model_of(trace, rules, engines), new, layers)


def _pruned(
    trace: Trace, params: PyTree, masks: PyTree, where: Where
) -> dict[str, Weight]:
    """The kernels that masks prune."""
    chosen = None if where is None else jax.tree.leaves(select(params, where))
    found = {}
    rows = zip(leaves_with_paths(params), jax.tree.leaves(masks), strict=True)
    for i, ((path, w), mask) in enumerate(rows):
        kernel = trace.kernels.get(path)
        takes = chosen is None or chosen[i]
        if kernel is not None and takes and np.ndim(mask) and w.size:
            found[path] = weight_of(path, w, mask, kernel.view)
    return found


def _uses(
    trace: Trace, params: PyTree, pruned: Mapping[str, Weight]
) -> dict[str, Uses]:
    """From one abstract pass over the program."""
    found = {path: Uses() for path in pruned}

    def multiply(x: Array, operand: Operand) -> Array:
        found[operand.path].rows.append(x.shape[-2])
        return jnp.zeros((*x.shape[:-1], operand.view.d_out), operand.dtype)

    def made_dense(operand: Operand, eqn: Any) -> None:
        what = "a result of the model" if eqn is None else f"`{eqn.primitive.name}`"
        found[operand.path].dense.append(f"{what} reads it as an array")

    def run(leaves: list[Array], inputs: Any) -> list[Array]:
        args = [
            Operand(path, w, pruned[path].view, w.dtype) if path in pruned else w
            for path, w in zip(trace.paths, leaves, strict=True)
        ]
        flat = [*args, *jax.tree.leaves(inputs)]
        return evaluate(trace.program, flat, multiply, made_dense)

    jax.eval_shape(run, list(map(abstract, jax.tree.leaves(params))), trace.inputs)
    return found
