"""What a layer-wise run returns."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class LayerInfo(NamedTuple):
    """The quality of one solved kernel: an entry for each of its matrices, `[*batch]`.

    Attributes:
      error: `tr((W' - W) G (W' - W)^T)`, `G` the second moment of its inputs; NaN, as
        the next two, where all inputs that were seen are 0, or none was seen.
      relative_error: `error / tr(W G W^T)`.
      masked_error: what the error would be with the same mask and without a change of
        the weights that are left, relative too.
      damping: what was added to the diagonal of `G`.
      dead: how many of its inputs are always 0.
      rows: how many rows of inputs were seen.
      sparsity: the fraction removed.
      seconds: what the solver took, for all matrices of the kernel.
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
    """The result of `layerwise`: three things, and what was left out.

    Attributes:
      params: the pruned parameters.
      masks: True = kept; a scalar True where nothing was pruned.
      info: a `LayerInfo` for each kernel, by path, in the order of solving.
      left_dense: by path why a parameter that looks like a kernel stayed dense. It is
        no part of the tuple, and lost where JAX makes a new one (`jax.tree.map`).
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
