"""What is tuned for one platform: XLA's CPU backend needs other programs than the rest.

On CPU loops over rows, over slabs or over what fits into a cache are quicker than the
operation that means the same; on accelerators, where each turn is a launch, that
operation is.

Which platform it is, is asked for in two ways. Two programs with the same result go
through `on_cpu`, which decides when a program is lowered: it is right wherever jit is
told to run, and nothing is compiled of the other one. A size is part of shapes, so it
has to be known earlier, when a program is traced; `size` gives that of the device on
which JAX puts what it is not told to put elsewhere. Sizes change only how fast a
program is, so a program that runs elsewhere is still right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array


def on_cpu(cpu: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """`cpu(*args)` where the program is lowered for CPU, else `other(*args)`."""
    return lax.platform_dependent(*args, cpu=cpu, default=other)


def size(*, cpu: int, other: int) -> int:
    """A number that shapes depend on: for CPU, or for accelerators."""
    config: Any = jax.config  # its options are no attributes that types know
    device = config.jax_default_device
    if device is None:
        platform = jax.default_backend()
    else:
        platform = getattr(device, "platform", device)  # a device, or its platform
    return cpu if platform == "cpu" else other


def unknown(count: Array, numbers: Sequence[int], dtype: Any) -> list[Array]:
    """Numbers that XLA does not know; `count` is any number that is not negative.

    XLA on CPU compiles one kernel for all that do the same to arrays of one shape, but
    not for those that differ in a constant, as the place of an array in a buffer. Most
    of the time to compile a step is that of its kernels.
    """

    def known(count: Array) -> list[Array]:
        del count
        return [jnp.asarray(n, dtype) for n in numbers]

    def hidden(count: Array) -> list[Array]:
        zeros = lambda count: [jnp.zeros((), dtype) for _ in numbers]
        return lax.cond(count >= 0, known, zeros, count)

    return on_cpu(hidden, known, count)
