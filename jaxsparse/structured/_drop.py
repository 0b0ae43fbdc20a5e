"""What goes: the specification that all of `structured` shares."""

from typing import NamedTuple

import numpy as np


class Drop(NamedTuple):
    """Which indices of which groups go.

    A tree of numpy arrays and numbers: it is saved and restored like any other
    (`js.checkpoint`, orbax, `np.savez`).

    Attributes:
      indices: by the name of a group what goes, sorted: `[k]`, or `[*copies, k]` for a
        group of which each copy (head, expert, layer) loses its own.
      sizes: by the name of a group its size before: a specification for another model
        is recognised.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> drop = js.structured.Drop({"up[1]": np.array([0, 2])}, {"up[1]": 16})
      >>> drop.indices["up[1]"].tolist()
      [0, 2]
    """

    indices: dict[str, np.ndarray]
    sizes: dict[str, int]
