"""What is found in a trace is found once."""

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

from jaxsparse.tracing import Trace

Found = TypeVar("Found")


def once(look: Callable[[Trace], Found]) -> Callable[[Trace], Found]:
    """Keeps what a function finds in a trace, for as long as the trace is there.

    Args:
      look: a function of a trace alone.

    Returns:
      The same, called once for each trace.
    """
    known: weakref.WeakKeyDictionary[Trace, Found] = weakref.WeakKeyDictionary()

    @functools.wraps(look)
    def found(trace: Trace) -> Found:
        if trace not in known:
            known[trace] = look(trace)
        return known[trace]

    return found
