"""A progress bar for loops over layers and batches."""

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar

from rich import progress as rich_progress
from rich.console import Console

from jaxsparse._checks import check_positive_int

T = TypeVar("T")

# A terminal has room for one live display. A loop inside a loop adds its bar to it.
_displays: list[rich_progress.Progress] = []


class Progress(Generic[T]):
    """An iterable that shows its progress; see `progress`."""

    def __init__(
        self, iterable: Iterable[T], description: str, total: int | None, shown: bool
    ):
        self._iterable = iterable
        self._description = description
        self._total = total
        self._shown = shown
        self._text = ""
        self._task: tuple[rich_progress.Progress, Any] | None = None

    def __iter__(self) -> Iterator[T]:
        return self._show() if self._shown else iter(self._iterable)

    @property
    def shown(self) -> bool:
        """Whether there is a bar."""
        return self._shown

    def say(self, text: str) -> None:
        """Show a text beside the bar, in place of the one before.

        Args:
          text: for instance a layer's name and its error; shown as it is.
        """
        self._text = text
        if self._task is not None:
            display, task = self._task
            display.update(task, text=text)

    def _show(self) -> Iterator[T]:
        outermost = not _displays
        if outermost:
            _displays.append(_display())
            _displays[0].start()
        display = _displays[0]
        task = display.add_task(self._description, total=self._total, text=self._text)
        self._task = (display, task)
        try:
            done = 0
            for item in self._iterable:
                yield item
                done += 1
                display.update(task, completed=done)
            display.update(task, total=done)  # known by now, if not before
        finally:
            self._task = None
            if outermost:
                _displays.clear()
                display.stop()
            else:
                display.remove_task(task)


def progress(
    iterable: Iterable[T],
    *,
    description: str = "",
    total: int | None = None,
    show: bool | None = None,
) -> Progress[T]:
    """Show a progress bar on stderr while iterating.

    The bar shows the description, the count and the time left. An inner loop shows its
    bar below and removes it at its end.

    Args:
      iterable: the items to iterate over.
      description: the text before the bar.
      total: the number of items; None takes `len(iterable)`, and without a length the
        bar only shows that work goes on.
      show: True or False; None shows it when stderr is a terminal or a notebook, unless
        the environment variable JAXSPARSE_PROGRESS is "0". Hidden, it prints nothing
        and the loop runs over `iterable` itself.

    Returns:
      An iterable of the same items. Its `say(text)` changes a text beside the bar.

    Raises:
      TypeError: what cannot be iterated over, a `total` that is not an integer.
      ValueError: a negative `total`.

    Example:
      >>> import jaxsparse as js
      >>> layers = js.report.progress(["a", "b"], description="prune", show=False)
      >>> for layer in layers:
      ...     layers.say(f"{layer}: error 0.1")
    """
    if not isinstance(iterable, Iterable) and not hasattr(iterable, "__getitem__"):
        raise TypeError(
            f"iterable: expected something to iterate over, got {iterable!r}."
        )
    if total is not None:
        check_positive_int(total, name="total", least=0)
    elif isinstance(iterable, Sized):
        total = len(iterable)
    return Progress(iterable, description, total, _watched() if show is None else show)


def _watched() -> bool:
    if os.environ.get("JAXSPARSE_PROGRESS") == "0":
        return False
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    # In a notebook rich needs ipywidgets, and warns where it is missing.
    in_notebook = Console(stderr=True).is_jupyter
    return in_notebook and importlib.util.find_spec("ipywidgets") is not None


def _display() -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(separator=" of "),
        rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich_progress.TextColumn("{task.fields[text]}", markup=False),
        console=Console(stderr=True),
        # While the bar is up rich prints what goes to stdout on the bar's console, so
        # that it does not tear the bar. Not when stdout is a file: it would be lost.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )
