"""What the solvers of one layer share: their result, its error, their damping."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxsparse._sharded import with_auto_axes
from jaxsparse._typing import Array
from jaxsparse.linalg.energy import energy
from jaxsparse.linalg.gram import GramFactor, check_factored, factor_gram
from jaxsparse.solvers._arguments import check_dampings
from jaxsparse.tree import Axes

AXES = Axes(input=(1,), output=(0,))
"""The axes of a matrix `[d_out, d_in]`."""


class SolveInfo(NamedTuple):
    """The quality of a solved layer; scalars.

    Attributes:
      error: `tr((W' - W) G (W' - W)^T)`, the mean square error of the layer's outputs,
        summed over them; `G` is the gram matrix without damping. NaN where `G` is all
        0: nothing is known of a layer that never saw an input.
      relative_error: `error / tr(W G W^T)`: 1 is as bad as no layer at all. 0 where
        there is no output, NaN where the error is.
      damping: the number added to the diagonal of the Gram matrix (`admm`, `alps`: of
        the Gram matrix scaled to a diagonal of ones).
      dead: the number of inputs that are always 0.
      failed: whether a factorization failed; the weights are NaN then.
    """

    error: Array
    relative_error: Array
    damping: Array
    dead: Array
    failed: Array


class Solved(NamedTuple):
    """A pruned layer.

    Attributes:
      w: `[d_out, d_in]`, of the dtype that was given; removed weights are exactly 0.
      mask: bool, `[d_out, d_in]`, True = kept.
      info: `SolveInfo`.
    """

    w: Array
    mask: Array
    info: SolveInfo


# The gram matrix.


def compute_type(*arrays: Array) -> Any:
    """float64 where an array is, else float32."""
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def factor_of(
    w: Array,
    gram: Array | GramFactor,
    damping: float | Array | None,
    rel_damping: float | Array | None,
) -> GramFactor:
    """The factor to use, in the type to compute in; `damping` goes first."""
    check_dampings(damping, rel_damping)
    if isinstance(gram, GramFactor):
        check_no_damping(damping)
        dtype = compute_type(w, gram.root)
        cast = lambda x: x.astype(dtype) if x.dtype != jnp.bool_ else x
        return jax.tree.map(cast, gram)
    gram = gram.astype(compute_type(w, gram))
    if damping is not None:
        return factor_gram(gram, damping=damping)
    return factor_gram(gram, rel_damping=rel_damping)


def check_no_damping(damping: float | Array | None) -> None:
    """Raises where a damping comes with a factor, which has its own."""
    if damping is not None:
        raise ValueError(
            "gram is a factor, whose damping was chosen in js.curvature."
            f"factor_gram; got damping={damping} too. Leave it out."
        )


def plain_gram(w: Array, gram: Array | GramFactor) -> Array:
    """The gram matrix without damping, in the type to compute in."""
    plain = gram.gram if isinstance(gram, GramFactor) else gram
    return plain.astype(compute_type(w, plain))


# Inputs that were never seen.


def least_moments(moments: Array) -> Array:
    """Moments of inputs, with next to nothing in place of 0, or 1 if all are 0.

    A score that is a product with them removes weights of dead inputs first, as 0
    would, and among these the smallest.
    """
    most = jnp.max(moments)
    least = jnp.where(most > 0, most * 1e-20, jnp.ones_like(most))
    return jnp.where(moments > 0, moments, least)


def below_zero(w: Array) -> Array:
    """Scores below 0 in the order of `|w|`: for weights that go before all others."""
    return -1 / jnp.maximum(jnp.abs(w), jnp.asarray(1e-37, w.dtype))


# The error.


def solve_info(
    target: Array, gram: Array, *, error: Array, damping: Array, failed: Array
) -> SolveInfo:
    """The info of a result."""
    total = energy(target, gram)
    none = total == 0
    share = error / jnp.where(none, jnp.ones_like(total), total)
    relative = jnp.where(none, jnp.zeros_like(share), share)
    dead = jnp.sum(jnp.diagonal(gram) == 0, dtype=jnp.int32)
    known = lambda x: jnp.where(dead < gram.shape[0], x, jnp.full_like(x, jnp.nan))
    return SolveInfo(known(error), known(relative), damping, dead, failed)


def finish(
    w: Array, moved: Array, mask: Array, gram: Array, *, damping: Array, failed: Array
) -> Solved:
    """A result from the new weights `[d_out, d_in]`, in the type of the old.

    Kept weights of dead inputs stay what they were: no data says otherwise.
    """
    wide = w.astype(moved.dtype)
    dead = jnp.diagonal(gram) == 0
    moved = jnp.where(dead[None, :], wide, moved)
    moved = jnp.where(failed, jnp.full((), jnp.nan, moved.dtype), moved)
    moved = jnp.where(mask, moved, jnp.zeros((), moved.dtype))
    error = energy((moved - wide).T, gram)
    info = solve_info(wide.T, gram, error=error, damping=damping, failed=failed)
    return Solved(moved.astype(w.dtype), mask, info)


def jitted(*static: str) -> Callable[[Callable[..., Any]], Any]:
    """`jax.jit` of `f(w, ...)`: results of the shape of `w` lie as it does."""

    def compiled(f: Callable[..., Any]) -> Any:
        @functools.partial(jax.jit, static_argnames=static)
        @functools.wraps(f)
        def call(w: Array, *rest: Any, **options: Any) -> Any:
            spec = jax.typeof(w).sharding.spec
            lie = lambda result: spec if result.shape == w.shape else P()
            specs = lambda results: jax.tree.map(lie, results)
            return with_auto_axes(functools.partial(f, **options), specs, w, *rest)

        return call

    return compiled


def done(solved: Solved) -> Solved:
    """Raises where a solver is known to have failed."""
    check_factored(solved.info.failed, solved.info.damping, what="gram")
    return solved
