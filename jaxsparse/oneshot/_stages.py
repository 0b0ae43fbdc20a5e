"""In which order kernels are solved: the stages of a sequential pass."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxsparse.program import Step, Steps, called, flatten
from jaxsparse.program import equations as all_equations
from jaxsparse.tracing import Kernel
from jaxsparse.tracing.kernels import Reading

Address = tuple[int, ...]


class ReadSite(NamedTuple):
    """A step that reads a kernel."""

    at: int  # the step's index
    reading: Reading  # how it reads the kernel
    # Which of the kernel's flat batch indices it reads, in its own order
    places: np.ndarray


class Unit(NamedTuple):
    """Some matrices of one kernel, which are solved at once."""

    path: str
    places: np.ndarray  # which of its flat batch indices


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """Kernels with the same inputs: they share statistics and a factor."""

    looks: tuple[ReadSite, ...]  # where to see the inputs
    units: tuple[Unit, ...]  # what is to be solved; all have the same number of places

    @property
    def name(self) -> str:
        """The path of the first kernel, with its place among several."""
        path, places = self.units[0]
        return path if not places.any() else f"{path}[{int(places[0])}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What is solved before the program goes on."""

    begin: int  # the first step that reads one of its kernels
    bundles: tuple[Bundle, ...]  # what is to be solved


def flat_program(trace: Any, kernels: Mapping[str, Kernel]) -> Steps:
    """The program with its calls inlined and scans over layers unrolled."""
    equations = dict(all_equations(trace.program))
    sites = [r.site.address for k in kernels.values() for r in k.readings]
    wanted = sorted(
        {s for k in kernels.values() for r in k.readings for s in r.scans}, key=len
    )
    unroll: set[Address] = set()
    for scan in wanted:
        # Within a loop that stays one, a scan stays one too.
        around = [scan[:i] for i in range(1, len(scan), 2)]
        if all(a in unroll or called(equations[a]) is not None for a in around):
            unroll.add(scan)
    enter = {
        a[:i]
        for a in (*sites, *unroll)
        for i in range(1, len(a), 2)
        if called(equations[a[:i]]) is not None
    }
    return flatten(trace.program, len(trace.paths), unroll, enter)


def stages_of(flat: Steps, kernels: Mapping[str, Kernel]) -> tuple[Stage, ...]:
    """The stages in which kernels are solved, one after another.

    A kernel that is read at several steps (tied weights, the turns of a loop) is solved
    with the inputs of all of them, before the first.
    """
    looks: dict[str, list[ReadSite]] = {path: [] for path in kernels}
    by_address: dict[Address, list[tuple[str, Reading]]] = {}
    for path, kernel in kernels.items():
        for reading in kernel.readings:
            address = reading.site.address
            for i in range(1, len(address) + 1, 2):
                by_address.setdefault(address[:i], []).append((path, reading))
    for at, step in enumerate(flat.steps):
        if step.eqn is None:
            continue
        for path, reading in by_address.get(step.address, ()):
            places = _places(step, reading, flat.unrolled)
            looks[path].append(ReadSite(at, reading, places))
    bundles: dict[Any, tuple[list[ReadSite], list[Unit]]] = {}
    for path, seen in looks.items():
        for group in _apart(seen):
            places = np.unique(np.concatenate([look.places for look in group]))
            key: Any = (path, places.tobytes())
            if len(group) == 1:
                (look,) = group
                places = look.places
                turns = flat.steps[look.at].turns
                reading = look.reading
                key = (reading.site.reads, turns, reading.inputs.tobytes(), len(places))
            entry = bundles.setdefault(key, ([], []))
            entry[1].append(Unit(path, places))
            if not entry[0] or (len(group) == 1 and group[0].at < entry[0][0].at):
                entry[0][:] = group
    ordered = sorted(bundles.values(), key=lambda b: min(look.at for look in b[0]))
    stages: list[list[Any]] = []
    for seen, units in ordered:
        begin, end = min(k.at for k in seen), max(k.at for k in seen)
        bundle = Bundle(tuple(seen), tuple(units))
        if stages and begin <= stages[-1][1]:
            stages[-1][1] = max(stages[-1][1], end)
            stages[-1][2].append(bundle)
        else:
            stages.append([begin, end, [bundle]])
    return tuple(Stage(begin, tuple(found)) for begin, _, found in stages)


def _places(step: Step, reading: Reading, unrolled: Collection[Address]) -> np.ndarray:
    around = [step.address[:i] for i in range(1, len(step.address), 2)]
    turns = dict(zip([a for a in around if a in unrolled], step.turns, strict=True))
    index = tuple(turns[scan] for scan in reading.scans if scan in turns)
    return reading.batch[index].reshape(-1)


def _apart(looks: list[ReadSite]) -> list[list[ReadSite]]:
    """Looks that have a place in common belong together."""
    groups: list[tuple[set[int], list[ReadSite]]] = []
    for look in looks:
        mine = set(look.places.tolist())
        found = [g for g in groups if g[0] & mine]
        for other in found[1:]:
            found[0][0].update(other[0])
            found[0][1].extend(other[1])
            groups.remove(other)
        if found:
            found[0][0].update(mine)
            found[0][1].append(look)
        else:
            groups.append((mine, [look]))
    return [seen for _, seen in groups]
