"""Pictures: the sparsity of each layer, and sparsity and loss over time."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxsparse.report._order import natural_order
from jaxsparse.report._style import (
    COLOURS,
    INK,
    check_path,
    legend,
    new_figure,
    percents,
    plain,
    saved,
    short,
)
from jaxsparse.report._tables import Row, Table, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEYS = ("step", "sparsity", "loss")
_Runs = dict[str, dict[str, np.ndarray]]


def plot(
    table_or_tables: Table | Mapping[str, Table],
    *,
    history: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draw the sparsity of each pruned parameter, and what happened in training.

    The left panel has a bar for each pruned parameter, with a tick at the requested
    sparsity. The right panel shows sparsity and loss over steps if there is a history.
    It needs matplotlib, but no display, and changes none of pyplot's global state.

    Args:
      table_or_tables: a table, or a dictionary from a run's name to its table.
      history: for one run a mapping with the keys "step", "sparsity" (fractions) and
        "loss", each a sequence of the same length; for several a mapping from a run's
        name to such a mapping. A table and a run of the same name have the same color.
      path: where to save it as PNG; a file of this name is replaced in one step.

    Returns:
      A matplotlib figure. Save it in another format with `figure.savefig`.

    Raises:
      ValueError: no pruned parameter; a history with missing keys or unequal lengths; a
        `path` that does not end in `.png`.
      TypeError: a value that is not a table of `js.report.table`.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> pruned = js.prune({"kernel": jnp.array([[3.0, 1.0]])}, 0.5)
      >>> history = {"step": [0, 1], "sparsity": [0.0, 0.5], "loss": [2.0, 1.0]}
      >>> figure = js.report.plot(js.report.table(*pruned), history=history)
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['', 'loss', 'sparsity']
    """
    tables = _tables(table_or_tables)
    runs = {} if history is None else _runs(history)
    check_path(path)
    return saved(_draw(tables, runs), path)


def _tables(given: Any) -> dict[str, Table]:
    tables = dict(given) if isinstance(given, Mapping) else {"": given}
    for name, table in tables.items():
        if not isinstance(table, Table):
            where = f" at {name!r}" if name else ""
            raise TypeError(
                "plot takes what js.report.table returned, or a dictionary of such "
                f"tables; got a {type(table).__name__}{where}."
            )
    if not any(row.pruned for table in tables.values() for row in table.rows):
        raise ValueError(
            "No parameter of the table is pruned, so there is nothing to draw. Were "
            "the masks given to js.report.table?"
        )
    return tables


def _runs(history: Mapping[str, Any]) -> _Runs:
    several = any(isinstance(x, Mapping) for x in history.values())
    given = history if several else {"": history}
    return {name: _run(name, run) for name, run in given.items()}


def _run(name: str, run: Any) -> dict[str, np.ndarray]:
    what = f"history[{name!r}]" if name else "history"
    missing = [key for key in _KEYS if not isinstance(run, Mapping) or key not in run]
    if missing:
        raise ValueError(
            f"{what} must have the keys 'step', 'sparsity' and 'loss'; missing "
            f"{', '.join(map(repr, missing))}."
        )
    values = {
        key: np.asarray(jax.device_get(run[key]), dtype=np.float64) for key in _KEYS
    }
    shapes = {key: x.shape for key, x in values.items()}
    if len(set(shapes.values())) > 1 or values["step"].ndim != 1:
        raise ValueError(
            f"{what} must have one value for each step under each key; got the shapes "
            f"{shapes}."
        )
    if np.any((values["sparsity"] < 0) | (values["sparsity"] > 1)):
        raise ValueError(
            f"{what}: a sparsity is a fraction in [0, 1]; got values from "
            f"{values['sparsity'].min():g} to {values['sparsity'].max():g}."
        )
    return values


