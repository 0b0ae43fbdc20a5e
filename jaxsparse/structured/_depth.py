"""Choosing depth: gates on branches, learnable N:M depth, a knapsack of blocks."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree
from jaxsparse.structured._blocks import Join, blocks, chosen
from jaxsparse.structured._narrow import checked_leaves
from jaxsparse.structured._rewrite import by_shape
from jaxsparse.tracing import Trace
from jaxsparse.tracing._jaxprs import Address, equations, inner, scan_counts
from jaxsparse.tracing._steps import bind


def gated(trace: Trace, *, join: Join = None) -> Callable[..., Any]:
    """The model with a number before each residual branch: x + g f(x).

    At 1 it is the model, at 0 the model without the branch (`remove_blocks`), and in
    between it can be differentiated: for gates that are trained (Liu et al., FoldGPT,
    2024, arXiv:2407.00928; `nm_gates`) and to ask what a block is worth. A joined block
    has its gate before each of its branches. Scans and checkpoints stay what they are.

    Args:
      trace: of `js.trace`.
      join: as given to `blocks`.

    Returns:
      `apply_fn(params, gates, *inputs)`, a pure function. `gates` maps names of blocks
      to scalars; a block without one has none. It raises a ValueError for a name that
      no block has and a gate that is no scalar.

    Raises:
      ValueError: a model without residual branches.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> def apply_fn(params, x):
      ...     return x + x @ params["w"]
      >>> params, x = {"w": 3 * jnp.ones((1, 1))}, jnp.ones((2, 1))
      >>> trace = js.trace(apply_fn, params, x)
      >>> list(js.structured.blocks(trace))
      ['w']
      >>> with_gates = js.structured.gated(trace)
      >>> with_gates(params, {"w": 0.5}, x).ravel().tolist()
      [2.5, 2.5]
      >>> loss = lambda gates: with_gates(params, gates, x).sum()
      >>> float(jax.grad(loss)({"w": 1.0})["w"])
      6.0
    """
    blocks(trace, join=join)
    programs: dict[tuple[str, ...], Any] = {}

    def apply_fn(params: PyTree, gates: Mapping[str, Any], *inputs: Any) -> Any:
        names = tuple(sorted(gates))
        if names not in programs:
            chosen(trace, names, join)
            build = lambda at: with_gates(at, names, join)
            programs[names] = by_shape(trace, build)
        for name in names:
            if jnp.ndim(gates[name]):
                raise ValueError(
                    f"gates[{name!r}] must be a scalar, got the shape "
                    f"{jnp.shape(gates[name])}."
                )
        leaves = checked_leaves(trace, params)
        program, structure = programs[names](leaves, inputs)
        values = [gates[name] for name in names]
        outs = program(leaves, jax.tree.leaves(inputs), values)
        return jax.tree.unflatten(structure, outs)

    return apply_fn


def with_gates(
    trace: Trace, names: tuple[str, ...], join: Join
) -> Callable[..., list[Any]]:
    """The program of a trace with gates before some branches.

    Args:
      trace: of the model.
      names: of the blocks.
      join: as given to `blocks`.

    Returns:
      A function of the parameters' leaves, the flat inputs and the gates; it gives the
      flat results.
    """
    eqns = dict(equations(trace.program))
    known = chosen(trace, names, join)
    # By operand of an addition, for the turns of the scans around it, which gate.
    places: dict[_Operand, dict[tuple[int, ...], int]] = {}
    for i, name in enumerate(names):
        for address, turns, stream in known[name].additions:
            places.setdefault((address, 1 - stream), {})[turns] = i

    def run(leaves: Any, inputs: Any, gates: Any) -> list[Any]:
        values = {}
        for (address, operand), mine in places.items():
            around = (eqns[address[:i]] for i in range(1, len(address), 2))
            shape = [e.params["length"] for e in around if e.primitive.name == "scan"]
            dtype = eqns[address].invars[operand].aval.dtype
            every = (mine.get(turns) for turns in np.ndindex(*shape))
            found = [jnp.ones((), dtype) if i is None else gates[i] for i in every]
            found = jnp.stack([jnp.asarray(g).astype(dtype) for g in found])
            values[address, operand] = found.reshape(shape)
        return _run(trace.program, [*leaves, *inputs], (), values)

    return run


_Operand = tuple[Address, int]


def _run(
    program: Any, args: Sequence[Any], address: Address, gates: dict[_Operand, Any]
) -> list[Any]:
    """Runs a jaxpr; gates have an axis for each scan between here and them."""
    below = {place[: len(address) + 1] for place, _ in gates}
    env: dict[Any, Any] = dict(zip(program.jaxpr.invars, args, strict=True))
    env.update(zip(program.jaxpr.constvars, program.consts, strict=True))
    read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
    for index, eqn in enumerate(program.jaxpr.eqns):
        ins, here = [read(x) for x in eqn.invars], (*address, index)
        outs = _gated(eqn, ins, here, gates) if here in below else bind(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(x) for x in program.jaxpr.outvars]


def _gated(
    eqn: Any, ins: list[Any], here: Address, gates: dict[_Operand, Any]
) -> list[Any]:
    """An addition of a branch, or what has some inside."""
    inside = {key: g for key, g in gates.items() if key[0][: len(here)] == here}
    if any(place == here for place, _ in inside):
        gate = lambda i, x: x * inside[here, i] if (here, i) in inside else x
        return bind(eqn, [gate(i, x) for i, x in enumerate(ins)])
    body, p = inner(eqn)[0], eqn.params
    run = lambda values, gates: _run(body, values, (*here, 0), gates)
    if eqn.primitive.name != "scan":
        if "policy" in p:
            again = {"prevent_cse": p["prevent_cse"], "policy": p["policy"]}
            run = jax.checkpoint(run, **again)
        return run(ins, inside)
    first, carried = scan_counts(eqn)
    last = first + carried

    def turn(carry: list[Any], now: Any) -> tuple[list[Any], list[Any]]:
        outs = run([*ins[:first], *carry, *now[0]], now[1])
        return outs[:carried], outs[carried:]

    options = {name: p[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(turn, ins[first:last], (ins[last:], inside), **options)
    return [*carry, *ys]


CELLS = 50_000_000  # of the knapsack's table, a byte each


def knapsack(
    losses: Mapping[str, float],
    sizes: Mapping[str, int],
    *,
    at_least: int,
    unit: int | None = None,
) -> tuple[str, ...]:
    """Which blocks to remove: the least sum of losses for so many parameters.

    Minimises the sum of the losses over the removed blocks S subject to
    `sum(sizes of S) >= at_least`, by dynamic programming over what is kept. Exact, as
    long as sizes are counted in their greatest common divisor. LAPTOP-Diff (Zhang et
    al., 2024, arXiv:2404.11098) adds up the losses of blocks removed one at a time, of
    `output_losses`.

    Args:
      losses: by block what its removal costs.
      sizes: by block its parameters (`Block.parameters`), or any other whole number
        that adds up: bytes, FLOPs, microseconds.
      at_least: how many of them have to go.
      unit: counts sizes in multiples of so many, those of kept blocks rounded up: at
        least `at_least` still goes, but it may be a little more than needed, and not at
        the least loss. By default the greatest common divisor; where that would need a
        table of more than 50 million cells (blocks times units), the least number that
        does not.

    Returns:
      The names of the blocks to remove, in the order of `losses`.

    Raises:
      ValueError: losses and sizes of different blocks, losses that are NaN, sizes below
        0, or more to remove than there is.

    Example:
      >>> import jaxsparse as js
      >>> losses = {"a": 1.0, "b": 1.5, "c": 2.0}
      >>> sizes = {"a": 100, "b": 300, "c": 200}
      >>> js.structured.knapsack(losses, sizes, at_least=300)
      ('b',)
      >>> js.structured.knapsack(losses, sizes, at_least=400)
      ('a', 'b')
    """
    names = list(losses)
    if set(names) != set(sizes):
        differ = sorted(set(names) ^ set(sizes))
        raise ValueError(f"losses and sizes must have the same blocks: {differ[:4]}.")
    values = np.array([float(losses[name]) for name in names])
    for name, value in zip(names, values, strict=True):
        if math.isnan(value):
            raise ValueError(f"losses[{name!r}] is NaN.")
        _checks.check_positive_int(sizes[name], name=f"sizes[{name!r}]", least=0)
    total = sum(sizes.values())
    if at_least > total:
        raise ValueError(
            f"at_least={at_least}: the blocks have {total} altogether. What lies "
            "outside of blocks can not be removed with them."
        )
    room = total - max(int(at_least), 0)
    if unit is None:
        unit = math.gcd(*sizes.values()) or 1
        unit *= max(1, math.ceil(room * len(names) / (CELLS * unit)))
    _checks.check_positive_int(unit, name="unit")
    kept = _kept(values, [-(-sizes[name] // unit) for name in names], room // unit)
    return tuple(name for name, keep in zip(names, kept, strict=True) if not keep)


def _kept(values: np.ndarray, weights: list[int], room: int) -> np.ndarray:
    """The subset of greatest value whose weight fits."""
    best = np.zeros(room + 1)
    takes = np.zeros((len(weights), room + 1), bool)
    for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
        if weight > room:
            continue
        with_it = best[: room + 1 - weight] + value
        # Among equals what keeps more: a block that costs nothing is no burden.
        takes[i, weight:] = with_it >= best[weight:]
        best[weight:] = np.maximum(with_it, best[weight:])
    kept = np.zeros(len(weights), bool)
    for i in reversed(range(len(weights))):
        kept[i] = takes[i, room]
        room -= weights[i] * int(kept[i])
    return kept


def nm_options(keep: int, of: int) -> np.ndarray:
    """All ways to keep some of a group's layers.

    Args:
      keep: how many layers stay.
      of: how many there are.

    Returns:
      `[options, of]` bool, True = kept, in lexicographic order of what is kept.

    Raises:
      ValueError: not 0 < keep <= of.

    Example:
      >>> import jaxsparse as js
      >>> js.structured.nm_options(1, 2).tolist()
      [[True, False], [False, True]]
    """
    _checks.check_positive_int(keep, name="keep")
    _checks.check_positive_int(of, name="of", least=keep)
    found = list(itertools.combinations(range(of), keep))
    options = np.zeros((len(found), of), bool)
    np.put_along_axis(options, np.array(found), True, axis=1)
    return options


def nm_gates(
    logits: Array,
    *,
    key: Array,
    keep: int,
    of: int,
    temperature: Any,
    scale: float = 100.0,
    hard: bool = True,
) -> Array:
    """Gates that learn which `keep` of every `of` layers stay (TinyFusion).

    Each group of `of` layers draws one of its options by a Gumbel softmax,
    `p = softmax((scale * logits + gumbel) / temperature)`, and its layers' gates are
    `p @ nm_options(keep, of)`. Each group's gates add up to `keep`. Fang et al. (2024,
    arXiv:2412.01199) start with logits of 0.02 and go from a temperature of 4 to 0.1,
    while the weights (a LoRA) are trained with the gates; afterwards each group keeps
    `nm_options(keep, of)[argmax(logits)]`.

    Args:
      logits: `[groups, options]`, floating point.
      key: a typed key; another one at each step.
      keep: how many layers of a group stay.
      of: how many layers a group has.
      temperature: a positive number, or a traced one.
      scale: multiplies the logits, so that a usual learning rate moves them.
      hard: gates of 0 and 1, that of the option drawn, with the derivative of the soft
        ones (straight-through).

    Returns:
      `[groups * of]`, the gates of the layers in order, of the logits' dtype. For
      `gated`: `dict(zip(names, gates))`.

    Raises:
      ValueError: logits of another shape, not 0 < keep <= of.
      TypeError: logits that are not floating point.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> logits = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> options = {"keep": 1, "of": 2, "temperature": 1.0}
      >>> js.structured.nm_gates(logits, key=jax.random.key(0), **options).tolist()
      [1.0, 0.0, 0.0, 1.0]
    """
    options = nm_options(keep, of)
    _checks.check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] != len(options):
        raise ValueError(
            f"logits: expected the shape [groups, {len(options)}], one for each way to "
            f"keep {keep} of {of} layers, got {logits.shape}."
        )
    if _checks.is_concrete(temperature) and not float(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    heat = jnp.asarray(temperature).astype(logits.dtype)
    soft = jax.nn.softmax((scale * logits + noise) / heat, axis=-1)
    drawn = soft
    if hard:
        drawn = jax.nn.one_hot(
            jnp.argmax(soft, axis=-1), len(options), dtype=logits.dtype
        )
        drawn = drawn + (soft - jax.lax.stop_gradient(soft))
    gates = jnp.matmul(
        drawn, jnp.asarray(options, logits.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return gates.reshape(-1)
