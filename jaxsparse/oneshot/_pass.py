"""The one pass over calibration data: where it is, and what it sees there."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._compiled import Keyed
from jaxsparse._host import on_host
from jaxsparse._typing import Array, PyTree
from jaxsparse.calibration import InputStats, RunningStats, finalize, merge
from jaxsparse.calibration.capture import capture_at
from jaxsparse.calibration.first_nan import (
    check_batch,
    finite,
    input_flags,
    not_finite,
)
from jaxsparse.calibration.rows import contribution, flattened, placed, reading_key
from jaxsparse.calibration.weights import batch_weight, weight_of_rows
from jaxsparse.oneshot._effective import NoScale, scales_of
from jaxsparse.oneshot._segments import Segments
from jaxsparse.oneshot._stages import Bundle, ReadSite, Stage, flat_program, stages_of
from jaxsparse.tracing import Kernel, Trace, retrace


class Pass:
    """A model's program over some batches, stopped before a stage.

    Attributes:
      leaves: the parameters by path, as they are by now.
      stages: what is solved, in order.
      scales: by path what a kernel is multiplied by before it is contracted.
    """

    def __init__(
        self,
        trace: Trace,
        kernels: Mapping[str, Kernel],
        params: PyTree,
        batches: list[tuple[Any, ...]],
        *,
        gram: bool,
        host: bool,
        weight: Callable[..., Array] | None = None,
    ):
        self.leaves = dict(zip(trace.paths, jax.tree.leaves(params), strict=True))
        self._paths, self._gram, self._host = trace.paths, gram, host
        self._compiled: dict[Any, Any] = {}
        self._programs: dict[str, tuple[Segments, tuple[Stage, ...], set[int]]] = {}
        self._batches: list[tuple[str, dict[int, Any]]] = []
        self._weights: list[Array | None] = []
        self._traces: dict[str, Trace] = {}
        self._inputs = batches
        for number, inputs in enumerate(batches):
            check_batch(inputs, number)
            inputs = jax.tree.map(jnp.asarray, inputs)
            self._weights.append(batch_weight(weight, inputs, number))
            key = str(jax.tree.map(jax.typeof, inputs))
            if key not in self._programs:
                here = retrace(trace, params, inputs)
                again = {path: here.kernels[path] for path in kernels}
                flat = flat_program(here, again)
                stages = stages_of(flat, again)
                pieces = Segments(flat, self._compiled)
                looks = [k.at for s in stages for b in s.bundles for k in b.looks]
                self._programs[key] = pieces, stages, pieces.leading_to(looks)
                self._traces[key] = here
            flat = self._programs[key][0].flat
            numbers = flat.arguments[len(self._paths) :]
            values = jax.tree.leaves(inputs)
            values = list(map(on_host, values)) if host else values
            self._batches.append((key, dict(zip(numbers, values, strict=True))))
        pieces, self.stages, _ = next(iter(self._programs.values()))
        value = lambda x: self._value(pieces, x, {})
        self.scales = scales_of(pieces, kernels, trace.paths, self.leaves, value)
        self._advance(0)

    def statistics(self, stage: Stage) -> list[InputStats]:
        """What the stage's kernels see."""
        index = next(i for i, s in enumerate(self.stages) if s is stage)
        total: list[RunningStats] | None = None
        for number in range(len(self._batches)):
            found = self._see(number, index)
            if total is None:
                total = found
            else:
                total = [merge(a, b) for a, b in zip(total, found, strict=True)]
        assert total is not None, "there is at least one batch"
        if not np.all(on_host(finite(total))):
            raise self._first_not_finite(index)
        return [finalize(state) for state in total]

    def _first_not_finite(self, index: int) -> ValueError:
        """Which batch it was: each is seen once more."""
        each = (on_host(finite(self._see(n, index))) for n in range(len(self._batches)))
        number, whole = next((n, w) for n, w in enumerate(each) if not np.all(w))
        name = self.stages[index].bundles[int(np.argmin(whole))].name
        flags = input_flags(self._inputs[number])
        return not_finite(name, number, flags, self._paths, list(self.leaves.values()))

    def advance(self, index: int) -> None:
        """Runs the program, with the parameters as they are, to the next stage."""
        if index + 1 < len(self.stages):
            self._advance(index + 1)

    def all_statistics(self) -> list[list[InputStats]]:
        """What all stages see when nothing is changed."""
        found = []
        for index, stage in enumerate(self.stages):
            found.append(self.statistics(stage))
            self.advance(index)
        return found

    def _advance(self, index: int) -> None:
        for number, (key, live) in enumerate(self._batches):
            pieces, stages, needed = self._programs[key]
            wanted = pieces.live_at(stages[index].begin, needed)
            live = self._run(pieces, wanted, live)
            if self._host:
                live = jax.tree.map(on_host, live)
            self._batches[number] = key, live

    def _run(
        self, pieces: Segments, wanted: set[int], live: dict[int, Any]
    ) -> dict[int, Any]:
        """Variables that are there, or are computed from those."""
        values = {x: live[x] for x in wanted if x in live}
        missing = sorted(wanted - set(live))
        if missing:
            segment = pieces.segment(missing, live)
            new = segment.call([self._value(pieces, x, live) for x in segment.ins])
            values.update(zip(missing, new, strict=True))
        return values

    def _value(self, pieces: Segments, x: int, live: dict[int, Any]) -> Any:
        if x in live:
            return live[x]
        if x in pieces.flat.constants:
            return pieces.flat.constants[x]
        return self.leaves[self._paths[pieces.flat.arguments.index(x)]]

    def _see(self, number: int, index: int) -> list[RunningStats]:
        stages = self._programs[self._batches[number][0]][1]
        return [self._see_bundle(number, bundle) for bundle in stages[index].bundles]

    def _see_bundle(self, number: int, bundle: Bundle) -> RunningStats:
        key, live = self._batches[number]
        pieces = self._programs[key][0]
        looks = [(look, *_operands(pieces, look)) for look in bundle.looks]
        wanted = {x for _, ins, keep in looks for x in _kept(ins, keep)}
        values = self._run(pieces, wanted, live)
        total = None
        places = np.unique(np.concatenate([look.places for look in bundle.looks]))
        if len(looks) == 1:
            places = bundle.looks[0].places
        for look, ins, keep in looks:
            arrays = [values[x] for x in _kept(ins, keep)]
            part = self._see_step(pieces, look, keep, arrays, number)
            part = placed(part, np.searchsorted(places, look.places), len(places))
            total = part if total is None else merge(total, part)
        assert total is not None, "a bundle has a look"
        return total

    def _see_step(
        self,
        pieces: Segments,
        look: ReadSite,
        keep: list[bool],
        arrays: list[Any],
        number: int,
    ) -> RunningStats:
        step, reading = pieces.flat.steps[look.at], look.reading
        weight, sample = self._weights[number], None
        if weight is not None:
            here = self._traces[self._batches[number][0]]
            sample = weight_of_rows(here, reading, weight)
        rest = [
            v.aval if isinstance(x, int) else x.val
            for x, v in zip(step.ins, step.eqn.invars, strict=True)
        ]
        fixed = [r for r, k in zip(rest, keep, strict=True) if not k]
        key = (
            "see",
            step.name,
            step.text,
            str(fixed),
            None if sample is None else sample.tobytes(),
            self._gram,
            reading_key(reading, len(step.address)),
        )
        if key not in self._compiled:
            see = _seeing(step, reading, rest, keep, sample, self._gram)
            self._compiled[key] = Keyed(see, key)
        return self._compiled[key](arrays, weight)


