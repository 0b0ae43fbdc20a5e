"""Find how a model uses each of its parameters, in one walk of its jaxpr."""

from jaxsparse.tracing._found import Kernel as Kernel
from jaxsparse.tracing._found import Unfollowed as Unfollowed
from jaxsparse.tracing._retrace import retrace as retrace
from jaxsparse.tracing._trace import Trace as Trace
from jaxsparse.tracing._trace import trace as trace

__all__ = [
    "Kernel",
    "Trace",
    "Unfollowed",
    "retrace",
    "trace",
]
