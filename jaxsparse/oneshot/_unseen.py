"""Matrices of which the calibration data says nothing: experts that no row reached."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import patterns, solvers
from jaxsparse._host import on_host
from jaxsparse._typing import Array
from jaxsparse.calibration import InputStats
from jaxsparse.oneshot._stages import Unit
from jaxsparse.tree import Axes


def over_places(f: Callable[..., Any], *arrays: Any) -> Any:
    """`jax.vmap`, but for a single matrix, for which it compiles more slowly."""
    if jax.tree.leaves(arrays)[0].shape[0] > 1:
        return jax.vmap(f)(*arrays)
    found = f(*jax.tree.map(lambda x: x[0], arrays))
    return jax.tree.map(lambda x: x[None], found)


@jax.jit
def never_seen(square: Array) -> Array:
    """Which matrices have had no inputs, or zeros alone."""
    return jnp.all(square == 0, axis=-1)


@functools.partial(jax.jit, static_argnums=(5, 6))
def without_data(
    matrices: Array,
    before: Array | None,
    blind: Array,
    solved: solvers.Solved,
    sparsity: Any,
    pattern: patterns.Pattern,
    dense: bool,
) -> tuple[solvers.Solved, Array]:
    """Where nothing is known magnitude decides, or nothing goes."""

    def one(w: Array, mask: Array | None) -> Array:
        if dense:
            return jnp.ones(w.shape, bool) if mask is None else mask
        axes = {"w": Axes(input=(1,), output=(0,))}
        options = {"pattern": pattern, "axes": axes, "where": "w"}
        gone = None if mask is None else {"w": mask}
        return patterns.masks({"w": jnp.abs(w)}, sparsity, masks=gone, **options)["w"]

    masks = over_places(one, matrices, before)
    here = blind[:, None, None]
    mask = jnp.where(here, masks, solved.mask)
    plain = jnp.where(masks, matrices, jnp.zeros((), matrices.dtype))
    w = jnp.where(here, plain.astype(solved.w.dtype), solved.w)
    kept = jnp.mean(mask.astype(jnp.float32), axis=(1, 2))
    return solved._replace(w=w, mask=mask), kept


def nan_at(blind: np.ndarray, errors: Array) -> np.ndarray:
    """Errors, NaN where none is known."""
    known = on_host(errors)
    return np.where(blind, np.asarray(np.nan, known.dtype), known)


def warn_unseen(unit: Unit, blind: np.ndarray, stats: InputStats, dense: bool) -> None:
    """Names the matrices of which nothing is known."""
    places = unit.places[blind].tolist()
    at = f" (batch index {', '.join(map(str, places))})" if unit.places.any() else ""
    rows = float(np.max(on_host(stats.count)[blind]))
    why = f"its inputs were 0 in all of {rows:g} rows" if rows else "no row reached it"
    what = "stays dense" if dense else "is pruned by magnitude"
    warnings.warn(
        f"{unit.path}{at}: {why}, so it {what} and its error is not known (NaN). More "
        "calibration data may reach it; see `unseen` of layerwise.",
        stacklevel=4,
    )
