"""The kernels of one stop of a layer-wise run, solved one after another.

At its largest a run holds what is asked for and, besides, what a solver needs for one
kernel. So each kernel is put in its place before the next is solved. A parameter of one
matrix is solved as it lies: the matrix, transposed as solvers want it, is no copy. Into
one of several the solved ones are written, once the run has a copy of its own.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks, patterns, solvers
from jaxsparse._host import on_host
from jaxsparse._typing import Array
from jaxsparse.calibration import InputStats
from jaxsparse.oneshot._effective import energies, scaled, unscaled
from jaxsparse.oneshot._pass import Pass
from jaxsparse.oneshot._places import (
    matrices_at,
    replaced,
    replaced_in_place,
)
from jaxsparse.oneshot._progress import RunState, put
from jaxsparse.oneshot._results import LayerInfo
from jaxsparse.oneshot._stages import Bundle, Unit
from jaxsparse.oneshot._unseen import (
    nan_at,
    never_seen,
    over_places,
    warn_unseen,
    without_data,
)
from jaxsparse.tracing import Kernel
from jaxsparse.tree import MatrixView

Solver = Callable[..., solvers.Solved]


class How(NamedTuple):
    """What all kernels of a run have in common."""

    kernels: Mapping[str, Kernel]
    wanted: Mapping[str, float | None]  # the sparsity of each
    before: Mapping[str, Array]  # masks of what was pruned before
    solver: Solver
    pattern: patterns.Pattern
    dense: bool  # what is never seen stays dense


class _Found(NamedTuple):
    """What is known of the solved matrices of a unit; entries `[places]`."""

    mask: Array  # [places, d_out, d_in]
    info: solvers.SolveInfo
    masked: Array  # the relative error of the mask alone
    kept: Array  # the fraction kept


def solve_bundle(
    bundle: Bundle,
    walk: Pass,
    stats: InputStats,
    evidence: Any,
    state: RunState,
    how: How,
) -> Iterator[tuple[str, LayerInfo]]:
    """Solves the kernels of a bundle and puts them in their places."""
    blind = on_host(never_seen(stats.square))
    for unit in bundle.units:
        leaf, kernel = walk.leaves[unit.path], how.kernels[unit.path]
        leaf = walk.leaves[unit.path] = _own(leaf, unit.path, state, kernel.view)
        jax.block_until_ready((leaf, evidence))
        begin = time.perf_counter()
        plain = unit.path not in walk.scales and not blind.any()
        one = not kernel.view.batch
        solve = _solve_as_it_lies if plain and one else _solve_in_steps
        new, found = solve(unit, leaf, walk.scales, stats, evidence, blind, how)
        jax.block_until_ready((new, found))
        info = LayerInfo(
            error=nan_at(blind, found.info.error),
            relative_error=nan_at(blind, found.info.relative_error),
            masked_error=nan_at(blind, found.masked),
            damping=on_host(found.info.damping),
            dead=on_host(found.info.dead),
            rows=on_host(stats.count),
            sparsity=1 - on_host(found.kept),
            seconds=time.perf_counter() - begin,
        )
        sharding = getattr(leaf, "sharding", None)
        if sharding not in (None, new.sharding):
            # Only where it has to be: what is put somewhere stays there, and what is
            # made with it compiles anew.
            new = jax.device_put(new, sharding)
        walk.leaves[unit.path] = new
        put(state, unit.path, unit.places, found.mask, info, kernel.view)
        del leaf, new, found
        yield unit.path, info


def _own(leaf: Any, path: str, state: RunState, view: MatrixView) -> Any:
    """A parameter that is solved in several turns, as an array to write into.

    What the caller gave is copied once, and not anew in each turn.
    """
    if not _is_written_into(leaf, view) or path in state.masks:
        return leaf
    return jnp.array(leaf, copy=True)


def _is_written_into(leaf: Any, view: MatrixView) -> bool:
    # Of several devices the compiler may want another sharding for the result.
    sharding = getattr(leaf, "sharding", None)
    alone = sharding is None or len(sharding.device_set) == 1
    return bool(view.batch) and alone


def _solve_as_it_lies(
    unit: Unit,
    leaf: Array,
    _: Any,
    stats: InputStats,
    evidence: Any,
    __: np.ndarray,
    how: How,
) -> tuple[Array, _Found]:
    view = how.kernels[unit.path].view
    given = (how.before.get(unit.path), evidence, how.wanted[unit.path], stats.gram)
    new, found = _solve_at(leaf, unit.places, *given, view, how.solver, how.pattern)
    _check(unit, found.info, stats)
    return new, found


def _solve_in_steps(
    unit: Unit,
    leaf: Array,
    scales: Mapping[str, Array],
    stats: InputStats,
    evidence: Any,
    blind: np.ndarray,
    how: How,
) -> tuple[Array, _Found]:
    """Of a stack, and where a kernel is scaled or some of its matrices never seen."""
    view = how.kernels[unit.path].view
    stored = matrices = matrices_at(leaf, unit.places, view)
    scale = scales.get(unit.path)
    if scale is not None:
        scale = matrices_at(scale, unit.places, view)
        matrices = scaled(stored, scale)
    gone = how.before.get(unit.path)
    if gone is not None:
        gone = matrices_at(gone, unit.places, view)
    sparsity = how.wanted[unit.path]
    given = (matrices, gone, evidence, sparsity, stats.gram)
    solved, masked, kept = _solve_places(*given, how.solver, how.pattern)
    _check(unit, solved.info, stats)
    if blind.any():
        warn_unseen(unit, blind, stats, how.dense)
        asked = None if how.dense else sparsity
        found_so = (matrices, gone, blind, solved)
        solved, kept = without_data(*found_so, asked, how.pattern, how.dense)
    if scale is not None:
        solved = unscaled(stored, scale, solved, stats.gram)
    put_in = replaced_in_place if _is_written_into(leaf, view) else replaced
    new = put_in(leaf, unit.places, solved.w, view)
    return new, _Found(solved.mask, solved.info, masked, kept)


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _solve_at(
    leaf, places, before, evidence, sparsity, gram, view, solver, pattern
) -> tuple[Array, _Found]:
    """The parameter with some matrices solved."""
    matrices = matrices_at(leaf, places, view)
    if before is not None:
        before = matrices_at(before, places, view)
    given = (matrices, before, evidence, sparsity, gram)
    solved, masked, kept = _solve_places(*given, solver, pattern)
    new = replaced(leaf, places, solved.w, view)
    return new, _Found(solved.mask, solved.info, masked, kept)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _solve_places(matrices, before, evidence, sparsity, gram, solver, pattern):
    def one(w: Array, mask: Array | None, evidence: Any) -> solvers.Solved:
        told = {} if mask is None else {"mask": mask}
        solved = solver(w, evidence, sparsity, pattern=pattern, **told)
        if not isinstance(solved, solvers.Solved):
            raise TypeError(
                "solver must return js.solvers.Solved(w, mask, info), got "
                f"{_checks.shown(solved)}."
            )
        return solved

    solved = over_places(one, matrices, before, evidence)
    kept = jnp.mean(solved.mask.astype(jnp.float32), axis=(1, 2))
    if gram is None:
        return solved, solved.info.relative_error, kept
    lost = jnp.where(solved.mask, 0, matrices.astype(gram.dtype))
    whole = energies(matrices.astype(gram.dtype), gram)
    return solved, energies(lost, gram) / jnp.where(whole > 0, whole, 1), kept


def _check(unit: Unit, solved: solvers.SolveInfo, stats: InputStats) -> None:
    failed = np.flatnonzero(on_host(solved.failed))
    if len(failed):
        at = "" if not unit.places.any() else f" (batch index {unit.places[failed[0]]})"
        diagonal = on_host(stats.square)[failed[0]]
        rows = float(on_host(stats.count)[failed[0]])
        damping = float(on_host(solved.damping)[failed[0]])
        raise ValueError(
            f"{unit.path}{at}: its gram matrix is not positive definite, from "
            f"{rows:.0f} rows of {diagonal.size} inputs, diagonal {diagonal.min():.3g} "
            f"to {diagonal.max():.3g}, damping {damping:.3g}. More rows help, or a "
            "larger rel_damping: solver=functools.partial(js.solvers.sparsegpt, "
            "rel_damping=0.1)."
        )
