"""What the examples share: their options on the command line, and their tables."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import rich
from rich.table import Table

import jaxsparse as js


def arguments(
    description: str, *, small: str, out: str | None = None, needs_files: bool = False
) -> argparse.Namespace:
    """The options of an example; a folder for its results is made.

    Args:
      description: what the example does.
      small: what `--small` leaves.
      out: the folder of results, if there are any.
      needs_files: whether it reads files that are not part of jaxsparse.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help=small)
    if needs_files:
        text = "end without an error if files are missing"
        parser.add_argument("--skip-missing", action="store_true", help=text)
    if out is not None:
        parser.add_argument("--out", type=Path, default=Path(out))
    args, _ = parser.parse_known_args()  # a notebook has arguments of its own
    if out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    return args


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, all columns but the first aligned on the right."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    rich.print(table)


def percent(values: Iterable[float]) -> str:
    """Fractions as percents, side by side."""
    return "  ".join(f"{value:.2%}" for value in values)


def show_curves(
    title: str,
    sparsities: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    path: Path,
    ylabel: str = "accuracy",
) -> None:
    """Prints a row for each curve and draws them: a figure for each sparsity."""
    columns = ("", *(f"{sparsity:.0%}" for sparsity in sparsities))
    cells = ((name, *(f"{v:.4f}" for v in curve)) for name, curve in curves.items())
    show(title, columns, cells)
    percents = [100 * sparsity for sparsity in sparsities]
    runs = {name: (percents, curve) for name, curve in curves.items()}
    js.report.plot_tradeoff(runs, xlabel="sparsity in %", ylabel=ylabel, path=path)
    print(f"Wrote {path.name} to {path.parent}")
