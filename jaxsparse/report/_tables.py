"""The value that holds a model's sparsity, and how it is shown."""

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from jaxsparse.report._html import table_html
from jaxsparse.report._order import natural_order


class Row(NamedTuple):
    """One parameter, or the sum of several.

    Attributes:
      path: the parameter's path as text.
      shape: its shape; `()` in a sum.
      dtype: the name of its type; "mixed" in a sum over several types.
      asked: the requested sparsity, or None. In a sum the mean over all its weights;
        weights without a stated sparsity count as 0.
      reached: the fraction that the mask removes.
      kept: the number of weights that the mask keeps.
      size: the number of weights.
      dense_bytes: the bytes of all weights.
      packed_bytes: the bytes of a bitmap: the kept weights and one bit for each weight;
        for a parameter that is not pruned the same as `dense_bytes`.
      leaked: the number of nonzero weights under a False mask; 0 if there are no values
        (`jax.ShapeDtypeStruct`).
      pruned: whether it takes part, which is when its mask is not a scalar True.
      nearly_empty: whether the mask keeps next to nothing: of n units (weights, or
        channels where the mask has one number for each) 1, or `sqrt(n) / 10` at most.
        It is what `min_keep` of `jaxsparse.patterns.masks` alone may have kept.
      why: for an array of two axes or more, why the default selection leaves it dense
        (see `jaxsparse.tree.why_dense`); else empty.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    asked: float | None
    reached: float
    kept: int
    size: int
    dense_bytes: int
    packed_bytes: int
    leaked: int
    pruned: bool
    nearly_empty: bool = False
    why: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Table:
    """The sparsity of a model as a value.

    `rich.print(table)` shows it in a terminal, and leaves out columns when that is
    narrow; a notebook shows it as HTML; `str(table)` is plain text for a log, and is
    never cut.

    Attributes:
      rows: one for each parameter, in the order of the tree. (What is shown has block 2
        before block 10.)
      pruned: the sum of the rows that take part.
      total: the sum of all rows.
      title: the heading.
      state_leaked: the largest number of pruned weights that the optimizer's state
        found nonzero at once; 0 without a state.
    """

    rows: tuple[Row, ...]
    pruned: Row
    total: Row
    title: str = "Sparsity"
    state_leaked: int = 0

    @property
    def warning(self) -> str:
        """The warning about nonzero pruned weights, with a remedy; else empty."""
        said = []
        if n := self.total.leaked:
            are = "weight is" if n == 1 else "weights are"
            said.append(f"{n:,} pruned {are} not zero at this moment.")
        if n := self.state_leaked:
            were = "weight was" if n == 1 else "weights were"
            said.append(
                f"During training up to {n:,} pruned {were} found nonzero (the "
                "counter in the optimizer's state)."
            )
        if said:
            said.append(
                "Wrap the chain in js.enforce, or use js.apply_updates(params, "
                "updates, opt_state) in place of optax.apply_updates."
            )
        return " ".join(said)

    @property
    def note(self) -> str:
        """The note on layers that keep almost no weights; empty without any."""
        few = [row for row in self.rows if row.nearly_empty]
        if not few:
            return ""
        shown = ", ".join(f"{row.path} ({row.kept:,} of {row.size:,})" for row in few)
        return (
            f"Nearly empty, marked by !: {shown}. Raise min_keep, give these "
            "parameters a lower sparsity, or leave them out with `where`."
        )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        columns = self._columns()
        table = self._rich(columns)
        # What does not fit is left out by columns: numbers that are cut would mislead.
        for name in ("dtype", "dense", "shape", "weights"):
            unlimited = options.update(width=100_000)
            if Measurement.get(console, unlimited, table).maximum <= options.max_width:
                break
            columns.remove(name)
            table = self._rich(columns)
        yield table

    def __repr__(self) -> str:
        # Wide enough that nothing is cut; the table takes only the width it needs.
        # In a notebook rich would show it there and leave the buffer empty.
        buffer = io.StringIO()
        console = Console(
            file=buffer, width=100_000, color_system=None, force_jupyter=False
        )
        console.print(self)
        lines = (line.rstrip() for line in buffer.getvalue().splitlines())
        return "\n".join(lines).strip("\n")

    def to_html(self) -> str:
        """The table as one `<table>` with its style inside; all text is escaped.

        Returns:
          HTML text.
        """
        columns, totals, shown = self._columns(), self._totals(), self._shown()
        return table_html(
            title=self.title,
            header=columns,
            rows=[_cells(row, columns) for row in shown],
            totals=[_cells(row, columns) for row in totals],
            bars=[row.reached for row in (*shown, *totals)],
            bar_column=columns.index("reached"),
            note=" ".join(x for x in (self.legend, self.left_dense, self.note) if x),
            warning=self.warning,
        )

    def _rich(self, columns: Sequence[str]) -> RichTable:
        table = RichTable(
            title=Text(self.title, style="bold"),
            title_justify="left",
            caption=self._caption(),
            caption_justify="left",
            box=SIMPLE_HEAD,
        )
        for name in columns:
            first, left = name == "parameter", name in {"parameter", "shape", "dtype"}
            justify = "left" if left else "right"
            table.add_column(name, justify=justify, no_wrap=not first, overflow="fold")
        # As Text: a path may look like rich's markup, for instance "layers[0]".
        for row in self._shown():
            style = "" if row.pruned else "dim"
            table.add_row(*map(Text, _cells(row, columns)), style=style)
        table.add_section()
        for row in self._totals():
            table.add_row(*map(Text, _cells(row, columns)), style="bold")
        return table

    def _shown(self) -> list[Row]:
        rows = {row.path: row for row in self.rows}
        return [rows[path] for path in natural_order(rows)]

    @property
    def legend(self) -> str:
        """The meaning of the column "packed"; empty if nothing is pruned."""
        if not self.pruned.size:
            return ""
        return (
            "packed: what the kept weights and one bit for each weight would take. "
            "Arrays with masks take what dense ones do, and are as slow."
        )

    @property
    def left_dense(self) -> str:
        """The arrays of two axes or more that stay dense by default, and why."""
        left = [f"{row.path} ({row.why})" for row in self.rows if row.why]
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        return f"Left dense: {', '.join(left[:_NAMED])}{more}." if left else ""

    def _caption(self) -> Text | None:
        said = {
            self.legend: "dim",
            self.left_dense: "",
            self.note: "yellow",
            self.warning: "bold red",
        }
        lines = [Text(text, style=style) for text, style in said.items() if text]
        return Text("\n").join(lines) if lines else None

    def _repr_html_(self) -> str:
        return self.to_html()

    def _totals(self) -> tuple[Row, ...]:
        # The same numbers twice would make readers look for a difference.
        alike = self.pruned.size in {0, self.total.size}
        return (self.total,) if alike else (self.pruned, self.total)

    def _columns(self) -> list[str]:
        left_out = set()
        if self.total.asked is None:
            left_out.add("asked")
        if not self.total.leaked:
            left_out.add("leaked")
        return [name for name in _COLUMNS if name not in left_out]


_NAMED = 6  # as many parameters are named below a table

_COLUMNS = {
    "parameter": lambda r: r.path,
    "shape": lambda r: str(r.shape) if r.shape else "",
    "dtype": lambda r: r.dtype,
    "asked": lambda r: percent(r.asked) if r.pruned else "-",
    "reached": lambda r: percent(r.reached) if r.pruned else "-",
    "kept": lambda r: f"{r.kept:,}" + (" !" if r.nearly_empty else ""),
    "weights": lambda r: f"{r.size:,}",
    "dense": lambda r: size_text(r.dense_bytes),
    "packed": lambda r: size_text(r.packed_bytes),
    "leaked": lambda r: f"{r.leaked:,}" if r.leaked else "",
}


def _cells(row: Row, columns: Iterable[str]) -> list[str]:
    return [_COLUMNS[name](row) for name in columns]


def percent(x: float | None) -> str:
    """A fraction as text, with enough digits that 99.999 % does not read 100 %."""
    if x is None:
        return "-"
    text = f"{100 * x:.2f}"
    for digits in range(3, 10):
        if x in {0, 1} or float(text) not in {0.0, 100.0}:
            break
        text = f"{100 * x:.{digits}f}"
    return f"{text} %"


def size_text(n: int) -> str:
    """A number of bytes as text."""
    if n < 1024:
        return f"{n} B"
    size, unit = n / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        # What would be written 1024.0 of one unit is 1.0 of the next.
        if round(size, 1) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"
