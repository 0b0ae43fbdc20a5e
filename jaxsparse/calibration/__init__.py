"""Measure the inputs and the gradients of kernels."""

from jaxsparse.calibration._batch_norm import batch_statistics as batch_statistics
from jaxsparse.calibration._gradients import gradient_norms as gradient_norms
from jaxsparse.calibration._run import run as run
from jaxsparse.calibration._stats import RunningStats as RunningStats
from jaxsparse.calibration._stats import finalize as finalize
from jaxsparse.calibration._stats import init as init
from jaxsparse.calibration._stats import merge as merge
from jaxsparse.calibration._stats import unseen as unseen
from jaxsparse.calibration._stats import update as update
from jaxsparse.calibration.statistics import InputStats as InputStats
from jaxsparse.calibration.statistics import Statistics as Statistics

__all__ = [
    "InputStats",
    "RunningStats",
    "Statistics",
    "batch_statistics",
    "finalize",
    "gradient_norms",
    "init",
    "merge",
    "run",
    "unseen",
    "update",
]