def _draw(tables: dict[str, Table], runs: _Runs) -> "Figure":
    names = list(dict.fromkeys((*tables, *runs)))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    layers = len(_paths(tables))
    height = 1.3 + layers * max(0.27, 0.15 * len(tables) + 0.07)
    height = max(4.2 if runs else 2.0, height)
    # Of the space that a layer has, bars take at most this; few layers, slim bars.
    thick = min(0.78, 0.34 * len(tables) * layers / (height - 1.2)) / len(tables)
    figure = new_figure(12 if runs else 7.5, height)
    if not runs:
        _bars(figure.add_subplot(), tables, colours, thick)
    else:
        # The right picture keeps its shape however many layers the left one has.
        grid = figure.add_gridspec(
            2, 2, height_ratios=(4.2, max(height - 4.2, 1e-3)), width_ratios=(1, 1)
        )
        _bars(figure.add_subplot(grid[:, 0]), tables, colours, thick)
        _curves(figure.add_subplot(grid[0, 1]), runs, colours)
    return figure


def _paths(tables: dict[str, Table]) -> list[str]:
    # What any of the tables prunes, in the order of the first but for numbers.
    every = [row.path for table in tables.values() for row in table.rows]
    pruned = {row.path for t in tables.values() for row in t.rows if row.pruned}
    return natural_order(path for path in dict.fromkeys(every) if path in pruned)


def _bars(
    axes: "Axes", tables: dict[str, Table], colours: dict[str, str], thick: float
) -> None:
    paths = _paths(tables)
    handles: dict[str, Any] = {}
    for i, (name, table) in enumerate(tables.items()):
        shift = (i - (len(tables) - 1) / 2) * thick
        found: dict[str, Row] = {row.path: row for row in table.rows}
        rows = [(y + shift, found[p]) for y, p in enumerate(paths) if p in found]
        bars = axes.barh(
            [y for y, _ in rows],
            [100 * row.reached for _, row in rows],
            height=0.92 * thick,
            color=colours[name],
        )
        handles[name or "reached"] = bars
        for y, row in rows:
            axes.text(
                101.5,
                y,
                percent(row.reached),
                va="center",
                fontsize=8 if len(tables) < 3 else 7,
                color=INK,
            )
        wanted = [(y, 100 * row.asked) for y, row in rows if row.asked is not None]
        if wanted:
            ys, xs = np.array([y for y, _ in wanted]), [x for _, x in wanted]
            # A little longer than the bar, so that it is seen where they meet.
            reach = 0.58 * thick if len(tables) == 1 else 0.5 * thick
            handles["asked"] = axes.vlines(
                xs, ys - reach, ys + reach, colors=INK, linewidths=1.8
            )
    axes.set_yticks(range(len(paths)), [short(p) for p in paths], fontsize=9)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a path may have dollar signs
    axes.set_ylim(len(paths) - 0.4, -0.6)  # the first layer on top
    axes.set_xlim(0, 113)
    percents(axes, "x")
    axes.set_title("Sparsity of each pruned parameter", fontsize=11, loc="left")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    plain(axes)
    if "asked" in handles:
        handles["asked"] = handles.pop("asked")  # named after the runs
    if len(handles) > 1:
        legend(axes, handles, below=26)


def _curves(axes: "Axes", runs: _Runs, colours: dict[str, str]) -> None:
    right = axes.twinx()
    handles: dict[str, Any] = {}
    for name, run in runs.items():
        label = f"{name}: " if name else ""
        # One run needs no color of its own, so its two curves have different ones.
        colour = colours[name]
        other = colour if name else COLOURS[5]
        (handles[f"{label}sparsity"],) = right.plot(
            run["step"], 100 * run["sparsity"], color=colour, linewidth=1.8, ls="--"
        )
        (handles[f"{label}loss"],) = axes.plot(
            run["step"], run["loss"], color=other, linewidth=1.8
        )
    right.set_ylim(0, 105)
    percents(right, "y")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    right.set_ylabel("sparsity")
    axes.set_title("Loss and sparsity over steps", fontsize=11, loc="left")
    axes.grid(color="#dddddd", linewidth=0.8)
    plain(axes)
    plain(right)
    legend(axes, handles, below=42)
