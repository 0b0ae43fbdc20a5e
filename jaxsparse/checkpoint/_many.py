"""What one of many processes does for all."""

from collections.abc import Callable

import jax
import numpy as np


def by_the_first(act: Callable[[], None], what: str) -> None:
    """What the first process does while the others wait; if it cannot, all fail."""
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            act()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.process_allgather(np.array(error is not None))
        if np.any(failed) and error is None:
            raise OSError(f"The first process failed in {what}; its error says why.")
    if error is not None:
        raise error
