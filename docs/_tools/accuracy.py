"""Draws accuracy over sparsity from the table of ResNet-20 in `results.md`.

    python docs/_tools/accuracy.py

Markers and dashes tell the curves apart in print. The color-blind can tell the colors
of Okabe and Ito apart.
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
DENSE = 88.12
CURVES = {
    "blocks of 50, greedy, recomputed": ("OBS, recomputed", "#009E73", "D-", 0),
    "blocks of 50, greedy": ("OBS, greedy", "#0072B2", "s-", 0),
    "blocks of 50, exact joint update": ("OBS, joint update", "#D55E00", "^--", 5),
    "magnitude, global": ("magnitude", "#000000", "o:", -6),
}


def rows(text: str) -> dict[str, list[float]]:
    """The rows of the first table that has all the curves."""
    table = text.split("### ResNet-20")[1].split("\n\n")
    lines = next(part for part in table if part.startswith("|")).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    sparsities = [float(cell.removesuffix("%")) for cell in cells[0][1:]]
    found = {name: [float(n) for n in numbers] for name, *numbers in cells[2:]}
    return {"sparsity": sparsities} | {name: found[name] for name in CURVES}


def draw(table: dict[str, list[float]]) -> Figure:
    """One curve for each method, labeled at its end."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(DENSE, color="0.6", linewidth=1)
    axes.text(30, DENSE + 0.8, "dense", color="0.35")
    for name, (label, color, style, up) in CURVES.items():
        axes.plot(table["sparsity"], table[name], style, color=color, markersize=5)
        axes.annotate(
            label,
            (table["sparsity"][-1], table[name][-1]),
            xytext=(8, up),
            textcoords="offset points",
            va="center",
            color=color,
        )
    axes.set(
        xlabel="weights removed (%)",
        ylabel="test accuracy (%)",
        title="ResNet-20 on CIFAR-10, pruned in one shot, not retrained",
        xlim=(28, 98),
        ylim=(40, 92),
        xticks=table["sparsity"],
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams |= {"svg.hashsalt": "jaxsparse", "svg.fonttype": "path"}
    path = DOCS / "images" / "accuracy.svg"
    table = rows((DOCS / "results.md").read_text())
    draw(table).savefig(path, metadata={"Date": None}, facecolor="white")
