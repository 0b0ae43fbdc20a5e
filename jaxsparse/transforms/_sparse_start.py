"""A model that is sparse before its schedule begins: zeros are held, and it is said.

Masks that keep everything would let a pruned model grow dense again until the schedule
first chooses masks, and nothing would be wrong in any mask.
"""

import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import patterns
from jaxsparse._checks import is_concrete
from jaxsparse._together import each
from jaxsparse._typing import Array, Cadence, PyTree, Sparsity
from jaxsparse._zeros import nonzero
from jaxsparse.schedules import At, Every
from jaxsparse.schedules.horizon import evaluate
from jaxsparse.tree import leaves_with_paths

Zeros = Literal["hold", "train"]

_FEW = 0.01  # of exact zeros; fewer are chance, as 16 bits have them
_FAR = 10_000  # steps to look ahead for the first choice of a cadence of any kind


def masks_of_zeros(masks: PyTree, params: PyTree) -> PyTree:
    """Masks that hold the exact zeros of a model that is pruned already.

    A kernel of zeros alone was not pruned: layers are begun so. Nor was a model with
    less than one zero in a hundred weights.
    """
    sparse = _is_sparse(masks, params)
    if is_concrete(sparse) and not sparse:
        return masks
    return _of_zeros(masks, params, sparse)


@jax.jit
def _is_sparse(masks: PyTree, params: PyTree) -> Array:
    kept = [_kept(mask, w) for mask, w in _pairs(masks, params)]
    zeros = sum((1 - jnp.mean(k, dtype=jnp.float32)) * k.size for k in kept)
    size = sum(k.size for k in kept)
    return jnp.asarray(zeros > _FEW * size)


@jax.jit
def _of_zeros(masks: PyTree, params: PyTree, sparse: Array) -> PyTree:
    def one(mask: Array, w: Array) -> Array:
        return _kept(mask, w) | ~sparse if jnp.ndim(mask) else mask

    return jax.tree.map(one, masks, params)


def _pairs(masks: PyTree, params: PyTree) -> list[tuple[Array, Array]]:
    """Masks of parameters that take part, and these."""
    both = zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True)
    return [(mask, w) for mask, w in both if jnp.ndim(mask)]


def _kept(mask: Array, w: Array) -> Array:
    along = tuple(
        a for a, (m, n) in enumerate(zip(mask.shape, w.shape, strict=True)) if m < n
    )
    kept = jnp.any(nonzero(w), axis=along, keepdims=True)
    return kept | ~jnp.any(kept)


def warn_of_zeros(masks: PyTree) -> None:
    """Says which zeros are held, where there are any."""
    named = [(path, m) for path, m in leaves_with_paths(masks) if jnp.ndim(m)]
    if not all(is_concrete(m) for _, m in named):
        return
    removed = jax.device_get(each(_removed, [m for _, m in named]))
    counts = {path: int(n) for (path, _), n in zip(named, removed, strict=True)}
    found = [f"{path}: {n:,}" for path, n in counts.items() if n]
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        warnings.warn(
            f"The parameters are sparse already ({', '.join(found[:4])}{more} exact "
            "zeros). They are held at zero until the schedule chooses masks. If they "
            "are to be trained, as those of an identity are, pass "
            "prune_schedule(..., zeros='train').",
            stacklevel=4,
        )


def _removed(mask: Array) -> Array:
    return mask.size - jnp.sum(mask)


def warn_of_regrowth(
    masks: PyTree, params: PyTree, sparsity: Sparsity, cadence: Cadence, step: int
) -> None:
    """Warns where the schedule's first masks keep more than those that are there."""
    first = first_choice(cadence, step)
    pairs = _pairs(masks, params)
    if first is None or not pairs or not all(is_concrete(m) for m, _ in pairs):
        return
    reached = patterns.sparsity_of(masks, params)
    with jax.ensure_compile_time_eval():
        asked = evaluate(sparsity, first)
    if asked is None:  # N:M has its own
        return
    if jax.tree_util.all_leaves([asked]):
        asked = jax.tree.map(lambda _: asked, reached)
    sizes = [
        w.size if jnp.ndim(m) else 0
        for m, w in zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True)
    ]
    mean = lambda tree: float(
        np.average([float(s) for s in jax.tree.leaves(tree)], weights=sizes)
    )
    there, then = mean(reached), mean(asked)
    if then < there - _FEW:
        warnings.warn(
            f"The model is {there:.1%} sparse, and the schedule asks for {then:.1%} "
            f"when it first chooses masks, at step {first}: weights will come back. "
            f"Let it begin where the model is, for instance "
            f"js.schedules.polynomial(init={there:.2f}, ...).",
            stacklevel=4,
        )


def first_choice(cadence: Cadence, step: int) -> int | None:
    """The first step from here on in which masks change; None if that is far off."""
    match cadence:
        case Every(interval, begin, end):
            first = begin + max(0, -(-(step - begin) // interval)) * interval
            return first if end is None or first <= end else None
        case At(steps):
            return min((s for s in steps if s >= step), default=None)
    with jax.ensure_compile_time_eval():
        steps: Any = range(step, step + _FAR)
        return next((t for t in steps if bool(cadence(t))), None)
