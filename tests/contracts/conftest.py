import contextlib
import logging
import re

import jax
import pytest


class Compilations:
    def __init__(self):
        self.names: list[str] = []

    def of(self, name: str) -> int:
        return sum(n == name for n in self.names)


@pytest.fixture
def compilations(caplog):
    """Names the jitted functions that XLA compiles within a `with` block."""

    @contextlib.contextmanager
    def counted():
        found = Compilations()
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            yield found
        for record in caplog.records:
            match = re.match(r"Compiling jit\((\w+)\)", record.getMessage())
            if match:
                found.names.append(match[1])

    return counted
