"""How calls of native kernels are split over devices: by tokens.

XLA's partitioner knows nothing of a foreign function: it would gather what one reads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse._typing import Array


def split_over_tokens(
    call: Callable[..., Array], *, of_tokens: bool
) -> Callable[..., Array]:
    """`call` with tokens where they are, and all else on each device.

    Args:
      call: a function of a matrix `[tokens, features]` (of two of them where the result
        is a sum over tokens), followed by arrays of weights.
      of_tokens: whether the result is `[tokens, features]`, and not a sum over tokens.
    """
    matrices = 1 if of_tokens else 2

    def placed(mesh: Any, x: Any) -> tuple[Mesh, Any, NamedSharding, NamedSharding]:
        mesh, over = _axes_of_tokens(mesh, x)
        return mesh, over, NamedSharding(mesh, P(over, None)), NamedSharding(mesh, P())

    def partition(mesh: Any, args: Any, result: Any) -> Any:
        del result
        mesh, over, tokens, same = placed(mesh, args[0])
        given = (tokens,) * matrices + (same,) * (len(args) - matrices)
        if of_tokens:
            return mesh, call, tokens, given
        total = lambda *own: call(*own) if over is None else lax.psum(call(*own), over)
        return mesh, total, same, given

    def infer(mesh: Any, args: Any, result: Any) -> Any:
        del result
        _, _, tokens, same = placed(mesh, args[0])
        return tokens if of_tokens else same

    def rule(mesh: Any, args: Any, results: Any) -> Any:
        del mesh, results
        return _rule([len(a.shape) for a in args], matrices)

    split = custom_partitioning(call)
    split.def_partition(
        partition, infer_sharding_from_operands=infer, sharding_rule=rule
    )
    # Without jit JAX would not ask the partitioner.
    return jax.jit(split)


def _axes_of_tokens(mesh: Any, x: Any) -> tuple[Mesh, Any]:
    """The mesh axes over which the rows of an argument are split evenly, or None.

    Where JAX has no mesh for a program there is one axis, and nothing is split.
    """
    if mesh.empty or not isinstance(x.sharding, NamedSharding):
        devices = sorted(x.sharding.device_set, key=lambda device: device.id)
        return Mesh(np.array(devices), ("devices",)), None
    over = (*x.sharding.spec, None)[0]
    names = over if isinstance(over, tuple) else (over,) if over else ()
    even = x.shape[0] % math.prod(mesh.shape[name] for name in names) == 0
    return mesh, over if even else None


def _rule(ranks: list[int], matrices: int) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Shardy's rule: `b`, the tokens, may be split, and no other axis."""
    names = iter("cdefghijklmnopqrstuvwxyz")
    sides = [["b", next(names)] for _ in range(matrices)]
    sides += [[next(names) for _ in range(rank)] for rank in ranks[matrices:]]
    result = ["b", next(names)] if matrices == 1 else [next(names)]
    others = {name for side in (*sides, result) for name in side} - {"b"}
    about = {"need_replication_factors": tuple(sorted(others))}
    if matrices == 2:
        about["reduction_factors"] = ("b",)
    return f"{', '.join(map(' '.join, sides))} -> {' '.join(result)}", about
