"""Jaxprs: what lies in them and where, flat lists of steps. The library's own use."""

from jaxsparse.program._counters import Counter as Counter
from jaxsparse.program._counters import carried_counters as carried_counters
from jaxsparse.program._counters import counted as counted
from jaxsparse.program._counters import number as number
from jaxsparse.program._interpret import bind as bind
from jaxsparse.program._interpret import call as call
from jaxsparse.program._interpret import cond as cond
from jaxsparse.program._interpret import interpret as interpret
from jaxsparse.program._interpret import scan as scan
from jaxsparse.program._interpret import while_loop as while_loop
from jaxsparse.program._jaxprs import Address as Address
from jaxsparse.program._jaxprs import abstract as abstract
from jaxsparse.program._jaxprs import called as called
from jaxsparse.program._jaxprs import closed as closed
from jaxsparse.program._jaxprs import equations as equations
from jaxsparse.program._jaxprs import inner as inner
from jaxsparse.program._jaxprs import scan_counts as scan_counts
from jaxsparse.program._jaxprs import source_of as source_of
from jaxsparse.program._steps import Step as Step
from jaxsparse.program._steps import Steps as Steps
from jaxsparse.program._steps import flatten as flatten
from jaxsparse.program._steps import key_of as key_of
