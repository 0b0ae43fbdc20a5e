"""The few type names that signatures share."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

# A recursive alias makes every index into a result a type error; `Any` does not.
PyTree = Any
Tree = TypeVar("Tree")

Array = jax.Array
Schedule = Callable[[Any], Any]
"""step -> number, as in optax."""

Cadence = Callable[[Any], Any]
"""step -> bool: whether masks change in this step."""

Sparsity = Any
"""A number in [0, 1), a schedule, or a tree of either."""

Where = Any
"""None, a regular expression, `(path, leaf) -> bool`, or a tree of bools."""
