"""How long engines take: a product of one kernel, in turn with the dense one."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array
from jaxsparse.formats import PackedArray
from jaxsparse.formats.dense import matrices_of
from jaxsparse.kernels._product import Engine, batch_of, contract

_ROUNDS = 7
_COLD = 2**26  # bytes that are read between two products: caches forget the weights


def milliseconds(
    packed: Sequence[tuple[Engine, PackedArray]], rows: int, dtype: Any
) -> list[float]:
    """The least time of a dense product, then of each engine; all in turn, jitted."""
    first = packed[0][1]
    x = jnp.ones((*batch_of(first), max(1, rows), first.view.d_in), dtype)
    dense = jax.block_until_ready(jax.jit(matrices_of)(first))
    calls = [lambda: _dense(x, dense)]
    for engine, own in packed:
        run = jax.jit(engine)
        calls.append(lambda run=run, own=own: run(x, own))
    best = [np.inf] * len(calls)
    others = np.ones(_COLD // 8)
    for turn in range(_ROUNDS + 1):
        for i, call in enumerate(calls):
            others.sum()
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first turn compiles
                best[i] = min(best[i], 1e3 * (time.perf_counter() - begin))
    return best


@jax.jit
def _dense(x: Array, w: Array) -> Array:
    lead = tuple(range(w.ndim - 2))
    last = (x.ndim - 1,), (w.ndim - 1,)
    return contract(x, w, w.dtype, last, (lead, lead))
