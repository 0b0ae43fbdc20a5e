"""Running a flat program that was changed: for each shape, with its checkpoints."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse.depth._flat_program import Flat, final, used
from jaxsparse.program import Step, Steps


def runnable(
    found: Flat,
    flat: Steps,
    replace: Mapping[int, int],
    left: Mapping[str, Mapping[int, np.ndarray] | None] | None = None,
) -> Callable[..., list[Any]]:
    """A flat program as a function; what does not lead to its results is left out."""
    put = lambda x: final(x, replace) if isinstance(x, int) else x
    taken, _ = used(flat, replace)
    steps = [flat.steps[i] for i in taken]
    steps = [step._replace(ins=tuple(map(put, step.ins))) for step in steps]
    results = tuple(map(put, flat.results))
    items = _items(found, steps, _readers(steps, results), 0)
    at: dict[int, int] = {}
    for step in steps:
        if step.name == "turn":
            at[step.outs[0]] = _row(found, flat, step, left or {})

    def run(*lists: Iterable[Any]) -> list[Any]:
        values = itertools.chain(*lists)
        env = {**flat.constants, **dict(zip(flat.arguments, values, strict=True))}
        _run(items, env, at)
        return [env[x] if isinstance(x, int) else x.val for x in results]

    return run


class _Region(NamedTuple):
    """Steps whose values are computed again in the backward pass."""

    again: Callable[[Callable[..., Any]], Callable[..., Any]]
    items: tuple[Any, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


def _row(found: Flat, flat: Steps, step: Step, left: Mapping[str, Any]) -> int:
    turn = int(flat.constants[step.ins[1]])
    if step.outs[0] not in found.held:
        return turn
    path, at = found.held[step.outs[0]].unit
    rows = (left.get(path) or {}).get(at[-1][0])
    return turn if rows is None else rows.tolist().index(turn)


def _readers(steps: Sequence[Step], results: Sequence[Any]) -> dict[int, int]:
    """How often each variable is read."""
    read = itertools.chain(*(step.ins for step in steps), results)
    return collections.Counter(x for x in read if isinstance(x, int))


def _items(
    found: Flat, steps: Sequence[Step], readers: Mapping[int, int], depth: int
) -> tuple[Any, ...]:
    """Steps, with those of each checkpointed call together."""
    items: list[Any] = []
    for place, part in itertools.groupby(steps, lambda s: _around(found, s, depth)):
        inside = list(part)
        if place is None:
            items += inside
            continue
        address, turns = place
        eqn, mine = found.checkpoints[address], _readers(inside, ())
        made = [x for step in inside for x in step.outs]
        # Within a scan the compiler sees no equal turns; without one it has to be kept
        # from sharing what shall be computed twice.
        prevent_cse = eqn.params["prevent_cse"] or bool(turns)
        options = {"prevent_cse": prevent_cse, "policy": eqn.params["policy"]}
        again = functools.partial(jax.checkpoint, **options)
        ins = tuple(x for x in mine if x not in set(made))
        outs = tuple(x for x in made if readers[x] > mine.get(x, 0))
        items.append(
            _Region(again, _items(found, inside, readers, depth + 1), ins, outs)
        )
    return tuple(items)


def _around(found: Flat, step: Step, depth: int) -> Any:
    """The checkpointed call around a step, of that depth, with the turns around it."""
    before = [step.address[:i] for i in range(1, len(step.address), 2)]
    calls = [address for address in before if address in found.checkpoints]
    if len(calls) <= depth:
        return None
    scans = [a for a in before if a in found.unrolled and len(a) < len(calls[depth])]
    return calls[depth], step.turns[: len(scans)]


def _run(items: Iterable[Any], env: dict[int, Any], at: Mapping[int, int]) -> None:
    rows: dict[int, list[Any]] = {}
    for item in items:
        if isinstance(item, _Region):
            values = item.again(_inside(item, at))(*(env[x] for x in item.ins))
            env.update(zip(item.outs, values, strict=True))
            continue
        ins = [env[x] if isinstance(x, int) else x.val for x in item.ins]
        if item.name == "turn":
            # All at once: the derivative of many slices is as many sums of the whole.
            if item.ins[0] not in rows:
                rows[item.ins[0]] = _unstacked(ins[0])
            outs = [rows[item.ins[0]][at[item.outs[0]]]]
        else:
            outs = item.run(*ins)
        env.update(zip(item.outs, outs, strict=True))


def _inside(region: _Region, at: Mapping[int, int]) -> Callable[..., list[Any]]:
    def run(*values: Any) -> list[Any]:
        env = dict(zip(region.ins, values, strict=True))
        _run(region.items, env, at)
        return [env[x] for x in region.outs]

    return run


def _unstacked(x: Any) -> list[Any]:
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # keys
        return [x[i] for i in range(x.shape[0])]
    parts = lax.split(jnp.asarray(x), [1] * x.shape[0], axis=0)
    return [lax.squeeze(part, [0]) for part in parts]
