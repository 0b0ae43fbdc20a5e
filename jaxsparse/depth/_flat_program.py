"""A flat program of a model: what it reads, and what it does without some branches.

It is a list of steps with the scans over layers unrolled, so that each residual branch
is added in a step of its own.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxsparse.program import Address, Steps
from jaxsparse.tracing import Trace


class Addition(NamedTuple):
    """Where a branch is added to the stream."""

    address: Address  # of the equation in the traced program
    turns: tuple[int, ...]  # of the scans over layers around it
    stream: int  # which of its two operands is the stream; the other is the branch


class Unit(NamedTuple):
    """A parameter, or the slice of it that some turns of scans are handed."""

    path: str
    # Pairs of one of its axes and the index there; () for the whole parameter
    at: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        turns = ",".join(str(i) for _, i in self.at)
        return f"{self.path}[{turns}]" if turns else self.path


class Held(NamedTuple):
    """A variable that is a parameter, or a slice, cast or transpose of one."""

    unit: Unit  # what it holds
    axes: tuple[int, ...]  # which of the parameter's axes its own are


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A flat program and what was found in it."""

    steps: Steps  # the program, scans over layers unrolled
    held: Mapping[int, Held]  # the variables that hold parameters
    unrolled: frozenset[Address]  # the scans that were unrolled
    calls: frozenset[Address]  # the calls that were inlined
    # The calls whose values are computed again in the backward pass
    checkpoints: Mapping[Address, Any]
    # Of residual branches, each with the index of its step, in order
    additions: Mapping[Addition, int]
    # For a value of a stream the one that it was before a branch was added, or before
    # it was scaled or cast
    before: Mapping[int, int]


def used(flat: Steps, replace: Mapping[int, int]) -> tuple[list[int], set[int]]:
    """What a program computes and reads, with some variables in place of others."""
    read = {final(x, replace) for x in flat.results if isinstance(x, int)}
    steps = []
    for i in range(len(flat.steps) - 1, -1, -1):
        step = flat.steps[i]
        if not read.isdisjoint(step.outs):
            steps.append(i)
            read.update(final(x, replace) for x in step.ins if isinstance(x, int))
    return steps[::-1], read


def final(x: int, replace: Mapping[int, int]) -> int:
    """What is read in place of a variable."""
    while x in replace:
        x = replace[x]
    return x


def without(found: Flat, additions: Collection[Addition]) -> dict[int, int]:
    """For the results of some additions the stream to be read in their place."""
    steps = [(found.steps.steps[found.additions[a]], a.stream) for a in additions]
    return {step.outs[0]: step.ins[stream] for step, stream in steps}


def units_read(found: Flat, replace: Mapping[int, int]) -> dict[Unit, None]:
    """The parameters and slices that a program reads, in the order it does."""
    steps, _ = used(found.steps, replace)
    units: dict[Unit, None] = {}

    def look(x: Any) -> None:
        x = final(x, replace) if isinstance(x, int) else x
        if x in found.held:
            units[found.held[x].unit] = None

    for i in steps:
        step = found.steps.steps[i]
        if step.outs[0] not in found.held:  # else it hands a parameter on
            for x in step.ins:
                if isinstance(x, int):
                    look(x)
    for x in found.steps.results:
        if isinstance(x, int):
            look(x)
    return units


def own_units(found: Flat, additions: Collection[Addition]) -> list[Unit]:
    """What nothing reads any more without some branches."""
    left = units_read(found, without(found, additions))
    return [unit for unit in units_read(found, {}) if unit not in left]


def unit_size(trace: Trace, unit: Unit) -> int:
    """How many numbers a unit has."""
    shape = [d.size for d in trace.dims[unit.path]]
    return math.prod(shape) // math.prod(shape[axis] for axis, _ in unit.at)
