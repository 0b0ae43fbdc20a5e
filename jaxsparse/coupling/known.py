"""What is known of a value while a program is evaluated at other sizes."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Entries(NamedTuple):
    """Entries that a value has in the masked model where it has lost some.

    Attributes:
      axes: wherever an index of one of them is gone, the entries are these.
      compute: gives them; they have size 1 along those axes.
    """

    axes: frozenset[int]
    compute: Callable[[], Any]


class Known(NamedTuple):
    """A value while a program is evaluated, with what is known of it.

    Attributes:
      value: the array.
      number: the value of a scalar that is no variable.
      summed: for sums over an axis that became shorter, how many entries were summed
        before and how many are now.
      masked: its masked entries, if they are not zero but all the same.
    """

    value: Any
    number: float | None = None
    summed: tuple[int, int] | None = None
    masked: Entries | None = None
