"""Pictures of lines: sensitivity of each parameter, quality against size or time."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxsparse import _checks
from jaxsparse.report._order import natural_order
from jaxsparse.report._style import (
    COLOURS,
    MARKERS,
    PALE,
    check_path,
    legend,
    new_figure,
    percents,
    plain,
    saved,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_sensitivity(
    sensitivity: Any,
    *,
    named: int = 6,
    ylabel: str = "loss",
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draw the loss over the sparsity of each parameter alone.

    The parameters whose curves move farthest from the dense model have a color, a mark
    and a name; all others are gray lines. A dashed line is the dense model.

    Args:
      sensitivity: what `jaxsparse.allocations.sensitivity` returned.
      named: how many parameters have a name, at most 7.
      ylabel: what the loss function measures, as "accuracy".
      path: where to save it as PNG; a file of this name is replaced in one step.

    Returns:
      A matplotlib figure.

    Raises:
      TypeError: anything other than a `Sensitivity`.
      ValueError: no parameters; `named` out of range; a `path` that does not end in
        `.png`.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"a": jnp.array([[4.0, 1.0]]), "b": jnp.array([[2.0, 2.0]])}
      >>> found = js.allocations.sensitivity(
      ...     params,
      ...     js.scores.magnitude(params),
      ...     lambda p: sum(jnp.sum(w) for w in jax.tree.leaves(p)),
      ...     [0.25, 0.5])
      >>> figure = js.report.plot_sensitivity(found, ylabel="sum")
      >>> figure.axes[0].get_ylabel()
      'sum'
    """
    check_path(path)
    _checks.check_positive_int(named, name="named", least=0)
    if named > len(COLOURS):
        raise ValueError(f"named is at most {len(COLOURS)}, one a colour; got {named}.")
    missing = [
        x for x in ("dense", "sparsities", "losses") if not hasattr(sensitivity, x)
    ]
    if missing:
        raise TypeError(
            "sensitivity must be what js.allocations.sensitivity returned, got "
            f"{_checks.shown(sensitivity)}."
        )
    if not sensitivity.losses:
        raise ValueError("sensitivity holds no parameters: was any selected?")
    x = [100 * s for s in sensitivity.sparsities]
    away = {
        name: float(np.nanmax(np.abs(y - sensitivity.dense), initial=0.0))
        for name, y in sensitivity.losses.items()
    }
    most = natural_order(sorted(away, key=lambda name: -away[name])[:named])
    figure = new_figure(7.5, 4.6 + 0.22 * math.ceil(len(most) / 2))
    axes: Axes = figure.add_subplot()
    for name, y in sensitivity.losses.items():
        if name not in most:
            axes.plot(x, y, color="#aaaaaa", linewidth=0.9)
    handles: dict[str, Any] = {}
    for i, name in enumerate(most):
        (handles[short(name, 36)],) = axes.plot(
            x,
            sensitivity.losses[name],
            color=COLOURS[i],
            marker=MARKERS[i],
            markersize=4.5,
            linewidth=1.6,
        )
    handles["dense"] = axes.axhline(
        sensitivity.dense, color="#222222", linewidth=1.0, linestyle="--"
    )
    axes.set_xlim(0, 100)
    percents(axes, "x")
    axes.set_xlabel("sparsity of this parameter alone")
    axes.set_ylabel(ylabel)
    axes.set_title("Sensitivity of each parameter", fontsize=11, loc="left")
    axes.grid(color=PALE, linewidth=0.8)
    plain(axes)
    legend(axes, handles, below=42)
    return saved(figure, path)


def plot_tradeoff(
    runs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str = "accuracy",
    logx: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draw the quality of several methods against sparsity, size or time.

    Args:
      runs: a mapping from the name of a method to two sequences of the same length, x
        (a sparsity, bytes, milliseconds) and the quality at x. A single point is drawn
        as a mark, for a dense model for example.
      xlabel: what x is, with its unit.
      ylabel: what y is.
      logx: whether the x axis is logarithmic, as for sizes.
      path: where to save it as PNG; a file of this name is replaced in one step.

    Returns:
      A matplotlib figure.

    Raises:
      TypeError: anything other than a mapping to pairs of numbers.
      ValueError: no runs, more than 7 (the colors that a reader can tell apart),
        sequences of unequal lengths, x that is not positive on a logarithmic axis; a
        `path` that does not end in `.png`.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jaxsparse as js
      >>> runs = {"magnitude": ([0, 50, 90], [0.93, 0.92, 0.61]), "OBS": ([90], [0.88])}
      >>> figure = js.report.plot_tradeoff(runs, xlabel="sparsity in %")
      >>> [line.get_label() for line in figure.axes[0].get_lines()]
      ['magnitude', 'OBS']
    """
    check_path(path)
    _checks.check_mapping(made_by="{name: (x, y)}", runs=runs)
    _checks.check_bool(logx=logx)
    if not 0 < len(runs) <= len(COLOURS):
        raise ValueError(
            f"runs holds 1 to {len(COLOURS)} methods, as many as there are colours "
            f"that one can tell apart; got {len(runs)}."
        )
    points = {name: _points(name, run, logx) for name, run in runs.items()}
    figure = new_figure(7.5, 4.6 + 0.22 * math.ceil(len(runs) / 2))
    axes: Axes = figure.add_subplot()
    handles: dict[str, Any] = {}
    for i, (name, (x, y)) in enumerate(points.items()):
        order = np.argsort(x, kind="stable")
        (handles[name],) = axes.plot(
            x[order],
            y[order],
            color=COLOURS[i],
            marker=MARKERS[i],
            markersize=5.5,
            linewidth=1.7,
            linestyle=("-", "--")[i % 2],
            label=name,
        )
    if logx:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color=PALE, linewidth=0.8)
    plain(axes)
    legend(axes, handles, below=42)
    return saved(figure, path)


def _points(name: str, run: Any, logx: bool) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(run, tuple | list) or len(run) != 2:
        raise TypeError(
            f"runs[{name!r}] must be a pair (x, y) of sequences, got "
            f"{_checks.shown(run)}."
        )
    try:
        x, y = (np.asarray(jax.device_get(v), np.float64).reshape(-1) for v in run)
    except (TypeError, ValueError) as error:
        raise TypeError(f"runs[{name!r}] must hold numbers: {error}.") from error
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"runs[{name!r}] must have one y for each x, at least one; got {len(x)} "
            f"and {len(y)}."
        )
    if logx and not np.all(x > 0):
        raise ValueError(
            f"runs[{name!r}]: x must be positive on a logarithmic axis, got "
            f"{x.min():g}."
        )
    return x, y
