"""Pictures of weights: how large they are before and after."""

import math
import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import PyTree, Where
from jaxsparse.report._order import natural_order
from jaxsparse.report._style import (
    COLOURS,
    check_path,
    new_figure,
    plain,
    saved,
    short,
)
from jaxsparse.tree import leaves_with_paths, like, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_weights(
    before: PyTree,
    after: PyTree,
    *,
    where: Where = None,
    bins: int = 60,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draw histograms of each parameter's weights before and after pruning.

    Each title states the fraction of zeros, which are not drawn because they would hide
    the rest. The picture shows the gap that magnitude pruning leaves around 0, and
    whether a solver or a training moved the remaining weights.

    Args:
      before: the dense parameters.
      after: the pruned parameters, of the same structure.
      where: which parameters are drawn; see `jaxsparse.tree.select`. Parameters that
        are not pruned by default are left out.
      bins: the number of bars.
      path: where to save it as PNG; a file of this name is replaced in one step.

    Returns:
      A matplotlib figure, three histograms a row.

    Raises:
      ValueError: trees of different structure, no parameters; more than 60 of them, for
        which `where` makes a choice; a `path` that does not end in `.png`.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax, jaxsparse as js
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (32, 32))}
      >>> figure = js.report.plot_weights(params, js.prune(params, 0.5).params)
      >>> figure.axes[0].get_title('left')
      'kernel: 0.0 % → 50.0 % zeros'
    """
    check_path(path)
    _checks.check_positive_int(bins, name="bins", least=2)
    _checks.check_arrays(before=before)
    after = like(after, before, name="after", of="before")
    _checks.check_like(before, of="before", after=after)
    taken = jax.tree.leaves(select(before, where))
    pairs = {
        name: (x, y)
        for (name, x), y, take in zip(
            leaves_with_paths(before), jax.tree.leaves(after), taken, strict=True
        )
        if take
    }
    if not pairs:
        raise ValueError("No parameter is selected, so there is nothing to draw.")
    if len(pairs) > 60:
        raise ValueError(
            f"{len(pairs)} parameters are too many for one picture: choose at most 60 "
            'with where=, as where=r"block_0/".'
        )
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = new_figure(4.0 * columns + 0.4, 0.5 + 2.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(pairs) :]:
        axes.remove()
    for axes, name in zip(grid.flat, natural_order(pairs), strict=False):
        dense, pruned = map(_numbers, pairs[name])
        _histogram(axes, name, dense, pruned, bins)
    first = grid.flat[0]
    first.legend(fontsize=8, frameon=False, loc="upper right")
    return saved(figure, path)


def _numbers(w: Any) -> np.ndarray:
    w = np.asarray(jax.device_get(w)).reshape(-1)
    return (np.abs(w) if np.iscomplexobj(w) else w).astype(np.float64)


def _histogram(
    axes: "Axes", name: str, before: np.ndarray, after: np.ndarray, bins: int
) -> None:
    both = np.concatenate([before, after])
    both = both[np.isfinite(both)]
    low, high = (both.min(), both.max()) if both.size else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1).tolist()
    kept = lambda w: w[np.isfinite(w) & (w != 0)]
    axes.hist(
        kept(before), edges, color="#aaaaaa", label="before", histtype="stepfilled"
    )
    axes.hist(
        kept(after),
        edges,
        color=COLOURS[0],
        label="after",
        histtype="step",
        linewidth=1.4,
    )
    zeros = [100 * np.mean(w == 0) if w.size else 0.0 for w in (before, after)]
    title = f"{short(name, 26)}: {zeros[0]:.1f} % → {zeros[1]:.1f} % zeros"
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    axes.set_yticks([])
    plain(axes)
