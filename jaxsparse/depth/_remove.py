"""Models without some of their residual branches, or with branches that share."""

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import PyTree, Where
from jaxsparse.depth._blocks import Join, ResidualBlock, chosen
from jaxsparse.depth._branches import flat_for
from jaxsparse.depth._flat_program import Flat, Unit, own_units, units_read, without
from jaxsparse.depth._rewrite import runnable
from jaxsparse.narrowing import Narrowed
from jaxsparse.narrowing.retracing import as_sharded, by_shape, model_of
from jaxsparse.program import Steps
from jaxsparse.tracing import Trace
from jaxsparse.tracing.leaves import checked_leaves
from jaxsparse.tree import select


def remove_blocks(
    trace: Trace, params: PyTree, names: Collection[str], *, join: Join = None
) -> Narrowed:
    """Remove residual branches: the program computes x in place of x + f(x).

    Computations that only the branches need are skipped. The result is that of the
    model whose branches are zero (whose output kernels and biases are 0).

    Any pytree keeps its structure: a parameter that nothing reads any more becomes an
    array of shape (0,). A parameter that is stacked for a scan keeps the layers that
    are still read. A scan that loses some layers is run turn by turn; others stay
    scans. Where whole layers are removed (all branches of the same turns), `narrow`
    with the group of the scan's layers (allow=["layer"]) gives a shorter scan, which
    compiles faster.

    Differs from LLM-Drop and ShortGPT, which replace modules of classes they know: here
    the traced program is run without a part, whatever the model.

    Args:
      trace: from `js.trace`, of the whole model.
      params: its parameters: arrays or `jax.ShapeDtypeStruct`s.
      names: the names of blocks, from `residual_blocks`.
      join: as given to `residual_blocks`.

    Returns:
      The smaller parameters, a function that runs them (a pure function, for jit, grad
      and vmap; inputs of other shapes than the example's are traced anew, once for
      each) and the axes that changed with their sizes, 0 for the first axis of a
      parameter that is gone. Prints of the model are left out.

    Raises:
      TypeError: one text instead of names.
      ValueError: a name that no block has, a model without residual branches,
        parameters of another structure or other shapes than those traced.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> layer = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> def apply_fn(params, x):
      ...     for p in params:
      ...         x = x + (x @ p["up"]) @ p["down"]
      ...     return x
      >>> params, x = [layer, layer], jnp.ones((2, 4))
      >>> trace = js.trace(apply_fn, params, x)
      >>> small = js.depth.remove_blocks(trace, params, ["1"])
      >>> [w.shape for w in small.params[1].values()]
      [(0,), (0,)]
      >>> small.apply_fn(small.params, x)[0].tolist()
      [33.0, 33.0, 33.0, 33.0]
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_arrays(abstract=True, params=params)
    chosen(trace, names, join)

    def plan(at: Trace) -> "_Plan":
        gone = chosen(at, names, join).values()
        additions = [a for block in gone for a in block.additions]
        found = flat_for(at, additions)
        return _Plan(found, found.steps, without(found, additions))

    return _smaller(trace, params, plan)


def share_blocks(
    trace: Trace,
    params: PyTree,
    followers: Mapping[str, str],
    *,
    own: Where = None,
    join: Join = None,
) -> Narrowed:
    """Let blocks read the parameters of other blocks.

    A follower's parameters are matched with its leader's in the order in which the
    program reads them. The follower keeps the parameters that `own` selects. Liu et al.
    (FoldGPT, 2024, arXiv:2407.00928) share among adjacent blocks, each with norms of
    its own.

    Args:
      trace: from `js.trace`.
      params: the parameters: arrays or `jax.ShapeDtypeStruct`s.
      followers: by the name of a block the name of its leader, whose parameters it
        reads.
      own: which parameters of a follower it keeps; see `jaxsparse.tree.select`; False
        for none. By default all that are not kernels: scales, biases.
      join: as given to `residual_blocks`.

    Returns:
      As `remove_blocks`; parameters that no block reads any more are removed.

    Raises:
      ValueError: a name that no block has, a leader that follows itself, blocks whose
        parameters do not agree in number and shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = [{"w": jnp.full((2, 2), i)} for i in (1.0, 2.0)]
      >>> def apply_fn(params, x):
      ...     for p in params:
      ...         x = x + x @ p["w"]
      ...     return x
      >>> x = jnp.ones((1, 2))
      >>> trace = js.trace(apply_fn, params, x)
      >>> shared = js.depth.share_blocks(trace, params, {"1": "0"})
      >>> shared.apply_fn(shared.params, x).tolist(), shared.params[1]["w"].shape
      ([[9.0, 9.0]], (0,))
    """
    _checks.check_mapping(str, followers=followers)
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    _checks.check_arrays(abstract=True, params=params)
    chosen(trace, [*followers, *followers.values()], join)
    for name, leader in followers.items():
        if leader in followers:
            raise ValueError(
                f"{name} shall follow {leader}, which itself follows "
                f"{followers[leader]}. Let it follow that one."
            )
    if own is None:
        keeps = {path for path in trace.paths if path not in trace.kernels}
    elif own is False:
        keeps = set()
    else:
        chosen_leaves = jax.tree.leaves(select(params, own))
        keeps = {p for p, keep in zip(trace.paths, chosen_leaves, strict=True) if keep}

    def plan(at: Trace) -> "_Plan":
        known = chosen(at, [*followers, *followers.values()], join)
        found = flat_for(at, [a for b in known.values() for a in b.additions])
        entries = _entries(found)
        replace: dict[int, int] = {}
        for name, leader in followers.items():
            for mine, theirs in _matched(at, found, known[name], known[leader], keeps):
                there = entries[theirs][0]
                replace |= dict.fromkeys(entries[mine], there)
        # A leader may come later than its follower: slices of parameters come first.
        early = lambda step: step.outs[0] not in found.held
        steps = sorted(found.steps.steps, key=early)
        flat = dataclasses.replace(found.steps, steps=tuple(steps))
        return _Plan(found, flat, replace)

    return _smaller(trace, params, plan)


def _matched(
    trace: Trace,
    found: Flat,
    follower: ResidualBlock,
    leader: ResidualBlock,
    keeps: set[str],
) -> list[tuple[Unit, Unit]]:
    shape = lambda unit: tuple(
        d.size
        for axis, d in enumerate(trace.dims[unit.path])
        if axis not in dict(unit.at)
    )
    mine, theirs = (own_units(found, b.additions) for b in (follower, leader))
    if len(mine) != len(theirs):
        raise ValueError(
            f"{follower.name} can not read the parameters of {leader.name}: it has "
            f"{len(mine)} of its own, {leader.name} has {len(theirs)}."
        )
    for a, b in zip(mine, theirs, strict=True):
        if shape(a) != shape(b) and a.path not in keeps:
            raise ValueError(
                f"{follower.name} can not read the parameters of {leader.name}: {a} "
                f"has shape {shape(a)}, {b} has {shape(b)}."
            )
    pairs = zip(mine, theirs, strict=True)
    return [(a, b) for a, b in pairs if a.path not in keeps and a != b]


def _entries(found: Flat) -> dict[Unit, list[int]]:
    """The variables at which each unit comes in."""
    entries: dict[Unit, list[int]] = collections.defaultdict(list)
    turns = [s.outs[0] for s in found.steps.steps if s.name == "turn"]
    for x in (*found.steps.arguments, *turns):
        if x in found.held:
            entries[found.held[x].unit].append(x)
    return entries


class _Plan(NamedTuple):
    """What becomes of a program."""

    found: Flat  # the whole program
    flat: Steps  # its steps, maybe in another order
    replace: Mapping[int, int]  # variables with those that are read in their place


_Left = dict[str, dict[int, np.ndarray] | None]
"""For each parameter that changes the rows that stay by axis; None if it is gone."""


def _smaller(trace: Trace, params: PyTree, plan: Callable[[Trace], _Plan]) -> Narrowed:
    leaves = checked_leaves(trace, params)
    left = _left(trace, plan(trace))
    small = [
        _cut(x, left[path]) if path in left else x
        for path, x in zip(trace.paths, leaves, strict=True)
    ]
    sizes = {
        (path, axis): len(kept)
        for path, rows in left.items()
        for axis, kept in ({0: ()} if rows is None else rows).items()
    }
    shapes = [tuple(x.shape) for x in small]

    def build(at: Trace) -> Callable[..., list[Any]]:
        wanted = plan(at)
        found, left = wanted.found, _left(at, wanted)
        return as_sharded(at, runnable(found, wanted.flat, wanted.replace, left))

    apply_fn = model_of(trace, by_shape(trace, build), shapes, "the smaller model")
    return Narrowed(jax.tree.unflatten(trace.treedef, small), apply_fn, sizes)


def _left(trace: Trace, plan: _Plan) -> _Left:
    after: dict[str, list[Unit]] = collections.defaultdict(list)
    found = dataclasses.replace(plan.found, steps=plan.flat)
    for unit in units_read(found, plan.replace):
        after[unit.path].append(unit)
    before: dict[str, list[Unit]] = collections.defaultdict(list)
    for unit in units_read(plan.found, {}):
        before[unit.path].append(unit)
    left: _Left = {}
    for path, units in before.items():
        if not after[path]:
            left[path] = None
            continue
        rows = {}
        for axis in set.intersection(*({a for a, _ in u.at} for u in units)):
            read, stays = (
                {dict(u.at)[axis] for u in us} for us in (units, after[path])
            )
            if read != stays:
                every = range(trace.dims[path][axis].size)
                rows[axis] = np.array([i for i in every if i not in read - stays])
        if rows:
            left[path] = rows
    return left


def _cut(x: Any, rows: dict[int, np.ndarray] | None) -> Any:
    shape = [0] if rows is None else list(x.shape)
    for axis, kept in (rows or {}).items():
        shape[axis] = len(kept)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    numbers = np if isinstance(x, np.ndarray) else jnp
    if rows is None:
        return numbers.zeros((0,), x.dtype)
    for axis, kept in rows.items():
        x = numbers.take(x, kept, axis=axis)
    return x
