"""What the solvers of one layer check before any work."""

from typing import Any

import jax.numpy as jnp

from jaxsparse import _checks, patterns
from jaxsparse._dtypes import count_dtype
from jaxsparse._typing import Array
from jaxsparse.linalg.gram import (
    GramFactor,
    check_damping,
    check_factored,
    check_gram,
    count_not_finite,
)
from jaxsparse.patterns.earlier_masks import group_size, may_have_lost_more, most_lost
from jaxsparse.patterns.nm import check_removable

LayerPattern = patterns.Unstructured | patterns.NM | patterns.Balanced
"""What a solver of one layer chooses masks of."""


def check_layer(w: Array, gram: Array | GramFactor) -> None:
    """Raises unless a kernel and a gram matrix belong together."""
    shape = jnp.shape(w)
    if len(shape) != 2 or not all(shape):
        raise ValueError(
            f"w must be a matrix [d_out, d_in], got shape {shape}. A flax kernel "
            "[d_in, d_out] is transposed first; for a batch use jax.vmap."
        )
    _checks.check_arrays(w=w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w must be real floating point, got {w.dtype}.")
    if _checks.is_concrete(w):
        bad = count_not_finite(w)  # traced, where w is a constant of a traced function
        if _checks.is_concrete(bad) and bad:
            raise ValueError(f"w: {bad} of {w.size} weights are NaN or Inf.")
    if not isinstance(gram, GramFactor):
        return check_gram(gram, d_in=shape[1])
    if jnp.shape(gram.root) != (shape[1], shape[1]):
        raise ValueError(
            f"The factor is of a gram matrix of shape {jnp.shape(gram.root)}, but w of "
            f"shape {shape} has {shape[1]} inputs."
        )
    return check_factored(gram.failed, gram.damping, what="gram")


def _check_pattern(
    pattern: patterns.Pattern,
    sparsity: Any,
    shape: tuple[int, ...],
    *,
    solver: str,
    tiles: bool,
) -> Any:
    """The sparsity to use, after checks."""
    _checks.check_pattern(patterns.Pattern, pattern)
    kinds = patterns.Unstructured | patterns.NM
    if not isinstance(pattern, kinds | patterns.Balanced if tiles else kinds):
        also = ", js.NM and js.Balanced" if tiles else " and js.NM"
        raise TypeError(
            f"{solver} prunes js.Unstructured{also}, got {pattern}. For other tiles "
            "and channels choose masks with js.patterns.masks, then js.solvers.refit."
        )
    if isinstance(pattern, patterns.Balanced):
        check_tiles(pattern, *shape)
    if not isinstance(pattern, patterns.NM):
        if pattern.scope == "global":
            raise ValueError(
                f"{solver} sees one layer, so {pattern} cannot be obeyed. Divide the "
                "sparsity with js.allocations, and use scope='layer' or 'output'."
            )
        if sparsity is None:
            raise ValueError(
                f"{pattern} needs a sparsity, the fraction of weights to remove."
            )
        _checks.check_sparsity(sparsity)
        return sparsity
    if shape[1] % pattern.of:
        raise ValueError(f"{pattern}: {pattern.of} does not divide d_in = {shape[1]}.")
    if sparsity is None:
        return pattern.sparsity
    _checks.check_sparsity(sparsity)
    check_removable(pattern, sparsity)
    return sparsity


def check_tiles(pattern: patterns.Balanced, d_out: int, d_in: int) -> None:
    """Raises unless tiles fit a matrix."""
    for side, size, name in zip(
        pattern.shape, (d_in, d_out), ("d_in", "d_out"), strict=True
    ):
        if size % side:
            raise ValueError(f"{pattern}: {side} does not divide {name} = {size}.")


def check_mask(mask: Array | None, w: Array) -> None:
    """Raises unless a mask is of bools and of the kernel's shape."""
    if mask is None:
        return
    if getattr(mask, "dtype", None) != jnp.bool_:
        raise TypeError(
            "mask holds bools, True = kept; got "
            f"{getattr(mask, 'dtype', type(mask).__name__)}."
        )
    if jnp.shape(mask) != jnp.shape(w):
        raise ValueError(
            f"mask must have the shape of w, {jnp.shape(w)}; got {jnp.shape(mask)}."
        )


def _check_gone(
    mask: Array | None, w: Array, sparsity: Any, pattern: patterns.Pattern
) -> None:
    """Raises unless a mask is one of the kernel and leaves something to remove."""
    check_mask(mask, w)
    if mask is None or not (
        _checks.is_concrete(mask) and _checks.is_concrete(sparsity)
    ):
        return
    if may_have_lost_more(sparsity, pattern):
        return
    lost, most, size = most_lost(~mask, sparsity, pattern)
    if lost > most:
        raise ValueError(
            f"mask has removed {lost} of a group of {size} weights already, more than "
            f"the {most} that sparsity {float(sparsity):g} removes ({pattern})."
        )


def check_choice(
    w: Array,
    sparsity: Any,
    pattern: patterns.Pattern,
    mask: Any,
    *,
    solver: str,
    tiles: bool = True,
) -> Any:
    """The sparsity to use, after checks of what says which weights go."""
    kind = {"solver": solver, "tiles": tiles}
    sparsity = _check_pattern(pattern, sparsity, w.shape, **kind)
    _check_gone(mask, w, sparsity, pattern)
    return sparsity


def removed_of_group(w: Array, sparsity: Any, pattern: patterns.Pattern) -> Array:
    """How many units each group of a layer that compete loses."""
    removed = patterns.removed_count(sparsity, group_size(pattern, w.shape))
    return jnp.asarray(removed, count_dtype(w.size))


def check_dampings(damping: Any, rel_damping: Any) -> None:
    """Raises unless both are numbers of at least 0."""
    if damping is None and rel_damping is None:
        raise TypeError("rel_damping must be a number of at least 0, got None.")
    check_damping(damping, name="damping")
    check_damping(rel_damping, name="rel_damping")
