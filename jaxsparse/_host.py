"""Arrays of many processes on the host of each, and back; the host's memory."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsparse._typing import Array


def on_host(x: Any) -> np.ndarray:
    """An array's values, also where its parts lie on several processes.

    Then it is gathered, so all of them have to call this: as they do where all run the
    same program.
    """
    if spans_processes(x) and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def spans_processes(x: Any) -> bool:
    """Whether parts of an array lie on devices of other processes."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return False
    return not x.is_fully_addressable


def spread_like(x: np.ndarray, like: Any) -> Any:
    """Values that each process has, where those of another array lie."""
    if not spans_processes(like) or x.shape != like.shape:
        return x
    part: Any = lambda index: x[index]
    found: Array = jax.make_array_from_callback(x.shape, like.sharding, part)
    return found


def give_back_memory() -> None:
    """Gives the system what the allocator keeps of memory that was freed.

    glibc has a heap for each of many threads, and keeps in all of them what XLA's and
    orbax's threads have freed: for a model that is read and written layer by layer soon
    more than the model. Elsewhere this does nothing.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], Any]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no glibc
        return lambda _: None
