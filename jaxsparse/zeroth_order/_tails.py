"""A loss as a function of one parameter: what does not depend on it is reused."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxsparse import _checks
from jaxsparse._dtypes import widen
from jaxsparse._typing import Array, PyTree
from jaxsparse.program import Steps, called, equations, flatten


class Evaluated(NamedTuple):
    """A loss at some parameters, with all values on the way.

    Attributes:
      flat: the program of the loss, its calls inlined.
      values: those of its variables, by number.
      loss: its result.
    """

    flat: Steps
    values: dict[int, Any]
    loss: Array


def widened(tree: Any) -> Any:
    """Numbers of less than 32 bits in float32: differences would be lost in them."""
    return jax.tree.map(lambda x: widen(x) if hasattr(x, "dtype") else x, tree)


def evaluate(
    loss_fn: Callable[[PyTree, Any], Array], params: PyTree, batch: Any
) -> Evaluated:
    """Runs a loss and keeps all values."""
    leaves, treedef = jax.tree.flatten(params)
    traced = jax.make_jaxpr(
        lambda leaves, batch: loss_fn(treedef.unflatten(leaves), batch)
    )
    with _checks.explained("loss_fn", params=params, batch=batch):
        program = traced(leaves, batch)
    shapes = [x.shape for x in program.out_avals]
    if shapes != [()]:
        raise ValueError(
            f"loss_fn must return one scalar, got arrays of the shapes {shapes}."
        )
    inlined = [here for here, eqn in equations(program) if called(eqn) is not None]
    flat = flatten(program, len(leaves), (), inlined)
    given = [*leaves, *jax.tree.leaves(batch)]
    values = dict(zip(flat.arguments, map(jnp.asarray, given), strict=True))
    values |= flat.constants
    _run(flat, range(len(flat.steps)), values)
    return Evaluated(flat, values, _read(flat.results[0], values))


def tail(at: Evaluated, argument: int) -> Callable[[Array], Array]:
    """The loss as a function of the parameter with that number.

    Only the steps that depend on the parameter run again; what they read of others is
    there. It is what a layer's cached input is to a loop over layers, for any program.
    (XLA too moves out of a loop what its turns share. So it is not left to that, and
    half as much is traced.)
    """
    flat, changed = at.flat, {at.flat.arguments[argument]}
    again = []
    for i, step in enumerate(flat.steps):
        if any(isinstance(x, int) and x in changed for x in step.ins):
            changed.update(step.outs)
            again.append(i)

    def loss_of(w: Array) -> Array:
        values = dict(at.values)
        values[flat.arguments[argument]] = w
        _run(flat, again, values)
        return _read(flat.results[0], values)

    return loss_of


def _run(flat: Steps, indices: Any, values: dict[int, Any]) -> None:
    """Runs some steps; their results go into `values`."""
    for i in indices:
        step = flat.steps[i]
        outs = step.run(*(_read(x, values) for x in step.ins))
        values.update(zip(step.outs, outs, strict=True))


def _read(x: Any, values: dict[int, Any]) -> Any:
    return x.val if isinstance(x, core.Literal) else values[x]
