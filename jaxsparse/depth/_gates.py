"""Gates on residual branches: what a model gives with a part of each, and training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.depth._blocks import Join, chosen, residual_blocks
from jaxsparse.narrowing.retracing import as_sharded, by_shape
from jaxsparse.program import (
    Address,
    bind,
    call,
    equations,
    inner,
    interpret,
    scan,
)
from jaxsparse.tracing import Trace
from jaxsparse.tracing.leaves import checked_leaves


def gated(trace: Trace, *, join: Join = None) -> Callable[..., Any]:
    """Put a gate before each residual branch: x + g f(x).

    With gates of 1 it is the model; with a gate of 0 the model without that branch
    (`remove_blocks`). In between it can be differentiated, to train gates (Liu et al.,
    FoldGPT, 2024, arXiv:2407.00928; `nm_gates`) or to measure the importance of a
    block. A joined block has its gate before each of its branches. Scans and
    checkpoints are kept.

    Args:
      trace: from `js.trace`.
      join: as given to `residual_blocks`.

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
      >>> list(js.depth.residual_blocks(trace))
      ['w']
      >>> with_gates = js.depth.gated(trace)
      >>> with_gates(params, {"w": 0.5}, x).ravel().tolist()
      [2.5, 2.5]
      >>> loss = lambda gates: with_gates(params, gates, x).sum()
      >>> float(jax.grad(loss)({"w": 1.0})["w"])
      6.0
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    residual_blocks(trace, join=join)
    programs: dict[tuple[str, ...], Any] = {}

    def apply_fn(params: PyTree, gates: Mapping[str, Any], *inputs: Any) -> Any:
        names = tuple(sorted(gates))
        if names not in programs:
            chosen(trace, names, join)
            build = lambda at: as_sharded(at, with_gates(at, names, join))
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
    """The program of a trace with gates before some branches."""
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

    def meaning(eqn: Any, ins: list[Any], here: Address) -> list[Any]:
        return _gated(eqn, ins, here, gates) if here in below else bind(eqn, ins)

    return interpret(program, args, meaning, address)


def _gated(
    eqn: Any, ins: list[Any], here: Address, gates: dict[_Operand, Any]
) -> list[Any]:
    """An addition of a branch, or what has some inside."""
    inside = {key: g for key, g in gates.items() if key[0][: len(here)] == here}
    if any(place == here for place, _ in inside):
        gate = lambda i, x: x * inside[here, i] if (here, i) in inside else x
        return bind(eqn, [gate(i, x) for i, x in enumerate(ins)])
    body = inner(eqn)[0]
    run = lambda values, gates: _run(body, values, (*here, 0), gates)
    if eqn.primitive.name != "scan":
        return call(eqn, run)(ins, inside)
    turn = lambda values, _, gates: (run(values, gates), (), ())
    return scan(eqn, ins, turn, over=inside)[0]
