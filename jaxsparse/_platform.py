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

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


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
