"""The results of a layer-wise run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class LayerInfo(NamedTuple):
    """The quality of one solved kernel: an entry for each of its matrices, `[*batch]`.

    Attributes:
      error: `tr((W' - W) G (W' - W)^T)`, `G` the second moment of its inputs; NaN, like
        the next two, if no input was seen or all are 0.
      relative_error: `error / tr(W G W^T)`.
      masked_error: the relative error with the same mask and unchanged remaining
        weights.
      damping: what was added to the diagonal of `G`.
      dead: the number of its inputs that are always 0.
      rows: the number of rows of inputs seen.
      sparsity: the fraction removed.
      seconds: the time of the solver, for all matrices of the kernel.
    """

    error: np.ndarray
    relative_error: np.ndarray
    masked_error: np.ndarray
    damping: np.ndarray
    dead: np.ndarray
    rows: np.ndarray
    sparsity: np.ndarray
    seconds: float


class _Pruned(NamedTuple):
    params: Any
    masks: Any
    info: dict[str, LayerInfo]


class Layerwise(_Pruned):
    """The result of `layerwise`.

    Attributes:
      params: the pruned parameters.
      masks: True = kept; a scalar True where nothing was pruned.
      info: a `LayerInfo` for each kernel, by path, in the order of solving.
      left_dense: by path the reason why a parameter that looks like a kernel stayed
        dense. It is not a part of the tuple and is lost when JAX makes a new one
        (`jax.tree.map`).
    """

    left_dense: dict[str, str]

    def __new__(
        cls,
        params: Any,
        masks: Any,
        info: dict[str, LayerInfo],
        left_dense: Mapping[str, str] | None = None,
    ) -> "Layerwise":
        """The result; three things are enough."""
        made = super().__new__(cls, params, masks, info)
        made.left_dense = dict(left_dense or {})
        return made
