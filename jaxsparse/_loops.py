"""Work that most steps do not do, at no cost in those."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array, Tree

Carry = TypeVar("Carry")


def when(predicate: Array, f: Callable[..., Carry], x: Carry, *reads: Any) -> Carry:
    """`f(x, *reads) if predicate else x`, with `x` left in place where it does not run.

    It is a loop of no or one turn. `lax.cond` would do, but it keeps XLA from updating
    donated buffers in place (30 % of a training step on CPU), and `vmap` turns it into
    a select that always runs `f`.

    XLA moves what does not depend on the turn in front of a loop, where it would run in
    every step. The barrier ties what `f` reads to the turn. So `f` has to take all
    arrays it works on from its arguments.

    A predicate that is known is a Python `if`: without jit the loop, whose body is a
    new function each time, would be compiled in every step.
    """
    if not isinstance(predicate, jax.core.Tracer):
        return f(x, *reads) if predicate else x

    def turn(i: Array, carry: Carry) -> Carry:
        return f(carry, *after(i, reads))

    return lax.fori_loop(0, jnp.asarray(predicate).astype(jnp.int32), turn, x)


def after(first: Any, x: Tree) -> Tree:
    """`x`, tied to `first` by a barrier that XLA moves nothing across.

    What is made from the result is not moved out of the loop that makes `first`. (It
    does not save memory: XLA drops barriers before it plans that.)
    """
    one = lambda x: lax.optimization_barrier((first, x))[1]
    if jax.sharding.get_abstract_mesh().manual_axes:
        # What passes a barrier together differs along the same axes of the mesh from
        # there on, as far as types say.
        return jax.tree.map(one, x)
    return one(x)


def behind(count: Array, flags: Tree) -> Tree:
    """Flags that wait for a count, a number that is not negative, but do not change.

    What is read for the count is read by then, so that the flags may take its place:
    XLA copies what it does not see to be read in time. (Without jit all is in order.)
    """
    if not isinstance(count, jax.core.Tracer):
        return flags
    there = jnp.minimum(count.astype(jnp.int32), 0) == 0
    return jax.tree.map(lambda flag: flag & there, flags)
