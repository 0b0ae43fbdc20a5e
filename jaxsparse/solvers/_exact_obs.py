"""Greedy OBS for each row: one weight after another, the rest adjusted every time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array
from jaxsparse.linalg.chunks import over_blocks, scratch_bytes
from jaxsparse.linalg.gram import GramFactor, damped_inverse
from jaxsparse.ranking.threshold import top_k_masks
from jaxsparse.solvers import _arguments, _solved
from jaxsparse.solvers._refit import least_squares
from jaxsparse.solvers._solved import Solved


def exact_obs(
    w: Array,
    gram: Array | GramFactor,
    sparsity: float | Array | None = None,
    *,
    pattern: patterns.Unstructured | patterns.NM = patterns.Unstructured(),
    mask: Array | None = None,
    rel_damping: float | Array = 0.01,
    damping: float | Array | None = None,
    chunk: int | None = None,
) -> Solved:
    """Prune each row one weight at a time, as Optimal Brain Surgeon would.

    With `C = (G + damping I)^-1` for each row: remove the weight with the smallest
    `w_j^2 / C_jj`, change the others by `-C_:j w_j / C_jj`, and take the input out of
    `C`: `C -= C_:j C_j: / C_jj`. Frantar & Alistarh (2022, ExactOBS of "Optimal Brain
    Compression", arXiv:2208.11580).

    - `scope="layer"`: each row removes all of its weights in turn, and the cheapest
    steps of the layer are taken. The cost of a step is the largest cost in its row so
    far. Between equal costs the earlier step goes first, then the
      higher row.
    - `scope="output"`: each row loses the same number. - `NM`: a group that has lost
    enough is left alone.

    The weights are the least-squares solution on the kept weights, to which the steps
    lead.

    Cost: `d_in` passes over `d_out` matrices `[d_in, d_in]`: for layers of up to a
    thousand inputs. Memory: `chunk d_in^2`.

    Differs from the reference implementation, which cuts at a loss. There the count is
    not exact, and a row's later, cheaper step can count for an earlier one.

    Args:
      w: `[d_out, d_in]`, for outputs `x @ w.T`. Batches by `jax.vmap`.
      gram: `X^T X / n`, `[d_in, d_in]`, or what `js.curvature.factor_gram` made of it.
      sparsity: the fraction to remove, in [0, 1), possibly traced; for `NM` it may be
        left out.
      pattern: `Unstructured("layer" or "output")`, or `NM`.
      mask: the mask of earlier pruning; True = kept. Its removed weights stay removed
        and count toward the sparsity.
      rel_damping: the damping relative to the mean diagonal of the Gram matrix. Not
        used for a factor.
      damping: an absolute damping instead.
      chunk: how many rows are solved at once; by default as many as fit in a cache.

    Returns:
      The weights, mask and info. Weights of dead inputs are the first to go, the
      smallest of them first; those that are kept do not change.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf, a sparsity or a group size out of
        range, a mask that has already removed more than requested, a gram matrix that
        is not positive definite (in eager use; under jit see `info.failed`).
      TypeError: other patterns, types that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> w = jnp.array([[1.0, 2.0, 3.0]])
      >>> gram = jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])    # two equal inputs
      >>> js.solvers.exact_obs(w, gram, 0.34, damping=1e-4).w.round(2).tolist()
      [[0.0, 3.0, 3.0]]
    """
    _arguments.check_layer(w, gram)
    kind: Any = {"solver": "exact_obs", "tiles": False}
    asked = _arguments.check_choice(w, sparsity, pattern, mask, **kind)
    if chunk is not None:
        _checks.check_positive_int(chunk, name="chunk")
    factor = _solved.factor_of(w, gram, damping, rel_damping)
    removed = _arguments.removed_of_group(w, asked, pattern)
    options: Any = {"pattern": pattern, "chunk": chunk}
    return _solved.done(_solve(w, factor, removed, mask, **options))


@_solved.jitted("pattern", "chunk")
def _solve(
    w: Array,
    factor: GramFactor,
    removed: Array,
    before: Array | None,
    *,
    pattern: patterns.Pattern,
    chunk: int | None,
) -> Solved:
    gram = factor.gram
    target = w.astype(factor.root.dtype)
    live = jnp.where(factor.dead[None, :], jnp.zeros_like(target), target)
    whole = (damped_inverse(factor), removed, factor.dead)
    if before is None:
        before = jnp.ones(w.shape, bool)
    mask = _masks(target, before, whole, pattern, chunk) & before
    extra = jnp.where(factor.dead, jnp.ones_like(factor.damping), 0) + factor.damping
    moved = least_squares(live, mask, gram + jnp.diag(extra))
    return _solved.finish(
        w, moved, mask, gram, damping=factor.damping, failed=factor.failed
    )


def _masks(
    w: Array,
    before: Array,
    whole: tuple[Array, Array, Array],
    pattern: patterns.Pattern,
    chunk: int | None,
) -> Array:
    d_out, d_in = w.shape
    size = d_in**2 if chunk is None else max(1, scratch_bytes() // (8 * chunk))
    by_layer = pattern == patterns.Unstructured("layer")
    group = pattern.of if isinstance(pattern, patterns.NM) else d_in
    most = pattern.of - pattern.keep if isinstance(pattern, patterns.NM) else d_in
    taking = functools.partial(_take_apart, group=group)
    removal = jax.vmap(taking, (0, 0, *[None] * 3))

    def rows(
        w: Array, before: Array, inverse: Array, removed: Array, dead: Array
    ) -> Any:
        count = jnp.asarray(d_in, removed.dtype) if by_layer else removed
        return removal(w, before, inverse, jnp.minimum(count, most), dead)

    taken = over_blocks(rows, (d_out,), size, w, before, whole=whole)
    if not by_layer:
        return taken.kept
    # Of steps as dear as each other those at the end of a row are kept first.
    order = jnp.argsort(taken.order, axis=1)
    dearest = lax.cummax(jnp.take_along_axis(taken.loss, order, axis=1), axis=1)
    (kept,) = top_k_masks([dearest[:, ::-1]], w.size - whole[1])
    return jnp.take_along_axis(kept[:, ::-1], taken.order, axis=1)


class _Taken(NamedTuple):
    """What a row loses, by column."""

    kept: Array
    loss: Array  # of the step that removed it
    order: Array  # the number of that step


class _State(NamedTuple):
    w: Array
    inverse: Array
    taken: _Taken


def _take_apart(
    w: Array, before: Array, inverse: Array, count: Array, dead: Array, *, group: int
) -> _Taken:
    """Removes `count` weights of each group of a row, one after another.

    What was gone before goes first, and all of it.

    An input that is taken out leaves zeros in the inverse, which no later step changes.
    A dead one has zeros there from the start, and costs less than any other.
    """
    d_in = w.shape[0]
    far = jnp.full((), jnp.inf, w.dtype)
    gone = jnp.sum(~before.reshape(-1, group), axis=1, dtype=count.dtype)
    goes = jnp.maximum(count, gone)

    def step(i: Array, state: _State) -> _State:
        w, inverse, (kept, loss, order) = state
        diagonal = jnp.diagonal(inverse)
        lost = jnp.sum(~kept.reshape(-1, group), axis=1, dtype=count.dtype)
        free = kept & jnp.repeat(lost < goes, group)
        cost = w * w / jnp.where(kept, diagonal, 1)
        cost = jnp.where(dead, _solved.below_zero(w), cost)
        cost = jnp.where(before, cost, -far)
        cost = jnp.where(free, cost, far)
        j = jnp.argmin(cost)
        here = (jnp.arange(d_in) == j) & free
        column, pivot = inverse[j], diagonal[j]
        scaled = jnp.where(jnp.any(here), column / pivot, jnp.zeros_like(column))
        w = jnp.where(kept & ~here, w - scaled * w[j], jnp.where(here, 0, w))
        inverse = inverse - scaled[:, None] * column[None, :]
        gone = here[:, None] | here[None, :]
        inverse = jnp.where(gone, jnp.zeros_like(inverse), inverse)
        pick = lambda new, old: jnp.where(here, new, old)
        taken = _Taken(kept & ~here, pick(cost[j], loss), pick(i, order))
        return _State(w, inverse, taken)

    none = _Taken(
        jnp.ones(d_in, bool),
        jnp.zeros(d_in, w.dtype),
        jnp.zeros(d_in, jnp.int32),
    )
    steps = jnp.sum(goes).astype(jnp.int32)
    return lax.fori_loop(0, steps, step, _State(w, inverse, none)).taken
