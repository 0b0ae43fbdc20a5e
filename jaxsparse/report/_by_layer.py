"""Pictures with a row for each layer: errors of a pass, sparsity over steps."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxsparse import _checks
from jaxsparse.report._layers import check_info, mean_of_known
from jaxsparse.report._order import natural_order
from jaxsparse.report._style import (
    COLOURS,
    INK,
    PALE,
    check_path,
    legend,
    new_figure,
    plain,
    saved,
    short,
)
from jaxsparse.tree import leaves_with_paths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_errors(
    info: Mapping[str, Any], *, path: str | os.PathLike[str] | None = None
) -> "Figure":
    """Draw how well `js.oneshot.layerwise` solved each kernel.

    A filled dot is the relative error of the kernel's outputs, a hollow one the error
    with the same mask and unchanged remaining weights: the line between them is what
    the solver gained. For several matrices (experts, stacked layers) both are means of
    the known errors.

    Args:
      info: the result's infos by path.
      path: where to save it as PNG; a file of this name is replaced in one step.

    Returns:
      A matplotlib figure.

    Raises:
      TypeError: anything other than infos.
      ValueError: an empty `info`; a `path` that does not end in `.png`.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0]])
      >>> pruned = js.oneshot.layerwise(
      ...     lambda p, x: x @ p["w"], {"w": jnp.array([[1.0], [2.0]])}, [x],
      ...     sparsity=0.5, show=False)
      >>> figure = js.report.plot_errors(pruned.info)
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
      ['w']
    """
    check_path(path)
    check_info(info)
    if not info:
        raise ValueError(
            "info is empty: no kernel was solved. Pass the `info` that "
            "js.oneshot.layerwise returned."
        )
    paths = natural_order(info)
    error = np.array([mean_of_known(info[p].relative_error) for p in paths])
    masked = np.array([mean_of_known(info[p].masked_error) for p in paths])
    rows = np.arange(len(paths))
    figure = new_figure(7.5, max(2.2, 1.5 + 0.27 * len(paths)))
    axes: Axes = figure.add_subplot()
    axes.hlines(rows, error, masked, color="#aaaaaa", linewidth=1.2)
    (before,) = axes.plot(
        masked, rows, "o", color=COLOURS[1], markerfacecolor="none", markersize=6
    )
    (after,) = axes.plot(error, rows, "o", color=COLOURS[0], markersize=6)
    known = np.concatenate([error, masked])
    known = known[known > 0]
    if known.size and known.max() > 20 * known.min():
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("relative error of the outputs")
    axes.set_title("Error of each layer", fontsize=11, loc="left")
    _rows(axes, paths)
    legend(axes, {"solved": after, "masked only": before}, below=42)
    return saved(figure, path)


def plot_sparsity(
    history: Mapping[int, Any], *, path: str | os.PathLike[str] | None = None
) -> "Figure":
    """Draw the sparsity of each layer over the steps of a training.

    Each row is a parameter, in the natural order of its name (block_2 before block_10);
    the darker, the sparser. Parameters that were never pruned are left out.

    Args:
      history: by step a tree of sparsities, as `jaxsparse.patterns.sparsity_of(masks,
        params)` returns it.
      path: where to save it as PNG; a file of this name is replaced in one step.

    Returns:
      A matplotlib figure.

    Raises:
      TypeError: anything other than a mapping from steps to trees of numbers.
      ValueError: no steps, trees of different parameters, fractions outside [0, 1], no
        parameter that was ever pruned; a `path` that does not end in `.png`.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jaxsparse as js
      >>> history = {0: {"up": 0.0, "down": 0.0}, 100: {"up": 0.5, "down": 0.25}}
      >>> figure = js.report.plot_sparsity(history)
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
      ['down', 'up']
    """
    check_path(path)
    steps, paths, values = _over_steps(history)
    figure = new_figure(7.5, max(2.2, 1.5 + 0.27 * len(paths)))
    axes: Axes = figure.add_subplot()
    # A column lasts until the next step that is there.
    last = steps[-1] + max(1, (steps[-1] - steps[0]) // max(1, len(steps)))
    mesh = axes.pcolormesh(
        [*steps, last],
        np.arange(len(paths) + 1) - 0.5,
        100 * values,
        cmap="cividis_r",
        vmin=0,
        vmax=100,
    )
    bar = figure.colorbar(mesh, ax=axes, format="%d %%", pad=0.02)
    bar.outline.set_visible(False)  # pyrefly: ignore[not-callable]
    axes.set_xlabel("step")
    axes.set_title("Sparsity of each parameter over steps", fontsize=11, loc="left")
    _rows(axes, paths)
    axes.grid(visible=False)
    return saved(figure, path)


def _over_steps(history: Any) -> tuple[list[int], list[str], np.ndarray]:
    """Steps in order, the paths that are ever pruned, and `[paths, steps]`."""
    if not isinstance(history, Mapping):
        raise TypeError(
            "history must be a mapping {step: js.patterns.sparsity_of(masks, params)}, "
            f"got {_checks.shown(history)}."
        )
    if not history:
        raise ValueError("history is empty: give a tree of sparsities for each step.")
    for step in history:
        _checks.check_positive_int(step, name="a step of history", least=0)
    steps = sorted(history)
    trees = [dict(leaves_with_paths(jax.device_get(history[step]))) for step in steps]
    for step, tree in zip(steps, trees, strict=True):
        if tree.keys() != trees[0].keys():
            differ = sorted(tree.keys() ^ trees[0].keys())[0]
            raise ValueError(
                f"{differ}: history[{step}] and history[{steps[0]}] hold different "
                "parameters."
            )
        for path, value in tree.items():
            _checks.check_number(least=0, most=1, **{path: value})
    pruned = [path for path in trees[0] if any(tree[path] > 0 for tree in trees)]
    if not pruned:
        raise ValueError("history: no parameter was pruned in any of the steps.")
    paths = natural_order(pruned)
    values = np.array([[tree[path] for tree in trees] for path in paths], np.float64)
    return steps, paths, values


def _rows(axes: "Axes", paths: list[str]) -> None:
    """One row for each path, the first on top."""
    axes.set_yticks(range(len(paths)), [short(p) for p in paths], fontsize=9)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a path may have dollar signs
    axes.set_ylim(len(paths) - 0.4, -0.6)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    plain(axes)
    axes.tick_params(axis="y", length=0, colors=INK)
