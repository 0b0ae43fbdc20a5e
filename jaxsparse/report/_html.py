"""HTML that stands alone: no scripts, no style sheets, no files beside it."""

import base64
import html
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxsparse.report._files import replace_file

# Half-transparent colors read well on a light and on a dark page.
_LINE = "1px solid rgba(128,128,128,.35)"
_TABLE = "border-collapse:collapse;font:13px/1.5 system-ui,sans-serif;text-align:right"
_CELL = "padding:3px 10px;white-space:nowrap;font-variant-numeric:tabular-nums"
_WARNING = "padding:6px 10px;text-align:left;color:#c62828;font-weight:600"
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  font: 15px/1.55 system-ui, sans-serif; }}
h1, h2, h3 {{ line-height: 1.25; }}
figure, .table {{ margin: 1.5rem 0; overflow-x: auto; }}
img {{ max-width: 100%; height: auto; border-radius: 4px; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_html(
    path: str | os.PathLike[str], *parts: Any, title: str = "Sparsity report"
) -> pathlib.Path:
    """Write one self-contained HTML file of tables, figures and text.

    The file is complete or not there: it is written beside `path` and then moved.

    Args:
      path: where to save it; a file of this name is replaced.
      *parts: in their order: a `Table`; a matplotlib figure, which is embedded as PNG;
        or text, where an empty line begins a paragraph and `# ` or `## ` at the start
        of a paragraph makes it a heading. Text is shown as it is: HTML in it is
        escaped.
      title: the page's title and first heading.

    Returns:
      The path.

    Raises:
      TypeError: a part of another type.
      FileNotFoundError: the folder does not exist.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, jaxsparse as js
      >>> pruned = js.prune({"kernel": jnp.array([[3.0, 1.0]])}, 0.5)
      >>> table = js.report.table(*pruned)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "run.html")
      ...     js.report.write_html(path, "# Layers", table).name
      ...     "<h2>Layers</h2>" in path.read_text()
      'run.html'
      True
    """
    body = "\n".join(_part(i, part) for i, part in enumerate(parts))
    page = _PAGE.format(title=html.escape(title), body=body)
    return replace_file(path, page.encode())


def _part(index: int, part: Any) -> str:
    # Known by what they can do: matplotlib is not imported for a page of text.
    if isinstance(part, str):
        paragraphs = (p.strip() for p in part.split("\n\n"))
        return "\n".join(_paragraph(p) for p in paragraphs if p)
    if hasattr(part, "to_html"):
        return f'<div class="table">{part.to_html()}</div>'
    if hasattr(part, "savefig"):
        data = base64.b64encode(png(part)).decode()
        return f'<figure><img alt="figure" src="data:image/png;base64,{data}"></figure>'
    raise TypeError(
        f"parts[{index}] is a {type(part).__name__}; a page is made of text, tables of "
        "js.report.table and figures of matplotlib. Turn it into one of them, for "
        "instance with str()."
    )


def _paragraph(text: str) -> str:
    for mark, tag in (("## ", "h3"), ("# ", "h2")):
        if text.startswith(mark):
            return f"<{tag}>{html.escape(text.removeprefix(mark))}</{tag}>"
    return f"<p>{html.escape(text)}</p>"


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def table_html(
    *,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    totals: Sequence[Sequence[str]],
    bars: Sequence[float],
    bar_column: int,
    note: str = "",
    warning: str = "",
) -> str:
    """A `<table>` with its style inside, all text escaped."""

    def line(tag: str, cells: Sequence[str], *, bar: float = 0.0, style: str = ""):
        written = []
        for column, cell in enumerate(cells):
            shown = f"{_CELL};{style}" if style else _CELL
            if column == 0:
                shown += ";text-align:left"
            if column == bar_column and bar:
                blue = "rgba(66,133,244,.28)"
                shown += (
                    f";background:linear-gradient(90deg,{blue} {100 * bar:.1f}%,"
                    f"transparent {100 * bar:.1f}%)"
                )
            written.append(f'<{tag} style="{shown}">{html.escape(cell)}</{tag}>')
        return f'<tr style="border-bottom:{_LINE}">{"".join(written)}</tr>'

    bold = "font-weight:600"
    body = [line("td", r, bar=b) for r, b in zip(rows, bars, strict=False)]
    foot = [
        line("td", r, bar=b, style=bold)
        for r, b in zip(totals, bars[len(rows) :], strict=True)
    ]
    for text, style in ((note, f"{_CELL};text-align:left"), (warning, _WARNING)):
        if text:
            foot.append(
                f'<tr><td colspan="{len(header)}" style="{style}">'
                f"{html.escape(text)}</td></tr>"
            )
    caption = "text-align:left;font-weight:600;padding:4px 10px"
    return "\n".join([
        f'<table style="{_TABLE}">',
        f'<caption style="{caption}">{html.escape(title)}</caption>',
        f"<thead>{line('th', header, style=bold)}</thead>",
        "<tbody>",
        *body,
        "</tbody>",
        f'<tfoot style="border-top:2px solid rgba(128,128,128,.6)">{"".join(foot)}'
        "</tfoot>",
        "</table>",
    ])
