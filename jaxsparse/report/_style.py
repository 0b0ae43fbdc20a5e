"""How all pictures look, and how they are made, shown and saved."""

import functools
import os
import pathlib
from typing import TYPE_CHECKING, Any

from jaxsparse.report._files import replace_file
from jaxsparse.report._html import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777")
"""Okabe and Ito's, which colour-blind readers can tell apart."""

INK = "#222222"
PALE = "#dddddd"

MARKERS = "osD^vP*"
"""One for each colour, so that a picture can be read in black and white."""


def new_figure(width: float, height: float) -> "Figure":
    """A figure that a notebook shows, also when pyplot was never imported."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'The plots of js.report need matplotlib: pip install "jaxsparse[plots]"'
        ) from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    setattr(figure, "_repr_png_", functools.partial(png, figure))  # noqa: B010
    return figure


def check_path(path: str | os.PathLike[str] | None) -> None:
    """Raises, before anything is drawn, unless it is None or ends in `.png`."""
    if path is not None and pathlib.Path(path).suffix.lower() != ".png":
        raise ValueError(
            f"path must end in '.png', got {os.fspath(path)!r}. For another format "
            "save the figure that is returned: figure.savefig(path)."
        )


def saved(figure: "Figure", path: str | os.PathLike[str] | None) -> "Figure":
    """The figure, written as PNG where there is a path."""
    if path is not None:
        replace_file(path, png(figure))
    return figure


def legend(axes: "Axes", handles: dict[str, Any], *, below: float) -> None:
    """So many points below the axes, where it covers nothing."""
    from matplotlib.transforms import ScaledTranslation

    figure: Any = axes.figure
    down = ScaledTranslation(0, -below / 72, figure.dpi_scale_trans)
    made = axes.legend(
        list(handles.values()),
        list(handles),
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axes.transAxes + down,
        ncols=3 if len(handles) == 3 else 2,
        fontsize=9,
        frameon=False,
        borderaxespad=0,
    )
    for text in made.get_texts():
        text.set_parse_math(False)


def plain(axes: "Axes") -> None:
    """Without a box around it."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)


def short(path: str, most: int = 42) -> str:
    """The end of a path, which says most: `…/attention/query/kernel`."""
    return path if len(path) <= most else "…" + path[-(most - 1) :]


def percents(axes: "Axes", which: str) -> None:
    """Marks 0 to 100 % on the x or y axis."""
    ticks = range(0, 101, 20)
    getattr(axes, f"set_{which}ticks")(ticks, [f"{x} %" for x in ticks])
