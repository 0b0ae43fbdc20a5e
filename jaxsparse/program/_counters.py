"""Integers that a loop counts: they say which slice of a parameter a turn takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from jaxsparse.program._jaxprs import Address, inner, scan_counts


class Counter(NamedTuple):
    """A scalar `start + step * turn` of a scan; a number where there is no scan.

    Attributes:
      start: its value in the first turn.
      step: what each turn adds.
      turns: how many there are.
      scan: where the scan is.
    """

    start: int
    step: int = 0
    turns: int = 1
    scan: Address | None = None

    @property
    def values(self) -> np.ndarray:
        """In all turns."""
        return self.start + self.step * np.arange(self.turns)


def number(value: Any) -> Counter | None:
    """A literal, where it is one integer or bool."""
    if np.ndim(value) or np.asarray(value).dtype.kind not in "iub":
        return None
    return Counter(int(value))


def carried_counters(
    eqn: Any, carries: Sequence[Counter | None], address: Address
) -> list[Counter | None]:
    """Which of the values that a scan carries count its turns."""
    p, body = eqn.params, inner(eqn)[0].jaxpr
    first, carried = scan_counts(eqn)
    makers = {e.outvars[0]: e for e in body.eqns if e.primitive.name == "add"}
    found: list[Counter | None] = []
    ends = zip(
        carries, body.invars[first : first + carried], body.outvars, strict=False
    )
    for before, own, after in ends:
        step = _step(own, after, makers)
        if before is None or before.step or step is None or p["reverse"]:
            found.append(None)
        else:
            found.append(Counter(before.start, step, p["length"], address))
    return found


def _step(own: Any, after: Any, makers: dict[Any, Any]) -> int | None:
    if after is own:
        return 0
    maker = None if isinstance(after, core.Literal) else makers.get(after)
    if maker is None or own not in maker.invars:
        return None
    rest = [x for x in maker.invars if x is not own]
    known = number(rest[0].val) if rest and isinstance(rest[0], core.Literal) else None
    return None if known is None else known.start


def counted(eqn: Any, ins: Sequence[Counter | None]) -> Counter | None:
    """What is known of an equation's result."""
    name = eqn.primitive.name
    if name == "convert_element_type" and ins[0] is not None:
        return ins[0] if np.dtype(eqn.params["new_dtype"]).kind in "iu" else None
    if name == "select_n":
        which = ins[0]
        return None if which is None or which.step else ins[1 + which.start]
    if len(ins) != 2:
        return None
    a, b = ins
    if a is None or b is None:
        return None
    if name in _TESTS:
        # A bool that is the same in all turns; no other is of use.
        found = np.unique(_TESTS[name](a.values, b.values)) if _alike(a, b) else ()
        return Counter(int(found[0])) if len(found) == 1 else None
    if name not in {"add", "sub", "mul"} or not _alike(a, b):
        return None
    one = a if a.scan is not None else b
    if name == "mul":
        if a.step and b.step:
            return None
        step = a.step * b.start + b.step * a.start
        return one._replace(start=a.start * b.start, step=step)
    sign = 1 if name == "add" else -1
    return one._replace(start=a.start + sign * b.start, step=a.step + sign * b.step)


_TESTS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def _alike(a: Counter, b: Counter) -> bool:
    """Whether they count the same turns, or one is a number."""
    return a.scan is None or b.scan is None or a.scan == b.scan
