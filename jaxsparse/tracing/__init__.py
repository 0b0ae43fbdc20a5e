"""What a model does with each of its parameters, from one walk of its jaxpr."""

from jaxsparse.tracing._kernels import Reading as Reading
from jaxsparse.tracing._steps import Step as Step
from jaxsparse.tracing._steps import Steps as Steps
from jaxsparse.tracing._steps import bind as bind
from jaxsparse.tracing._steps import flatten as flatten
from jaxsparse.tracing._trace import Kernel as Kernel
from jaxsparse.tracing._trace import Trace as Trace
from jaxsparse.tracing._trace import Unfollowed as Unfollowed
from jaxsparse.tracing._trace import retrace as retrace
from jaxsparse.tracing._trace import trace as trace
from jaxsparse.tracing._walk import called as called
from jaxsparse.tracing._walk import equations as equations
from jaxsparse.tracing._walk import closed as closed
from jaxsparse.tracing._walk import inner as inner
