"""How much is pruned at a step, when masks change, and how fast weights learn."""

from jaxsparse.schedules._cadence import At as At
from jaxsparse.schedules._cadence import Every as Every
from jaxsparse.schedules._cadence import at as at
from jaxsparse.schedules._cadence import every as every
from jaxsparse.schedules._learning_rate import rewinding as rewinding
from jaxsparse.schedules._sparsity import alternating as alternating
from jaxsparse.schedules._sparsity import constant as constant
from jaxsparse.schedules._sparsity import one_shot as one_shot
from jaxsparse.schedules._sparsity import polynomial as polynomial

__all__ = [
    "At",
    "Every",
    "alternating",
    "at",
    "constant",
    "every",
    "one_shot",
    "polynomial",
    "rewinding",
]
