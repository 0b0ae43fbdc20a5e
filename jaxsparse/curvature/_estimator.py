"""What the Fisher approximations share: sums over gradients, and when they are done."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxsparse._typing import Array, PyTree


class Estimator(NamedTuple):
    """A Fisher approximation summed up over streamed gradients.

    Attributes:
      init: `init(params) -> sums`, for the parameters that take part.
      update: `update(sums, grads) -> sums`; grads has leaves `[m, *shape]`, any m.
      merge: `merge(sums, other) -> sums`, of two parts of the data. The order of
        merging changes rounding only.
      finalize: `finalize(sums, *, damping=None, rel_damping=None) -> fisher`. The sums
        stay as they are, so a whole grid of dampings takes one pass over the data
        (`block_estimator`'s has `donate=True`, which gives their memory to the result).
    """

    init: Callable[[PyTree], "Sums"]
    update: Callable[["Sums", PyTree], "Sums"]
    merge: Callable[["Sums", "Sums"], "Sums"]
    finalize: Callable[..., Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sums", "count"],
    meta_fields=["treedef", "layouts"],
)
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of outer products of gradients, in one approximation or another.

    Attributes:
      sums: for each parameter that takes part its statistics.
      count: how many gradients were summed up, int32.
      treedef: the structure of the gradients.
      layouts: for each parameter how its weights are laid out.
    """

    sums: tuple[Any, ...]
    count: Array
    treedef: Any
    layouts: tuple[Any, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the parameters that take part."""
        return tuple(layout.path for layout in self.layouts)


def merge_by(add: Callable[[Any, Any], Any]) -> Callable[[Sums, Sums], Sums]:
    """`Estimator.merge` from a function that adds the statistics of one parameter."""

    def merge(sums: Sums, other: Sums) -> Sums:
        if (sums.treedef, sums.layouts) != (other.treedef, other.layouts):
            raise ValueError(
                "merge: the two sums are of other parameters, or in other blocks. Make "
                "both with one estimator."
            )
        together = tuple(map(add, sums.sums, other.sums))
        return dataclasses.replace(sums, sums=together, count=sums.count + other.count)

    return merge
