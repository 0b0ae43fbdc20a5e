"""Work on many small matrices a chunk at a time, so that scratch stays in the cache."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxsparse import _platform
from jaxsparse._loops import after
from jaxsparse._sharded import explicit_mesh, with_auto_axes
from jaxsparse._typing import Array

SCRATCH_BYTES = 1 << 22  # float64 numbers that should stay in the cache of a CPU
_MOST_BYTES = 1 << 28  # of them on accelerators, where only the memory is limited
SLAB_BYTES = 1 << 25  # what is brought into another order at once


def scratch_bytes() -> int:
    """How much a chunk of the work may take."""
    return _platform.size(cpu=SCRATCH_BYTES, other=_MOST_BYTES)


def is_spread(*arrays: Array) -> bool:
    """Whether arrays lie on a mesh of devices.

    A loop over an axis that is sharded would fetch every slice from another device. So
    there the work is done at once, each device on its part.
    """
    return any(not jax.typeof(x).sharding.mesh.empty for x in arrays)


def in_parts(
    total: int, part: int, body: Callable[[Any, int, Any], Any], carry: Any
) -> Any:
    """A loop over `range(total)` in parts of a static size, the last one smaller."""
    if total >= part:
        turn = lambda i, carry: body(i * part, part, carry)
        carry = lax.fori_loop(0, _opaque(total // part), turn, carry)
    if total % part:
        # A loop too: outside of one XLA copies a carry that it could write into.
        rest = lambda i, carry: body(i + total - total % part, total % part, carry)
        carry = lax.fori_loop(0, _opaque(1), rest, carry)
    return carry


def _opaque(count: int) -> Array:
    """A number that XLA's CPU backend does not know: it unrolls loops of one turn."""
    known = lambda count: count
    return _platform.on_cpu(lax.optimization_barrier, known, jnp.int32(count))


def cut(x: Array, start: Array, size: int, axis: int = 0) -> Array:
    """A part of an array that is read in the turns of `in_parts`.

    It is tied to the turn. Else XLA, on CPU, makes a float32 copy of a whole bfloat16
    array in front of the loop.
    """
    return lax.dynamic_slice_in_dim(after(start, x), start, size, axis)


def over_blocks(
    f: Callable[..., Any],
    lead: tuple[int, ...],
    floats: int,
    *arrays: Any,
    whole: tuple[Array, ...] = (),
    in_place: bool = False,
) -> Any:
    """`f(*arrays)` for a function of independent blocks, a chunk of them at a time."""
    total = math.prod(lead)
    if explicit_mesh(jax.tree.leaves(arrays)) is not None:
        spec = jax.typeof(jax.tree.leaves(arrays)[0]).sharding.spec[: len(lead)]
        specs = lambda results: jax.tree.map(lambda _: P(*spec), results)
        return with_auto_axes(f, specs, *arrays, *whole)
    chunk = max(1, scratch_bytes() // (8 * floats))
    if chunk >= total or is_spread(*jax.tree.leaves(arrays)):
        return f(*arrays, *whole)
    flat = jax.tree.map(lambda x: x.reshape(total, *x.shape[len(lead) :]), arrays)

    cut = lambda start, size, x: jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, start, size), x
    )

    def put(start: Any, size: int, out: Any) -> Any:
        first = out if in_place else flat[0]
        new = f(cut(start, size, first), *cut(start, size, flat[1:]), *whole)
        write = lambda o, n: lax.dynamic_update_slice_in_dim(o, n, start, 0)
        return jax.tree.map(write, out, new)

    if in_place:
        out = flat[0]
    else:
        shapes = jax.eval_shape(lambda: f(*cut(0, chunk, flat), *whole))
        empty = lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype)
        out = jax.tree.map(empty, shapes)
    out = in_parts(total, chunk, put, out)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)
