"""Optimal Brain Surgeon: remove weights, and change the others for the best."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxsparse import _checks, curvature, patterns, scores
from jaxsparse._typing import Array, PyTree, Sparsity, Where
from jaxsparse.tree import AxesRule, leaves_with_paths, map_with_path, select

Update = Literal["joint", "independent", "none"]


def obs(
    params: PyTree,
    fisher: curvature.Fisher,
    sparsity: Sparsity = None,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    masks: PyTree = None,
    update: Update = "joint",
    greedy: bool = False,
    steps: int = 1,
    refresh: Callable[[PyTree, PyTree], curvature.Fisher] | None = None,
) -> patterns.Pruned:
    """Prunes by second-order scores, and updates the weights that remain.

    To second order, at a minimum, removing the weights Q costs `1/2 dw^T F dw`.

    - Scores: `w_q^2 / (2 [F^-1]_qq)` for single weights, channels and N:M, for tiles
      `1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q` (the Fisher matrix has to be made for them:
      `block_fisher(..., pattern=pattern)`). With `greedy`, inside of blocks, one after
      another, as in OBC.
    - Update: `dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q`, the exact one for all that is
      removed from a block (or, with `mfac`, from the whole network) together.
    - With `steps > 1` a part at a time, leaving `(1 - s)^(k / n)` after cut k, and the
      curvature is taken anew in between: by `refresh`, or from the same gradients
      without the weights that are gone.

    Kurtic et al. (2022, oBERT, arXiv:2203.07259), Frantar et al. (2021, M-FAC,
    arXiv:2107.03356), Singh & Alistarh (2020, WoodFisher, arXiv:2004.14340).

    Differs from the reference implementations, which add up the updates for each weight
    (or group of 4) removed alone, `update="independent"`, and then set what should be
    zero to zero: for more than one weight in a block that is not the best, and can be
    worse than no update at all. No epsilon is added to the diagonal.

    Args:
      params: a tree of arrays.
      fisher: from `js.curvature.block_fisher`, `mfac`, `diagonal_fisher` or
        `kronecker_fisher`, made with the same `where`.
      sparsity: the fraction to remove in the end, weights pruned before included; a
        number, or a tree of them. May be left out for `NM`.
      pattern: what lives or dies together, and who competes with whom.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      masks: what was pruned before: it stays 0, and leaves the Fisher matrix.
      update: `"joint"`; `"independent"`, as the papers' code; or `"none"`. A Kronecker
        Fisher matrix has no joint update.
      greedy: whether to choose weights one after another inside of blocks (a
        `BlockFisher`; single weights and N:M).
      steps: in how many cuts.
      refresh: `refresh(params, masks) -> fisher`, called before every cut but the
        first, with fresh gradients of the pruned network.

    Returns:
      The pruned parameters and their masks. What is removed is exactly 0; what takes no
      part stays bit for bit.

    Raises:
      ValueError: a parameter that is selected but not in `fisher`; masks that already
        remove more than asked for; what `jaxsparse.patterns.masks` raises.
      TypeError: an approximation that cannot do what is asked for.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.array([[1.0], [2.0], [3.0]])}
      >>> inputs = jnp.array([[1.0, 1, 0], [2, 2, 0], [0, 0, 1]])   # two equal inputs
      >>> grads = {"kernel": inputs[..., None]}
      >>> fisher = js.curvature.block_fisher(grads, block_size=3, damping=1e-6)
      >>> js.solvers.obs(params, fisher, 0.34).params["kernel"][:, 0].round(4)
      Array([0., 3., 3.], dtype=float32)
    """
    _check(pattern, fisher, update, greedy)
    _checks.check_positive_int(steps, name="steps")
    selected = select(params, where)
    for (path, _), taken in zip(
        leaves_with_paths(params), jax.tree.leaves(selected), strict=True
    ):
        if taken:
            curvature.check_covers(fisher, path)
    if sparsity is None and isinstance(pattern, patterns.NM):
        sparsity = pattern.sparsity
    if masks is None:
        start = 0.0
        masks = jax.tree.map(lambda w: jnp.ones((), bool), params)
    else:
        patterns.check_masks(masks, params)
        params = patterns.apply(params, masks)
        start = _removed_before(params, masks, selected, pattern)
        if not isinstance(fisher, curvature.KroneckerFisher):
            fisher = curvature.restrict(fisher, masks)
    targets = [_after(start, sparsity, k / steps) for k in range(1, steps + 1)]
    for k, target in enumerate(targets):
        if k:
            fisher = fisher if refresh is None else refresh(params, masks)
            if not isinstance(fisher, curvature.KroneckerFisher):
                fisher = curvature.restrict(fisher, masks)
        params, masks = _cut(
            params, fisher, masks, target, pattern, where, axes, update, greedy
        )
    return patterns.Pruned(params, masks)


def _check(pattern, fisher, update, greedy) -> None:
    if update not in get_args(Update):
        raise ValueError(f"update must be one of {get_args(Update)}, got {update!r}.")
    blocks = isinstance(fisher, curvature.BlockFisher)
    if greedy and not (
        blocks and isinstance(pattern, patterns.Unstructured | patterns.NM)
    ):
        raise TypeError(
            "greedy=True works inside the blocks of js.curvature.block_fisher, for "
            f"js.Unstructured and js.NM; got {type(fisher).__name__} and {pattern}."
        )
    if not blocks:
        return
    unit = {
        patterns.Block: lambda p: p.shape[0] * p.shape[1],
        patterns.NM: lambda p: p.of,
    }
    whole = unit.get(type(pattern), lambda p: 1)(pattern)
    together = isinstance(pattern, patterns.Block) or greedy
    for layout in fisher.layouts:
        if together and layout.unit != whole:
            raise ValueError(
                f"{layout.path}: {pattern} has units of {whole} weights, the Fisher "
                f"matrix was made for units of {layout.unit}. Make it with "
                f"block_fisher(..., pattern={pattern})."
            )


def _cut(
    params, fisher, masks, sparsity, pattern, where, axes, update, greedy
) -> tuple[PyTree, PyTree]:
    """One cut: scores, masks, update."""
    scored, directions = _score(params, fisher, masks, pattern, where, greedy)
    scored = jax.tree.map(_sink, scored, masks)
    new = patterns.masks(scored, sparsity, pattern=pattern, where=where, axes=axes)
    new = jax.tree.map(lambda n, old: n & old, new, masks)
    if update == "none":
        return patterns.apply(params, new), new
    full = lambda mask, w: jnp.broadcast_to(mask, w.shape)
    kept = jax.tree.map(full, new, params)
    removed = jax.tree.map(lambda k, old: ~k & old, kept, masks)
    if update == "joint":
        change = curvature.eliminate(fisher, params, removed, kept=kept)
    else:
        pick = lambda y, q: jnp.where(q, y, jnp.zeros((), y.dtype))
        alone = map_with_path(_pair(directions, pick), removed)
        change = curvature.ihvp(fisher, alone)
        change = jax.tree.map(jnp.negative, change)
    return _apply(params, kept, change), new


def _score(params, fisher, masks, pattern, where, greedy) -> tuple[PyTree, PyTree]:
    """Scores, and for each unit the `y` for which `-F^-1 y` removes it alone."""
    if isinstance(fisher, curvature.BlockFisher) and isinstance(
        pattern, patterns.Block
    ):
        rho, y = curvature.group_scores(fisher, params)
        return _fill(rho, params), y
    diagonal = curvature.inverse_diagonal(fisher)
    found = dict(leaves_with_paths(diagonal))
    alone = map_with_path(
        lambda path, w: (
            w.astype(found[path].dtype) / found[path] if path in found else None
        ),
        params,
    )
    if greedy:
        most = pattern.of - pattern.keep if isinstance(pattern, patterns.NM) else None
        found = curvature.greedy_scores(fisher, params, masks=masks, most=most)
        return _fill(found, params), alone
    wide = jax.tree.map(_widen, params)
    return scores.obs(wide, diagonal, where=where), alone


def _widen(w: Array) -> Array:
    low = jnp.issubdtype(w.dtype, jnp.floating) and w.dtype.itemsize < 4
    return w.astype(jnp.float32) if low else w


def _fill(tree: PyTree, params: PyTree) -> PyTree:
    """Scores in the structure of `params`, zeros for what has none."""
    found = dict(leaves_with_paths(tree))
    zeros = lambda w: jnp.zeros_like(w, dtype=jnp.float32)
    pick = lambda path, w: found[path] if path in found else zeros(w)
    return map_with_path(pick, params)


def _pair(tree: PyTree, f: Callable[..., Any]) -> Callable[..., Any]:
    found = dict(leaves_with_paths(tree))
    return lambda path, x: f(found[path], x) if path in found else None


def _sink(score: Array, mask: Array) -> Array:
    """What is removed already comes last, whatever its new score."""
    if not jnp.issubdtype(score.dtype, jnp.floating):
        return score
    return jnp.where(mask, score, jnp.full((), -jnp.inf, score.dtype))


def _apply(params: PyTree, kept: PyTree, change: PyTree) -> PyTree:
    found = dict(leaves_with_paths(change))

    def one(path: str, w: Array, keep: Array) -> Array:
        if path not in found:
            return w
        moved = (w.astype(found[path].dtype) + found[path]).astype(w.dtype)
        return jnp.where(keep, moved, jnp.zeros((), w.dtype))

    return map_with_path(one, params, kept)


def _after(start: Any, sparsity: Sparsity, progress: float) -> Any:
    """From the sparsity at the start to the last one, by equal factors of density."""
    if progress == 1 or sparsity is None:
        return sparsity
    if not isinstance(start, float) and jax.tree_util.all_leaves([sparsity]):
        sparsity = jax.tree.map(lambda _: sparsity, start)
    if isinstance(start, float):
        start = jax.tree.map(lambda _: start, sparsity)
    between = lambda s0, s: 1 - (1 - s0) * ((1 - s) / (1 - s0)) ** progress
    return jax.tree.map(between, start, sparsity)


def _removed_before(params, masks, selected, pattern) -> Any:
    """The sparsity of each parameter, or in the global scope of all together."""
    count = lambda w, mask, taken: (
        (w.size - int(patterns.kept_count(mask, w.shape)), w.size) if taken else (0, 1)
    )
    counts = jax.tree.map(count, params, masks, selected)
    pair = lambda x: isinstance(x, tuple)
    if getattr(pattern, "scope", "layer") != "global":
        return jax.tree.map(lambda c: c[0] / c[1], counts, is_leaf=pair)
    gone, size = zip(
        *(
            c
            for c, taken in zip(
                jax.tree.leaves(counts, is_leaf=pair),
                jax.tree.leaves(selected),
                strict=True,
            )
            if taken
        ),
        strict=True,
    )
    return sum(gone) / sum(size)
