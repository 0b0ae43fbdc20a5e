"""Figures that one example draws each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure and says so."""
    figure.savefig(path, dpi=130)
    print(f"Wrote {path.name} to {path.parent}")


def draw_masks(
    masks: Mapping[str, tuple[str, jax.Array]],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
) -> None:
    """Masks side by side as images, inputs down, blue where a weight is kept.

    Args:
      masks: for each title, the name of a kernel and its mask.
      shapes: of each kernel.
      path: where to.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    plots = figure.subplots(1, len(masks))
    for axes, (title, (name, mask)) in zip(plots, masks.items(), strict=True):
        full = jnp.broadcast_to(mask, shapes[name]).reshape(64, -1)[:, :64]
        axes.imshow(full, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        axes.set_title(f"{title}\n({name} kernel)", fontsize=9)
        axes.set_xlabel("output")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.axes[0].set_ylabel("input")
    save(figure, path)


def draw_losses(
    curves: Mapping[str, tuple[np.ndarray, float]], every: int, path: Path
) -> None:
    """Losses over steps and over seconds, with the range of the seeds.

    Args:
      curves: for each name, losses [seeds, records] and the seconds of a step.
      every: steps of a record.
      path: where to.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for name, (losses, seconds) in curves.items():
        steps = every * np.arange(1, losses.shape[1] + 1)
        for axes, at in ((by_step, steps), (by_second, steps * seconds)):
            (line,) = axes.plot(at, losses.mean(0), label=name)
            low, high = losses.min(0), losses.max(0)
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
            axes.grid(alpha=0.3)
    by_step.set(xlabel="steps", ylabel="training loss", yscale="log")
    by_second.set(xlabel="seconds")
    by_step.legend(fontsize=9)
    save(figure, path)


def draw_errors(errors: Mapping[str, Sequence[float]], path: Path) -> None:
    """The relative error of each kernel's outputs, in the order of the pass."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in errors.items():
        axes.plot(found, marker=".", label=name)
    label = "relative error of its outputs"
    axes.set(xlabel="kernel, in the order of the pass", ylabel=label, yscale="log")
    axes.legend()
    save(figure, path)


def draw_channels(points: Sequence[tuple], path: Path) -> None:
    """Accuracy over time and over parameters.

    Args:
      points: name, budget, parameters, milliseconds and accuracy of each network.
      path: where to.
    """
    marks = {"dense": "k*", "masked": "C1x", "narrowed": "C0o", "trained": "C2s-"}
    figure = Figure(figsize=(9, 4), layout="constrained")
    plots = figure.subplots(1, 2, sharey=True)
    labels = {3: "milliseconds for 64 images", 2: "parameters"}
    for axes, (at, label) in zip(plots, labels.items(), strict=True):
        for name, mark in marks.items():
            chosen = sorted(p for p in points if p[0] == name)
            text = {"trained": "narrowed, trained"}.get(name, name)
            axes.plot([p[at] for p in chosen], [p[4] for p in chosen], mark, label=text)
        axes.set(xlabel=label, ylabel="accuracy")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
