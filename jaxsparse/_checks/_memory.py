"""Does what is about to be made fit into memory?"""

import math
import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._checks._values import is_concrete


def check_fits(name: str, size: int, advice: str, *, known: bool) -> None:
    """Says how much memory something takes where there is not as much."""
    there = _memory()
    if there is None or size <= there:
        return
    said = f"{name}: {size / 1e9:.3g} GB, and there are {there / 1e9:.3g}. {advice}"
    if known:
        raise ValueError(said)
    warnings.warn(said, stacklevel=3)


def check_window_fits(
    name: str, params: Any, window: int, dtype: Any, advice: str
) -> None:
    """`check_fits` for so many gradients of some parameters."""
    leaves = jax.tree.leaves(params)
    width = lambda w: jnp.dtype(w.dtype if dtype is None else dtype).itemsize
    weights = sum(math.prod(w.shape) for w in leaves)
    check_fits(
        f"{name}: {window} gradients of {weights:,} weights",
        window * sum(math.prod(w.shape) * width(w) for w in leaves),
        advice,
        known=all(map(is_concrete, leaves)),
    )


def _memory() -> int | None:
    """The bytes of all devices; of processors, which share it, the host's."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        try:
            host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # not everywhere
            return None
        return host * jax.process_count()
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    if not all("bytes_limit" in s for s in stats):
        return None
    return sum(s["bytes_limit"] for s in stats) * len(devices) // len(stats)
