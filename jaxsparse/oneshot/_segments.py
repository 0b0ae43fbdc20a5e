"""Runs a flat program piece by piece; equal pieces compile once."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.extend import core

from jaxsparse._compiled import Keyed
from jaxsparse.program import Step, Steps, key_of


class Segment(NamedTuple):
    """A piece of a program."""

    call: Any  # a compiled function of a list of arrays
    ins: tuple[int, ...]  # the numbers of its arguments
    outs: tuple[int, ...]  # the numbers of its results


class Segments:
    """Cuts segments out of a program, and keeps what was compiled."""

    def __init__(self, flat: Steps, compiled: dict[Any, Any]):
        self.flat, self.compiled = flat, compiled
        # For each variable the index of the step that makes it.
        self.producer = {x: i for i, s in enumerate(flat.steps) for x in s.outs}

    def segment(self, wanted: Iterable[int], live: Iterable[int]) -> Segment:
        """What computes some variables from those that are there.

        What depends on parameters alone is never kept: it is computed anew from the
        parameters as they are by then.
        """
        wanted, live = tuple(wanted), set(live)
        taken: set[int] = set()
        ins: list[int] = []
        stack = list(wanted)
        seen: set[int] = set()
        while stack:
            x = stack.pop()
            if x in seen:
                continue
            seen.add(x)
            if x in live or x not in self.producer:
                ins.append(x)
            elif self.producer[x] not in taken:
                taken.add(self.producer[x])
                step = self.flat.steps[self.producer[x]]
                stack.extend(y for y in step.ins if isinstance(y, int))
        steps = [self.flat.steps[i] for i in sorted(taken)]
        arguments = _in_order(steps, ins, wanted)
        key = key_of(steps, arguments, wanted)
        if key not in self.compiled:
            run = _function(steps, arguments, wanted)
            self.compiled[key] = Keyed(run, ("segment", key))
        return Segment(self.compiled[key], arguments, wanted)

    def live_at(self, begin: int, needed: Iterable[int]) -> set[int]:
        """The variables that steps from `begin` on read and earlier steps made."""
        found = set()
        for i in needed:
            if i < begin:
                continue
            for x in self.flat.steps[i].ins:
                if not isinstance(x, int) or x not in self.flat.data:
                    continue
                if self.producer.get(x, -1) < begin:
                    found.add(x)
        return found

    def leading_to(self, steps: Iterable[int]) -> set[int]:
        """The steps that lead to some steps, and these."""
        found, stack = set(), list(steps)
        while stack:
            i = stack.pop()
            if i in found:
                continue
            found.add(i)
            for x in self.flat.steps[i].ins:
                if isinstance(x, int) and x in self.producer:
                    stack.append(self.producer[x])
        return found


def _in_order(
    steps: list[Step], ins: list[int], wanted: tuple[int, ...]
) -> tuple[int, ...]:
    """Arguments as they are first read: the same order for equal pieces."""
    known, order = set(ins), []
    for x in (*(x for step in steps for x in step.ins), *wanted):
        if isinstance(x, int) and x in known:
            known.discard(x)
            order.append(x)
    return tuple(order)


def _function(
    steps: list[Step], arguments: tuple[int, ...], wanted: tuple[int, ...]
) -> Any:
    def run(values: list[Any]) -> list[Any]:
        env = dict(zip(arguments, values, strict=True))
        read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
        for step in steps:
            outs = step.run(*map(read, step.ins))
            env.update(zip(step.outs, outs, strict=True))
        return [env[x] for x in wanted]

    return run
