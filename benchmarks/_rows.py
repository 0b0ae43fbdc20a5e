"""Rows of measured quality, in a file that grows from run to run."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from conftest import environment


@dataclasses.dataclass
class Rows:
    """Collects rows of one model and writes them after each, so that none is lost.

    Attributes:
      target: the file. What did not run anew stays in it as it was.
      model: what rows call the model.
      metrics: by name what is measured of parameters.
      key: the fields by which new rows replace those of the file.
      rows: those of this run.
    """

    target: pathlib.Path
    model: str
    metrics: dict[str, Callable[[Any], float]]
    key: tuple[str, ...]
    rows: list[dict] = dataclasses.field(default_factory=list)

    def measure(self, params: Any, what: dict, **about) -> None:
        """Adds a row: what was measured, the metrics, and more about it."""
        found = {name: round(f(params), 4) for name, f in self.metrics.items()}
        self.rows.append({"model": self.model, **what, **found, **about})
        print(self.rows[-1], flush=True)
        self._save()

    def _save(self) -> None:
        old = []
        if self.target.is_file():
            old = json.loads(self.target.read_text())["rows"]
        key = lambda row: tuple(row.get(name) for name in self.key)
        done = set(map(key, self.rows))
        rows = [row for row in old if key(row) not in done] + self.rows
        content = {"environment": environment("cpu"), "rows": rows}
        self.target.parent.mkdir(exist_ok=True)
        aside = self.target.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(aside, self.target)
