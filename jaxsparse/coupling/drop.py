"""`Drop`: which indices of which groups go."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Drop(NamedTuple):
    """The channels to remove, by group.

    A tree of numpy arrays and numbers: it is saved and restored like any other
    (`js.checkpoint`, orbax, `np.savez`).

    Attributes:
      indices: by the name of a group the removed channels, sorted: `[k]`, or `[*copies,
        k]` for a group of which each copy (head, expert, layer) loses its own.
      sizes: by the name of a group its size before, so that a `Drop` for another model
        is rejected.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> drop = js.coupling.Drop({"up[1]": np.array([0, 2])}, {"up[1]": 16})
      >>> drop.indices["up[1]"].tolist()
      [0, 2]
    """

    indices: dict[str, np.ndarray]
    sizes: dict[str, int]


def drop_of(marked: Mapping[str, Any]) -> Drop:
    """The indices that are marked, as a specification.

    All copies of a group lose equally many, as few as the one with the fewest marks,
    and the lower indices first.
    """
    indices, sizes = {}, {}
    for name, x in marked.items():
        x = np.asarray(x, bool)
        k = int(x.sum(-1).min())
        if k:
            first = np.argsort(~x, axis=-1, kind="stable")[..., :k]
            indices[name] = np.sort(first, axis=-1).astype(np.int32)
            sizes[name] = x.shape[-1]
    return Drop(indices, sizes)
