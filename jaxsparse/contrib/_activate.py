"""AP: of the weights that may as well go, those whose removal wakes neurons up."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxsparse import _checks, patterns
from jaxsparse._dtypes import as_wide
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.calibration.capture import capture
from jaxsparse.calibration.first_nan import check_batch
from jaxsparse.primitives import axes as algebra
from jaxsparse.program import Address, equations
from jaxsparse.tracing import Trace, retrace
from jaxsparse.tracing.leaves import checked_leaves
from jaxsparse.tree import AxesRule


class DeadNeurons(NamedTuple):
    """How many of a model's ReLU outputs are 0, as fractions of all of them.

    Attributes:
      dynamic: of neurons that are 0 for some examples and not for others.
      static: of neurons that are 0 for all examples.
    """

    dynamic: float
    static: float


def dead_neurons(trace: Trace, params: PyTree, batches: Iterable[Any]) -> DeadNeurons:
    """Measure the dynamic dead neuron rate of a ReLU network.

    The rate is the fraction of all pairs of an example and a neuron whose output is 0,
    without neurons that are 0 for all examples (counted as `static`). A neuron is one
    entry of an example's activation, e.g. one channel at one position of a convolution.
    Activations are found in the trace, as each `max(z, 0)` of a `z` that depends on the
    examples, also within scans, but not within `while` and `cond`. See `activate`.

    Args:
      trace: from `js.trace`.
      params: the parameters.
      batches: for each step the model's inputs, a tuple where it takes several; the
        first axis of the first one numbers the examples.

    Returns:
      A `DeadNeurons` of numbers.

    Raises:
      ValueError: a model without ReLU, no batches, parameters of another model, batches
        of different shapes within an example.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.array([[1.0, -1.0, 0.0]])}
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
      >>> x = jnp.array([[1.0], [2.0], [-1.0], [3.0]])
      >>> trace = js.trace(apply_fn, params, x)
      >>> found = js.contrib.dead_neurons(trace, params, [x])
      >>> round(found.dynamic, 4), round(found.static, 4)           # 4 and 4 of 12
      (0.3333, 0.3333)
    """
    _check(trace, params, batches)
    dead, rows = _dead(trace, params, list(batches))
    counts = np.concatenate(dead).astype(np.float64)
    always = counts == rows
    whole = rows * counts.size
    return DeadNeurons(
        float(counts[~always].sum() / whole), float(counts[always].sum() / whole)
    )


def activation_gains(trace: Trace, params: PyTree, batches: Iterable[Any]) -> PyTree:
    """Score weights by how much their removal raises inactive neurons.

    The gain is `-w dA/dw`, to first order the change of `A` when w is removed. `A` is
    the mean over examples and neurons of `min(z, 0)`, with z the inputs of ReLUs that
    are active for other examples. A larger gain brings more neurons closer to being
    active.

    Args:
      trace: from `js.trace`.
      params: the parameters.
      batches: as for `dead_neurons`; they are read twice.

    Returns:
      A tree like the parameters, of the same types.

    Raises:
      ValueError: as `dead_neurons`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.array([[1.0], [-4.0]])}
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
      >>> x = jnp.array([[1.0, 1.0], [2.0, 0.0]])                   # z = -3, 2
      >>> trace = js.trace(apply_fn, params, x)
      >>> js.contrib.activation_gains(trace, params, [x])["w"].tolist()
      [[-0.5], [2.0]]
    """
    _check(trace, params, batches)
    given = list(batches)
    dead, rows = _dead(trace, params, given)
    asleep = [jnp.asarray((n > 0) & (n < rows)) for n in dead]
    count = rows * sum(n.size for n in dead)

    def build(at: Trace) -> Callable[..., list[Array]]:
        inputs_of = _relu_inputs(at)

        def below(leaves: list[Array], inputs: Any) -> Array:
            found = zip(inputs_of(leaves, inputs), asleep, strict=True)
            parts = [jnp.where(own[None] & (z <= 0), z, 0) for z, own in found]
            return jnp.stack([jnp.sum(part) for part in parts]).sum() / count

        return jax.grad(below)

    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    total = functools.reduce(add, _over(trace, params, given, build))
    grads = jax.tree.unflatten(trace.treedef, total)
    return jax.tree.map(lambda w, g: -w * g, params, grads)


def activate(
    scores: PyTree,
    gains: PyTree,
    sparsity: float,
    *,
    pool: float = 0.02,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
) -> PyTree:
    """Decide by gains between weights of nearly equal scores (AP).

    Weights that `scores` already remove at `sparsity - pool / 2` are removed, and
    weights that they still keep at `sparsity + pool / 2` are kept. Among the rest, the
    weights with the largest gains are removed. Any score can be used::

        gains = js.contrib.activation_gains(trace, params, batches)
        scores = js.contrib.activate(js.scores.magnitude(params), gains, 0.8)
        masks = js.patterns.masks(scores, 0.8)

    Liu et al. (2022, AP: Selective Activation for De-sparsifying Pruned Networks,
    arXiv:2212.06145): pruning methods that leave neurons active are better, so among
    candidates choose those that lower the dynamic dead neuron rate (`dead_neurons`).
    Only the paper's abstract was available; candidates and gains are our own reading of
    it. It lowers the rate as intended, but we could not confirm that it raises
    accuracy. On a small network of Fashion-MNIST, pruned in one shot to 90 % and
    fine-tuned, a pool of 0.02 took the rate from 0.72 to 0.69 and changed accuracy by
    less than 0.3 points; pools of 0.1, or 97 %, cost points. Keep the pool small.

    Args:
      scores: a tree like the parameters, larger = keep.
      gains: the same, larger = remove first.
      sparsity: the fraction to remove.
      pool: the fraction of weights that the gains decide about.
      pattern: which weights are removed together, and which compete; one that takes a
        sparsity.
      where: as for `jaxsparse.patterns.masks`.
      axes: as for `jaxsparse.patterns.masks`.

    Returns:
      A tree of scores, larger = keep: pass it to `js.patterns.masks` with the same
      sparsity, pattern, `where` and `axes`.

    Raises:
      ValueError: a sparsity or pool outside [0, 1), gains of another structure or
        shape; or as for `jaxsparse.patterns.masks`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> scores = {"w": jnp.array([[5.0, 1.1, 1.0, 4.0]])}
      >>> gains = {"w": jnp.array([[9.0, 2.0, -1.0, 0.0]])}
      >>> js.patterns.masks(scores, 0.25)["w"].tolist()
      [[True, True, False, True]]
      >>> again = js.contrib.activate(scores, gains, 0.25, pool=0.5)
      >>> js.patterns.masks(again, 0.25)["w"].tolist()
      [[True, False, True, True]]
    """
    _checks.check_sparsity(sparsity)
    _checks.check_sparsity(pool, name="pool")
    _checks.check_arrays(scores=scores)
    _checks.check_like(scores, of="scores", gains=gains)
    _checks.check_all_numbers(gains=gains)
    low, high = (_within(sparsity, by) for by in (-pool / 2, pool / 2))
    chosen = {"pattern": pattern, "where": where, "axes": axes}
    before = patterns.masks(scores, low, **chosen)
    after = patterns.masks(scores, high, **chosen)
    largest = [jnp.max(jnp.abs(as_wide(g))) for g in jax.tree.leaves(gains)]
    most = jnp.max(jnp.stack([x.astype(jnp.float32) for x in largest]))
    most = jnp.where(most > 0, most, 1)

    def tier(s: Array, g: Array, first: Array, last: Array) -> Array:
        own = -as_wide(g) / most.astype(as_wide(g).dtype)  # between -1 and 1
        number = lambda x: jnp.asarray(x, own.dtype)
        kept = jnp.broadcast_to(last, s.shape)
        gone = ~jnp.broadcast_to(first, s.shape)
        return jnp.where(kept, number(2), jnp.where(gone, number(-2), own))

    return jax.tree.map(tier, scores, gains, before, after)


def _within(sparsity: Any, by: Any) -> Any:
    """A sparsity that is moved by some, in [0, 1)."""
    moved, most = sparsity + by, 1 - 2.0**-24
    if _checks.is_concrete(moved):
        return min(max(float(moved), 0.0), most)
    return jnp.clip(moved, 0, most)


class _Relu(NamedTuple):
    """An equation `max(z, 0)`."""

    address: Address
    operand: int  # which operand is z
    samples: int  # its axis of examples
    scans: tuple[Address, ...]  # around it


def _relus(trace: Trace) -> list[_Relu]:
    """The activations of a model, in its order."""
    eqns = dict(equations(trace.program))
    mine = set(algebra.leaves(trace.leading[0])) if trace.leading else set()
    found = []
    for address, eqn in eqns.items():
        operand = _operand(eqn)
        if operand is None or address not in trace.nodes:
            continue
        around = [address[:n] for n in range(1, len(address), 2)]
        names = [eqns[a].primitive.name for a in around]
        dims = trace.nodes[address].ins[operand]
        axes = [i for i, d in enumerate(dims) if mine & set(algebra.leaves(d))]
        if axes and not {"while", "cond"} & set(names):
            pairs = zip(around, names, strict=True)
            scans = tuple(a for a, name in pairs if name == "scan")
            found.append(_Relu(address, operand, axes[0], scans))
    if not found:
        raise ValueError(
            "trace: this model has no ReLU, `max(z, 0)` of values that depend on its "
            "first input, so no neuron can be dead."
        )
    return found


def _operand(eqn: Any) -> int | None:
    """Which operand of `max(z, 0)` is z."""
    if eqn.primitive.name != "max":
        return None
    zero = [isinstance(x, core.Literal) and np.all(x.val == 0) for x in eqn.invars]
    return zero.index(False) if sum(zero) == 1 else None


def _relu_inputs(trace: Trace) -> Callable[..., list[Array]]:
    """A function of parameters and inputs: `[examples, neurons]` of each activation."""
    relus = trace.once(_relus)
    at = {relu.address: relu for relu in relus}
    scans = {relu.address: relu.scans for relu in relus}

    def look(address: Address, eqn: Any, values: list[Any]) -> dict[str, Any]:
        return {"z": as_wide(values[at[address].operand])}

    def run(leaves: list[Array], inputs: Any) -> list[Array]:
        flat = [*leaves, *jax.tree.leaves(inputs)]
        _, found = capture(trace.program, flat, look, scans)
        several = []
        for relu in relus:
            z = jnp.moveaxis(
                found[relu.address]["z"], len(relu.scans) + relu.samples, 0
            )
            several.append(z.reshape(z.shape[0], -1))
        return several

    return run


def _over(
    trace: Trace,
    params: PyTree,
    batches: list[Any],
    build: Callable[[Trace], Callable[..., Any]],
) -> Iterable[Any]:
    """Results of a function of a trace, parameters and a batch, compiled by shape."""
    leaves, compiled = checked_leaves(trace, params), {}
    for number, batch in enumerate(batches):
        several = batch if isinstance(batch, tuple) else (batch,)
        check_batch(several, number)
        inputs = jax.tree.map(jnp.asarray, several)
        key = str(jax.tree.map(lambda x: (x.shape, x.dtype), inputs))
        if key not in compiled:
            compiled[key] = jax.jit(build(retrace(trace, params, inputs)))
        yield compiled[key](leaves, inputs)


def _dead(
    trace: Trace, params: PyTree, batches: list[Any]
) -> tuple[list[np.ndarray], int]:
    """For each neuron for how many examples it is 0, and how many there are."""

    def build(at: Trace) -> Callable[..., Any]:
        inputs_of = _relu_inputs(at)
        return lambda leaves, inputs: [
            (jnp.sum(z <= 0, axis=0), z.shape[0]) for z in inputs_of(leaves, inputs)
        ]

    total, rows = None, 0
    for found in _over(trace, params, batches, build):
        counts = [np.asarray(n, np.int64) for n, _ in found]
        if total is not None and [n.size for n in total] != [n.size for n in counts]:
            raise ValueError(
                "batches: they differ in more than the number of examples, so a neuron "
                "of one is none of another."
            )
        total = counts if total is None else list(map(np.add, total, counts))
        rows += int(found[0][1])
    if total is None:
        raise ValueError("batches: there are none. Was the iterator used up before?")
    return total, rows


def _check(trace: Any, params: Any, batches: Any) -> None:
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_arrays(params=params)
    _checks.check_batches(batches)
