"""What a run shows and saves with, brought when it is asked for.

`report` and `checkpoint` stand above this package, which imports neither: a run is
given two things that look as they do, and knows no more of them than stands here.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol


class Bar(Protocol):
    """Stages that are counted where one sees it."""

    @property
    def shown(self) -> bool: ...

    def __iter__(self) -> Iterator[Any]: ...

    def say(self, text: str) -> None: ...


class Reports(Protocol):
    """What shows how a run goes."""

    def progress(
        self, iterable: Sequence[Any], *, description: str, show: bool | None
    ) -> Bar: ...

    def layer_table(
        self, info: Mapping[str, Any], *, left_dense: Mapping[str, str]
    ) -> str: ...

    def mean_of_known(self, errors: Any) -> float: ...


class Store(Protocol):
    """What keeps a run."""

    def save(self, directory: Any, **state: Any) -> Any: ...

    def restore(self, directory: Any, *, params: Any) -> Any: ...


def reports() -> Reports:
    """The package's own; it brings rich, which not every program needs."""
    found: Any = importlib.import_module("jaxsparse.report")
    return found


def store() -> Store:
    """The package's own; it brings orbax."""
    found: Any = importlib.import_module("jaxsparse.checkpoint")
    return found
