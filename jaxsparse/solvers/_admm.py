"""Alternating directions: weights and their sparse copies pull at each other."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array
from jaxsparse.linalg.factor import matmul
from jaxsparse.linalg.gram import GramFactor, damped_inverse, factor_gram
from jaxsparse.solvers import _arguments, _solved
from jaxsparse.solvers._arguments import LayerPattern
from jaxsparse.solvers._refit import conjugate_gradients
from jaxsparse.solvers._solved import Solved

_CHECKED = 3  # iterations between two looks at the support


def admm(
    w: Array,
    gram: Array | GramFactor,
    sparsity: float | Array | None = None,
    *,
    pattern: LayerPattern = patterns.Unstructured(),
    mask: Array | None = None,
    rho: float = 1.0,
    iterations: int = 20,
    mask_iterations: int = 15,
    rel_damping: float | Array = 0.1,
) -> Solved:
    """Prune a layer by ADMM: no loop over columns, only products of matrices.

    In inputs scaled so that the gram matrix has a diagonal of ones, `H = G + damping
    I`: `Z <- (W + U) * mask`, `U <- U + W - Z`, `W <- (H W_0 + rho (Z - U)) (H + rho
    I)^-1`, and in the first iterations the mask keeps the largest entries of `W + U`.
    Boza (2024, "Fast and Effective Weight Update for Pruned Large Language Models",
    arXiv:2401.02938).

    Differs from the reference implementation: counts are exact, groups are of any size,
    and there is no schedule of the sparsity (in the reference it affects only masks by
    output).

    Args:
      w: `[d_out, d_in]`, for outputs `x @ w.T`. Batches by `jax.vmap`.
      gram: `X^T X / n`, `[d_in, d_in]`; of a factor the undamped matrix is taken.
      sparsity: the fraction to remove, in [0, 1), possibly traced; for `NM` it may be
        left out.
      pattern: `Unstructured("layer" or "output")`, `NM` or `Balanced`.
      mask: the mask of earlier pruning; True = kept. Removed weights stay removed and
        count toward the sparsity.
      rho: the penalty, relative to a diagonal of ones.
      iterations: the number of iterations.
      mask_iterations: the number of first iterations that may change the mask.
      rel_damping: the number added to the diagonal of ones.

    Returns:
      The weights, mask and info. Weights of dead inputs are the first to go, the
      smallest of them first; those that are kept do not change.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf, options out of range, a mask that
        has already removed more than requested.
      TypeError: other patterns, types that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> w = jnp.array([[1.0, 2.0, 3.0]])
      >>> gram = jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])    # two equal inputs
      >>> js.solvers.admm(w, gram, 0.34, rel_damping=0.01).mask.tolist()
      [[False, True, True]]
    """
    _arguments.check_layer(w, gram)
    sparsity = _arguments.check_choice(w, sparsity, pattern, mask, solver="admm")
    _check_numbers(rel_damping, rho)
    _checks.check_positive_int(iterations, name="iterations")
    _checks.check_positive_int(mask_iterations, name="mask_iterations")
    given = (w, _solved.plain_gram(w, gram), sparsity, mask, rho, rel_damping)
    steps = (iterations, min(iterations, mask_iterations))
    return _solved.done(_admm(*given, pattern=pattern, steps=steps))


def alps(
    w: Array,
    gram: Array | GramFactor,
    sparsity: float | Array | None = None,
    *,
    pattern: LayerPattern = patterns.Unstructured(),
    mask: Array | None = None,
    rho: float = 0.1,
    iterations: int = 300,
    refit_iterations: int = 10,
    rel_damping: float | Array = 0.01,
) -> Solved:
    """Prune a layer by ADMM with a growing penalty, then refit the kept weights.

    It works as `admm`, but `rho` starts small and grows, by 1.3 while more than a tenth
    of the kept weights changed in three iterations, by 1.2 while more than one in 200
    did, else by 1.1, until no mask changes any more. One eigendecomposition serves
    every `rho`. Then conjugate gradients find the weights for this mask. It leaves the
    smallest error of the solvers here. Meng et al. (2024, ALPS, arXiv:2406.07831).

    Differs from the reference implementation: counts are exact and hold for every
    pattern.

    Args:
      w: `[d_out, d_in]`, for outputs `x @ w.T`. Batches by `jax.vmap`.
      gram: `X^T X / n`, `[d_in, d_in]`; of a factor the undamped matrix is taken.
      sparsity: the fraction to remove, in [0, 1), possibly traced; for `NM` it may be
        left out.
      pattern: `Unstructured("layer" or "output")`, `NM` or `Balanced`.
      mask: the mask of earlier pruning; True = kept. Removed weights stay removed and
        count toward the sparsity.
      rho: the first penalty, relative to a diagonal of ones.
      iterations: the largest number of iterations.
      refit_iterations: the number of iterations of conjugate gradients.
      rel_damping: the number added to the diagonal of ones.

    Returns:
      The weights, mask and info. Weights of dead inputs are the first to go, the
      smallest of them first; those that are kept do not change.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf, options out of range, a mask that
        has already removed more than requested.
      TypeError: other patterns, types that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> w = jnp.array([[1.0, 2.0, 3.0]])
      >>> gram = jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])    # two equal inputs
      >>> js.solvers.alps(w, gram, 0.34).mask.tolist()
      [[False, True, True]]
    """
    _arguments.check_layer(w, gram)
    sparsity = _arguments.check_choice(w, sparsity, pattern, mask, solver="alps")
    _check_numbers(rel_damping, rho)
    _checks.check_positive_int(iterations, name="iterations")
    _checks.check_positive_int(refit_iterations, name="refit_iterations")
    given = (w, _solved.plain_gram(w, gram), sparsity, mask, rho, rel_damping)
    steps = (iterations, refit_iterations)
    return _solved.done(_alps(*given, pattern=pattern, steps=steps))


def _check_numbers(rel_damping: Any, rho: Any) -> None:
    _arguments.check_dampings(None, rel_damping)
    _checks.check_number(above=0, rho=rho)


class _Scaled(NamedTuple):
    """A layer in inputs whose second moments are 1, and how its masks are chosen."""

    target: Array  # W sqrt(diag G), 0 for dead inputs
    gram: Array  # a diagonal of ones and the damping
    scale: Array  # [1, d_in]
    choose: Callable[[Array], Array]


def _rescale(w: Array, gram: Array, added: Array, **options: Any) -> _Scaled:
    diagonal = jnp.diagonal(gram)
    scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal)))
    scaled = gram / scale[:, None] / scale[None, :]
    dead = jnp.where(diagonal > 0, jnp.zeros_like(diagonal), jnp.ones_like(diagonal))
    wide = w.astype(gram.dtype)
    target = wide * (scale * (1 - dead))[None, :]
    unused = (diagonal == 0, _solved.below_zero(wide))
    choose = functools.partial(_choose, unused=unused, **options)
    return _Scaled(target, scaled + jnp.diag(dead + added), scale[None, :], choose)


@_solved.jitted("pattern", "steps")
def _admm(w, gram, sparsity, before, rho, rel_damping, *, pattern, steps) -> Solved:
    rho, added = (jnp.asarray(x).astype(gram.dtype) for x in (rho, rel_damping))
    options = {"sparsity": sparsity, "before": before, "pattern": pattern}
    target, scaled, scale, choose = _rescale(w, gram, added, **options)
    factor = factor_gram(scaled, damping=rho)
    inverse = damped_inverse(factor)
    wanted = matmul(target, scaled)

    def step(i: Any, state: Any) -> Any:
        w, u, mask = state
        pulled = w + u
        if i is None:
            mask = choose(pulled)
        z = jnp.where(mask, pulled, jnp.zeros_like(pulled))
        u = pulled - z
        return matmul(wanted + rho * (z - u), inverse), u, mask

    state = (target, jnp.zeros_like(target), jnp.ones(target.shape, bool))
    iterations, choosing = steps
    state = lax.fori_loop(0, choosing, lambda _, s: step(None, s), state)
    w_new, u, mask = lax.fori_loop(0, iterations - choosing, step, state)
    return _solved.finish(
        w, (w_new + u) / scale, mask, gram, damping=added, failed=factor.failed
    )


class _Alternating(NamedTuple):
    w: Array
    sparse: Array
    dual: Array
    mask: Array
    rho: Array
    turn: Array
    settled: Array


@_solved.jitted("pattern", "steps")
def _alps(w, gram, sparsity, before, rho, rel_damping, *, pattern, steps) -> Solved:
    rho, added = (jnp.asarray(x).astype(gram.dtype) for x in (rho, rel_damping))
    options = {"sparsity": sparsity, "before": before, "pattern": pattern}
    target, scaled, scale, choose = _rescale(w, gram, added, **options)
    values, vectors = jnp.linalg.eigh(scaled, symmetrize_input=False)
    iterations, refits = steps

    def step(_, state: _Alternating) -> _Alternating:
        _, sparse, dual, _, rho, turn, settled = state
        # What W differs from W_0 by: (H W_0 + rho Z - U) (H + rho I)^-1 would round
        # the whole of W each time, and near a tie that decides which weight is kept.
        pull = rho * (sparse - target) - dual
        pull = matmul(pull, vectors) / (values + rho)[None, :]
        w = target + matmul(pull, vectors.T)
        free = w + dual / rho
        mask = choose(free)
        sparse = jnp.where(mask, free, jnp.zeros_like(free))
        dual = dual + rho * (w - sparse)
        return _Alternating(w, sparse, dual, mask, rho, turn + 1, settled)

    def round_(state: _Alternating) -> _Alternating:
        new = lax.fori_loop(0, _CHECKED, step, state)
        changed = jnp.sum(new.mask != state.mask, dtype=jnp.float32)
        kept = jnp.sum(new.mask, dtype=jnp.float32)
        share = changed / jnp.maximum(kept, 1)
        grow = jnp.where(share >= 0.1, 1.3, jnp.where(share >= 0.005, 1.2, 1.1))
        return new._replace(
            rho=state.rho * grow.astype(state.rho.dtype), settled=changed == 0
        )

    first = choose(target)
    start = _Alternating(
        target,
        target,
        jnp.zeros_like(target),
        first,
        rho,
        jnp.zeros((), jnp.int32),
        jnp.zeros((), bool),
    )
    going = lambda state: (state.turn < iterations) & ~state.settled
    end = lax.while_loop(going, round_, start)
    moved = conjugate_gradients(target, end.mask, scaled, end.sparse, refits)
    failed = ~jnp.all(jnp.isfinite(values))
    return _solved.finish(
        w, moved / scale, end.mask, gram, damping=added, failed=failed
    )


def _choose(
    w: Array,
    *,
    unused: tuple[Array, Array],
    sparsity: Any,
    before: Array | None,
    pattern: patterns.Pattern,
) -> Array:
    """The mask of what is largest; of dead inputs the smallest weights go first."""
    dead, below = unused
    size = jnp.abs(w)
    if isinstance(pattern, patterns.Balanced):
        # The nearest matrix with tiles of zeros keeps those of the largest squares. A
        # tile is dead if all of its inputs are.
        side = pattern.shape[0]
        size = jnp.where(dead[None, :], jnp.zeros_like(w), w * w)
        dead = jnp.repeat(dead.reshape(-1, side).all(1), side)
    score = jnp.where(dead[None, :], below, size)
    options = {"pattern": pattern, "axes": _solved.AXES, "masks": before}
    return patterns.masks(score, sparsity, **options)
