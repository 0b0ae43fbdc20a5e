"""Does what is about to be made fit into memory?"""

import os
import warnings

import jax


def check_fits(name: str, size: int, advice: str, *, known: bool) -> None:
    """Says how much memory something takes where there is not as much.

    Args:
      name: what it is, for the message.
      size: its bytes, over all devices.
      advice: what takes less.
      known: whether it is made now; under `jit` and `eval_shape` it may be made on
        other devices or never, which is worth a warning.

    Raises:
      ValueError: more than all memory of all devices.
    """
    there = _memory()
    if there is None or size <= there:
        return
    said = f"{name}: {size / 1e9:.3g} GB, and there are {there / 1e9:.3g}. {advice}"
    if known:
        raise ValueError(said)
    warnings.warn(said, stacklevel=3)


def _memory() -> int | None:
    """The bytes of all devices; of processors, which share it, the host's."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        try:
            host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # not everywhere
            return None
        return host * jax.process_count()
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices()]
    if None in limits:
        return None
    return sum(limits) * len(devices) // len(limits)
