"""Eager work on many arrays in few programs.

Without jit each operation on each shape is a program of its own, which takes longer to
compile than to run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax


def each(f: Callable[..., Any], *lists: Sequence[Any]) -> list[Any]:
    """`[f(*xs) for xs in zip(*lists)]`, in one program for all on one device.

    What is traced, or lies on several devices, goes through `f` by itself.
    """
    rows = list(zip(*lists, strict=True))
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_device(row) or i, []).append(i)
    found: list[Any] = [None] * len(rows)
    for group in groups.values():
        if len(group) == 1:
            found[group[0]] = f(*rows[group[0]])
            continue
        results = _each(f, [rows[i] for i in group])
        for i, result in zip(group, results, strict=True):
            found[i] = result
    return found


@functools.partial(jax.jit, static_argnums=0)
def _each(f: Callable[..., Any], rows: list[tuple[Any, ...]]) -> list[Any]:
    return [f(*row) for row in rows]


def _device(row: Sequence[Any]) -> jax.Device | None:
    """The one device on which concrete arrays lie."""
    if not all(isinstance(x, jax.Array) for x in row):
        return None
    if any(isinstance(x, jax.core.Tracer) for x in row):
        return None
    devices = {d for x in row for d in x.devices()}
    return devices.pop() if len(devices) == 1 else None