def solvable_pass(
    trace: Trace,
    kernels: Mapping[str, Kernel],
    params: PyTree,
    batches: list[tuple[Any, ...]],
    left_out: dict[str, str] | None,
    **options: Any,
) -> Pass:
    """A pass over the kernels of which it is known what acts."""
    while True:
        try:
            return Pass(trace, kernels, params, batches, **options)
        except NoScale as error:
            if left_out is None or len(kernels) == 1:
                raise
            left_out[error.path] = str(error)
            kernels = {p: k for p, k in kernels.items() if p != error.path}


def _operands(pieces: Segments, look: ReadSite) -> tuple[tuple[Any, ...], list[bool]]:
    """A step's operands, and which of them its statistics need.

    A contraction needs its inputs alone; a loop needs everything.
    """
    step, site = pieces.flat.steps[look.at], look.reading.site
    direct = step.address == site.address
    ragged = site.by_groups
    needed = lambda i: not direct or i == site.other or (ragged and i == 2)
    keep = [isinstance(x, int) and needed(i) for i, x in enumerate(step.ins)]
    return step.ins, keep


def _kept(ins: tuple[Any, ...], keep: list[bool]) -> list[int]:
    return [x for x, k in zip(ins, keep, strict=True) if k]


def _seeing(
    step: Any,
    reading: Any,
    rest: list[Any],
    keep: list[bool],
    sample: np.ndarray | None,
    gram: bool,
) -> Callable[..., RunningStats]:
    """A function from a step's operands to the statistics of one kernel's inputs."""

    def see(arrays: list[Array], weight: Array | None) -> RunningStats:
        given = iter(arrays)
        operands = [next(given) if k else v for v, k in zip(rest, keep, strict=True)]
        look = lambda address, eqn, ops: {
            "": contribution(reading, eqn, ops, gram=gram, sample=sample, weight=weight)
        }
        site = reading.site.address
        if step.address == site:
            found = look(site, step.eqn, operands)[""]
        else:
            scans = {site: reading.scans}
            _, all_found = capture_at(step.eqn, operands, step.address, look, scans)
            found = all_found[site][""]
        return flattened(found)

    return see
