"""What the solvers of one layer share: their result, their checks, their error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import _checks, patterns
from jaxsparse._sharded import explicit_mesh
from jaxsparse._typing import Array
from jaxsparse.curvature._chunks import in_parts
from jaxsparse.curvature._factor import matmul
from jaxsparse.curvature._gram import (
    GramFactor,
    check_damping,
    check_factored,
    check_gram,
    count_not_finite,
    factor_gram,
)
from jaxsparse.tree import Axes

AXES = Axes(input=(1,), output=(0,))
"""The axes of a matrix `[d_out, d_in]`."""

_PART = 256  # columns of the gram matrix at once


class SolveInfo(NamedTuple):
    """How well a layer was solved; scalars.

    Attributes:
      error: `tr((W' - W) G (W' - W)^T)`, the mean square error of the layer's outputs,
        summed over them; `G` is the gram matrix without damping.
      relative_error: `error / tr(W G W^T)`: 1 is as bad as no layer at all. 0 where
        there is no output.
      damping: what was added to the gram's diagonal (`admm`, `alps`: to that of the
        gram scaled to a diagonal of ones).
      dead: how many inputs are always 0.
      failed: whether a factorisation failed; the weights are NaN then.
    """

    error: Array
    relative_error: Array
    damping: Array
    dead: Array
    failed: Array


class Solved(NamedTuple):
    """A pruned layer.

    Attributes:
      w: `[d_out, d_in]`, of the dtype that was given; what was removed is exactly 0.
      mask: bool, `[d_out, d_in]`, True = kept.
      info: `SolveInfo`.
    """

    w: Array
    mask: Array
    info: SolveInfo


# Before.


def check_layer(w: Array, gram: Array | GramFactor) -> None:
    """Raises unless a kernel and a gram matrix belong together.

    Args:
      w: what should be `[d_out, d_in]`.
      gram: what should be `[d_in, d_in]`, or its factor.

    Raises:
      ValueError: other shapes, NaN or Inf (in eager use).
      TypeError: not floating point.
    """
    shape = jnp.shape(w)
    if len(shape) != 2 or not all(shape):
        raise ValueError(
            f"w must be a matrix [d_out, d_in], got shape {shape}. A flax kernel "
            "[d_in, d_out] is transposed first; for a batch use jax.vmap."
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w must be real floating point, got {w.dtype}.")
    if _checks.is_concrete(w):
        bad = int(count_not_finite(w))
        if bad:
            raise ValueError(f"w: {bad} of {w.size} weights are NaN or Inf.")
    if not isinstance(gram, GramFactor):
        return check_gram(gram, d_in=shape[1])
    if jnp.shape(gram.root) != (shape[1], shape[1]):
        raise ValueError(
            f"The factor is of a gram matrix of shape {jnp.shape(gram.root)}, but w of "
            f"shape {shape} has {shape[1]} inputs."
        )
    return check_factored(gram.failed, gram.damping, what="gram")


def check_pattern(
    pattern: patterns.Pattern, sparsity: Any, d_in: int, *, solver: str
) -> Any:
    """The sparsity to use, after checks.

    Args:
      pattern: `Unstructured` of a layer or an output, or `NM`.
      sparsity: a number, possibly traced, or None for `NM`.
      d_in: the number of inputs.
      solver: what the message calls the solver.

    Returns:
      The sparsity, that of the pattern where none was given.

    Raises:
      ValueError: out of range or missing; a group that does not divide `d_in`; the
        global scope.
      TypeError: another pattern.
    """
    if not isinstance(pattern, patterns.Unstructured | patterns.NM):
        raise TypeError(
            f"{solver} prunes js.Unstructured and js.NM, got {pattern}. For tiles and "
            "channels choose masks with js.patterns.masks, then js.solvers.refit."
        )
    if isinstance(pattern, patterns.Unstructured):
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
    if d_in % pattern.of:
        raise ValueError(f"{pattern}: {pattern.of} does not divide d_in = {d_in}.")
    if sparsity is None:
        return pattern.sparsity
    _checks.check_sparsity(sparsity)
    if _checks.is_concrete(sparsity):
        most = pattern.of - pattern.keep
        if int(patterns.removed_count(sparsity, pattern.of)) > most:
            raise ValueError(
                f"{pattern} removes at most {most} of {pattern.of}, a sparsity of "
                f"{pattern.sparsity:g}; asked for {float(sparsity):g}. Leave the "
                "sparsity out, or choose another pattern."
            )
    return sparsity


def check_mask(mask: Array | None, w: Array) -> None:
    """Raises unless a mask is of bools and of the kernel's shape.

    Args:
      mask: a mask, or None.
      w: the kernel.

    Raises:
      ValueError: another shape.
      TypeError: no bools.
    """
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


def check_gone(mask: Array | None, sparsity: Any, pattern: patterns.Pattern) -> None:
    """Raises where a known mask removes more than is asked for.

    Args:
      mask: what is pruned already, or None.
      sparsity: the fraction to remove.
      pattern: the pattern.

    Raises:
      ValueError: some competing group has lost more than its share.
    """
    if mask is None or not (
        _checks.is_concrete(mask) and _checks.is_concrete(sparsity)
    ):
        return
    gone, size = ~mask, mask.size
    if isinstance(pattern, patterns.NM):
        gone, size = gone.reshape(-1, pattern.of), pattern.of
    elif pattern == patterns.Unstructured("output"):
        size = mask.shape[1]
    else:
        gone = gone.reshape(1, -1)
    most, lost = int(patterns.removed_count(sparsity, size)), int(gone.sum(1).max())
    if lost > most:
        raise ValueError(
            f"mask has removed {lost} of a group of {size} weights already, more than "
            f"the {most} that sparsity {float(sparsity):g} removes ({pattern})."
        )


def compute_type(*arrays: Array) -> Any:
    """float64 where an array is, else float32.

    Args:
      *arrays: floating point.

    Returns:
      A dtype.
    """
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def factor_of(
    w: Array,
    gram: Array | GramFactor,
    damping: float | Array | None,
    rel_damping: float | Array | None,
) -> GramFactor:
    """The factor to use, in the type to compute in; `damping` goes first.

    Args:
      w: the kernel, checked.
      gram: a gram matrix or its factor, checked.
      damping: absolute, or None.
      rel_damping: relative to the mean of the diagonal.

    Returns:
      A factor.

    Raises:
      ValueError: a factor and a damping; a matrix that cannot be factored.
    """
    if isinstance(gram, GramFactor):
        if damping is not None:
            raise ValueError(
                "gram is a factor, whose damping was chosen in js.curvature."
                f"factor_gram; got damping={damping} too. Leave it out."
            )
        dtype = compute_type(w, gram.root)
        cast = lambda x: x.astype(dtype) if x.dtype != jnp.bool_ else x
        return jax.tree.map(cast, gram)
    gram = gram.astype(compute_type(w, gram))
    if damping is not None:
        return factor_gram(gram, damping=damping)
    return factor_gram(gram, rel_damping=rel_damping)


def plain_gram(w: Array, gram: Array | GramFactor) -> Array:
    """The gram matrix without damping, in the type to compute in.

    Args:
      w: the kernel.
      gram: a gram matrix or its factor.

    Returns:
      `[d_in, d_in]`.
    """
    plain = gram.gram if isinstance(gram, GramFactor) else gram
    return plain.astype(compute_type(w, plain))


def given_damping(
    diagonal: Array, damping: float | Array | None, rel_damping: float | Array
) -> Array:
    """What to add to the diagonal, as `factor_gram` says it.

    Args:
      diagonal: of the gram matrix.
      damping: absolute, or None.
      rel_damping: relative to the mean of the diagonal.

    Returns:
      A scalar.
    """
    if damping is not None:
        return jnp.asarray(damping).astype(diagonal.dtype)
    live = jnp.where(diagonal == 0, jnp.ones_like(diagonal), diagonal)
    return jnp.asarray(rel_damping).astype(diagonal.dtype) * jnp.mean(live)


def check_dampings(damping: Any, rel_damping: Any) -> None:
    """Raises unless both are numbers of at least 0.

    Args:
      damping: absolute, or None.
      rel_damping: relative to the mean of the diagonal.
    """
    check_damping(damping, name="damping")
    check_damping(rel_damping, name="rel_damping")


# The error.


def product_before(
    matrix: Array, x: Array, start: Array, size: int, step: int
) -> Array:
    """`matrix[:start, start:start+size]^T @ x[:start]`, in a loop over what is there.

    A product of the full width would do twice the work.

    Args:
      matrix: `[n, n]`.
      x: `[n, m]`.
      start: a multiple of `step`, traced.
      size: how many columns.
      step: a static number.

    Returns:
      `[size, m]`.
    """

    def add(wide: int, first: Any) -> Callable[[Any, Array], Array]:
        def turn(i: Any, total: Array) -> Array:
            at = first + i * wide
            columns = lax.dynamic_slice(matrix, (at, start), (wide, size))
            rows = lax.dynamic_slice_in_dim(x, at, wide, 0)
            return total + matmul(columns.T, rows)

        return turn

    total = jnp.zeros((size, x.shape[1]), x.dtype)
    zero, wide = jnp.zeros_like(start), 4 * step
    full = start // wide
    if wide <= x.shape[0]:
        total = lax.fori_loop(zero, full, add(wide, zero), total)
    rest = (start - full * wide) // step
    return lax.fori_loop(zero, rest, add(step, full * wide), total)


def energy(x: Array, gram: Array) -> Array:
    """`tr(x^T G x)` for `[d_in, d_out]`, by half of the symmetric matrix.

    Args:
      x: weights, transposed.
      gram: symmetric.

    Returns:
      A scalar, at least 0.
    """
    step = min(_PART, x.shape[0])

    def add(start: Any, size: int, total: Array) -> Array:
        start = jnp.asarray(start, jnp.int32)
        own = lax.dynamic_slice_in_dim(x, start, size, 0)
        block = lax.dynamic_slice(gram, (start, start), (size, size))
        before = product_before(gram, x, start, size, step)
        return total + jnp.sum((2 * before + matmul(block, own)) * own, axis=0)

    total = in_parts(x.shape[0], step, add, jnp.zeros(x.shape[1], x.dtype))
    return jnp.maximum(jnp.sum(total), jnp.zeros((), x.dtype))


def solve_info(
    target: Array, gram: Array, *, error: Array, damping: Array, failed: Array
) -> SolveInfo:
    """The info of a result.

    Args:
      target: the dense weights, transposed.
      gram: without damping.
      error: of the result.
      damping: what was added to the diagonal.
      failed: whether a factorisation failed.

    Returns:
      A `SolveInfo`.
    """
    total = energy(target, gram)
    none = total == 0
    share = error / jnp.where(none, jnp.ones_like(total), total)
    relative = jnp.where(none, jnp.zeros_like(share), share)
    dead = jnp.sum(jnp.diagonal(gram) == 0, dtype=jnp.int32)
    return SolveInfo(error, relative, damping, dead, failed)


def finish(
    w: Array, moved: Array, mask: Array, gram: Array, *, damping: Array, failed: Array
) -> Solved:
    """A result from the new weights `[d_out, d_in]`, in the type of the old.

    Kept weights of dead inputs stay what they were: no data says otherwise.

    Args:
      w: the dense weights.
      moved: the new ones, in the type computed in.
      mask: True = kept.
      gram: without damping.
      damping: what was added to the diagonal.
      failed: whether a factorisation failed.

    Returns:
      A `Solved`.
    """
    wide = w.astype(moved.dtype)
    dead = jnp.diagonal(gram) == 0
    moved = jnp.where(dead[None, :], wide, moved)
    moved = jnp.where(failed, jnp.full((), jnp.nan, moved.dtype), moved)
    moved = jnp.where(mask, moved, jnp.zeros((), moved.dtype))
    error = energy((moved - wide).T, gram)
    info = solve_info(wide.T, gram, error=error, damping=damping, failed=failed)
    return Solved(moved.astype(w.dtype), mask, info)


def on_mesh(f: Callable[..., Solved], w: Array, *rest: Any) -> Solved:
    """`f(w, *rest)`, with the sharding of `w` stated where its mesh has explicit axes.

    Args:
      f: a solver.
      w: the kernel.
      *rest: more arguments.

    Returns:
      What `f` returns; weights and mask lie as `w` does.
    """
    mesh = explicit_mesh([w])
    if mesh is None:
        return f(w, *rest)
    lies = jax.typeof(w).sharding
    whole = NamedSharding(mesh, P())
    parts: Any = [whole] * len(SolveInfo._fields)
    shardings = Solved(lies, lies, SolveInfo(*parts))
    automatic: Any = jax.sharding.auto_axes(f, out_sharding=shardings)
    return automatic(w, *rest)


def done(solved: Solved) -> Solved:
    """Raises where a solver is known to have failed.

    Args:
      solved: a result.

    Returns:
      It.

    Raises:
      ValueError: the gram matrix could not be factored.
    """
    check_factored(solved.info.failed, solved.info.damping, what="gram")
    return solved
