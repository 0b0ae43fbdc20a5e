"""Optimal Brain Surgeon: remove weights, and change the others for the best."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxsparse import _checks, curvature, patterns, scores
from jaxsparse._typing import Array, PyTree, Sparsity, Where
from jaxsparse.curvature import dispatch
from jaxsparse.curvature.layout import block_layout
from jaxsparse.patterns.earlier_masks import gone_before, targets
from jaxsparse.patterns.selection import check_further, choose
from jaxsparse.tree import (
    Axes,
    AxesRule,
    by_rules,
    leaves_with_paths,
    like,
    map_with_path,
    resolve_axes,
    select,
)

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
    """Prune by second-order scores, and update the weights that remain.

    At a minimum, to second order, removing the weights Q increases the loss by `1/2
    dw^T F dw`.

    - Scores: `w_q^2 / (2 [F^-1]_qq)` for single weights, channels and N:M, for tiles
      `1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q` (the Fisher matrix has to be made for them:
      `block_fisher(..., pattern=pattern)`). With `greedy` it chooses weights one after
      another within each block, as in OBC.
    - Update: `dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q`, the exact update for all weights
      that a block (with `mfac`: the whole network) loses together.
    - With `steps > 1` it prunes in several cuts, and each leaves the same fraction of
      the weights: `(1 - s)^(k / n)` of a dense network after cut k. Between cuts
      `refresh` computes the curvature anew; without it the same gradients are used,
      without the removed weights.

    Kurtic et al. (2022, oBERT, arXiv:2203.07259), Frantar et al. (2021, M-FAC,
    arXiv:2107.03356), Singh & Alistarh (2020, WoodFisher, arXiv:2004.14340).

    Differs from the reference implementations, which add up the updates for each weight
    (or group of 4) removed alone, `update="independent"`, and then set what should be
    zero to zero: for more than one weight in a block that update is not the best one,
    and can be worse than none. No epsilon is added to the diagonal. M-FAC's pruner
    takes the removed weights out before it cuts the rest into blocks; here blocks stay
    where they are, and have rows of zeros.

    Args:
      params: a tree of arrays.
      fisher: from `js.curvature.block_fisher`, `mfac`, `diagonal_fisher` or
        `kronecker_fisher`, made with the same `where`.
      sparsity: the total fraction to remove, including weights pruned before. A number,
        a tree of numbers, or a mapping from paths or regular expressions; the first
        that matches counts, and parameters that none matches stay dense. May be left
        out for `NM`.
      pattern: which weights are removed together, and which compete.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      masks: the masks of earlier pruning. Pruned weights stay 0 and leave the Fisher
        matrix; see `jaxsparse.patterns.masks`.
      update: `"joint"`; `"independent"`, as the papers' code; or `"none"`. A Kronecker
        Fisher matrix has no joint update.
      greedy: whether to choose weights one after another within each block (a
        `BlockFisher`; single weights and N:M).
      steps: the number of cuts.
      refresh: `refresh(params, masks) -> fisher`, called before every cut but the
        first, with fresh gradients of the pruned network. A Kronecker Fisher matrix
        needs it, because it cannot be restricted.

    Returns:
      The pruned parameters and their masks. Removed weights are exactly 0; parameters
      that take no part stay bit for bit.

    Raises:
      ValueError: a parameter that is selected but not in `fisher`, or has other units
        there; masks that already remove more than asked for (in eager use; under jit
        that stays removed); or as for `jaxsparse.patterns.masks`.
      TypeError: an approximation that does not support the request.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"kernel": jnp.array([[1.0], [2.0], [3.0]])}
      >>> inputs = jnp.array([[1.0, 1, 0], [2, 2, 0], [0, 0, 1]])   # two equal inputs
      >>> grads = {"kernel": inputs[..., None]}
      >>> fisher = js.curvature.block_fisher(grads, block_size=3, damping=1e-6)
      >>> js.solvers.obs(params, fisher, 0.34).params["kernel"][:, 0].round(4)
      Array([0., 3., 3.], dtype=float32)
    """
    _checks.check_arrays(params=params)
    _checks.check_pattern(patterns.Pattern, pattern)
    _checks.check_positive_int(steps, name="steps")
    sparsity, where = by_rules(params, sparsity, where)
    rules = _Rules(pattern, select(params, where), axes, update, greedy)
    # Says what is wrong with the sparsity or the pattern before any work is done.
    jax.eval_shape(lambda w: _choose(w, sparsity, rules), params)
    _check(params, fisher, rules)
    if sparsity is None and isinstance(pattern, patterns.NM):
        sparsity = pattern.sparsity
    gone, own = None, False
    if masks is None:
        masks = jax.tree.map(lambda w: jnp.ones((), bool), params)
    else:
        masks = like(masks, params, name="masks")
        patterns.check_masks(masks, params)
        gone = gone_before(masks, params, pattern, rules.selected, axes)
        options = {"where": rules.selected, "axes": axes, "pattern": pattern}
        check_further(params, masks, sparsity, **options)
        params = patterns.apply(params, masks)
        fisher, own = _without(fisher, masks), True
    cuts = targets(gone, sparsity, steps, pattern, rules.selected)
    for k, target in enumerate(cuts):
        if k and refresh is not None:
            fisher, own = refresh(params, masks), False
            _check(params, fisher, rules)
        if k:
            fisher, own = _without(fisher, masks, donate=own), True
        params, masks = _cut(params, fisher, masks, target, rules)
    return patterns.Pruned(params, masks)


class _Rules(NamedTuple):
    """What is the same in every cut."""

    pattern: patterns.Pattern
    selected: PyTree
    axes: AxesRule
    update: Update
    greedy: bool


def _choose(
    scored: PyTree, sparsity: Sparsity, rules: _Rules, masks: PyTree = None
) -> PyTree:
    options = {"where": rules.selected, "axes": rules.axes, "pattern": rules.pattern}
    return choose(scored, sparsity, masks=masks, **options)[0]


def _without(
    fisher: curvature.Fisher, masks: PyTree, *, donate: bool = False
) -> curvature.Fisher:
    if not dispatch.can(dispatch.restrict, fisher):
        return fisher
    return curvature.restrict(fisher, masks, donate=donate)


# One cut.


def _cut(
    params: PyTree,
    fisher: curvature.Fisher,
    masks: PyTree,
    sparsity: Sparsity,
    rules: _Rules,
) -> patterns.Pruned:
    """One parameter after another: what is made for it is gone before the next."""
    parts = curvature.apart(fisher)
    of = lambda tree: dict(leaves_with_paths(tree))
    ws, old, taken = of(params), of(masks), of(rules.selected)
    pick = lambda part, found: {p: found[p] for p in part.paths if p in found}
    losses, alone = {}, {}
    for part in parts:
        rho, y = _each_alone(pick(part, ws), part, rules)
        if rules.greedy:
            most = _most(sparsity, rules.pattern)
            some = {"masks": pick(part, old), "most": most}
            rho = curvature.greedy_scores(part, pick(part, ws), **some)
        losses |= rho
        if rules.update == "independent":
            alone |= y
        del rho, y
    left = _choose(_fill(losses, params), sparsity, rules, masks)
    if rules.update == "none":
        return patterns.Pruned(patterns.apply(params, left), left)
    del losses
    new = of(left)
    for part in parts:
        left_of = pick(part, new)
        removed = {path: ~mask & old[path] for path, mask in left_of.items()}
        if rules.update == "joint":
            # What is not selected may not change, though M-FAC's matrix may hold it.
            kept = {path: mask & taken[path] for path, mask in left_of.items()}
            some = curvature.eliminate(part, pick(part, ws), removed, kept=kept)
        else:
            back = {p: jnp.where(q, -alone[p], 0) for p, q in removed.items()}
            some = curvature.ihvp(part, back)
        change = dict(leaves_with_paths(some))
        del some
        for path in filter(taken.get, part.paths):
            ws[path] = _moved(ws[path], change.pop(path), new[path])
    return patterns.Pruned(map_with_path(lambda path, _: ws[path], params), left)


def _each_alone(
    params: dict[str, Array], fisher: curvature.Fisher, rules: _Rules
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The loss when each unit is removed alone, and `y` so that `-F^-1 y` does that."""
    if _is_tiled(rules) and dispatch.can(dispatch.group_scores, fisher):
        return curvature.group_scores(fisher, params)
    diagonal = dict(leaves_with_paths(curvature.inverse_diagonal(fisher)))
    for path, w in params.items():
        _checks.check_shape(path, w, diagonal[path].shape, name="params", of="fisher")
    losses: Any = {path: _loss(w, diagonal[path]) for path, w in params.items()}
    if rules.update != "independent":
        return losses, {}
    wide = {path: w.astype(diagonal[path].dtype) for path, w in params.items()}
    return losses, {path: w / diagonal[path] for path, w in wide.items()}


@jax.jit
def _loss(w: Array, diagonal: Array) -> Array:
    return scores.obs(w.astype(diagonal.dtype), diagonal, where=True)


def _is_tiled(rules: _Rules) -> bool:
    return isinstance(rules.pattern, patterns.Block | patterns.Balanced)


def _most(sparsity: Sparsity, pattern: patterns.Pattern) -> int | None:
    """How many of an N:M group go at most: as many as this cut removes, if known."""
    if not isinstance(pattern, patterns.NM):
        return None
    most = pattern.of - pattern.keep
    if jax.tree_util.all_leaves([sparsity]):
        count = patterns.removed_count(sparsity, pattern.of)
        most = min(count, most) if isinstance(count, int) else most
    return most


def _fill(found: PyTree, params: PyTree) -> PyTree:
    """Scores in the structure of `params`, zeros for what has none."""
    scored = dict(leaves_with_paths(found))
    pick = lambda path, w: scored.get(path, jnp.zeros(jnp.shape(w), jnp.float32))
    return map_with_path(pick, params)


@jax.jit
def _moved(w: Array, dw: Array, mask: Array) -> Array:
    wide = max(w.dtype, dw.dtype, key=lambda dtype: dtype.itemsize)
    moved = (w.astype(wide) + dw.astype(wide)).astype(w.dtype)
    return jnp.where(mask, moved, jnp.zeros((), w.dtype))


# Errors.


def _check(params: PyTree, fisher: curvature.Fisher, rules: _Rules) -> None:
    if rules.update not in get_args(Update):
        raise ValueError(
            f"update must be one of {get_args(Update)}, got {rules.update!r}."
        )
    if not isinstance(fisher, curvature.Fisher):
        raise TypeError(
            "fisher must be what js.curvature.block_fisher, mfac, diagonal_fisher or "
            f"kronecker_fisher returned, got {type(fisher).__name__}."
        )
    kind, pattern = type(fisher).__name__, rules.pattern
    if rules.update == "joint" and not dispatch.can(dispatch.eliminate, fisher):
        raise TypeError(
            f"A {kind} has no joint update. Pass update='independent' or 'none', or "
            "make a block_fisher or mfac."
        )
    chosen_one_by_one = isinstance(pattern, patterns.Unstructured | patterns.NM)
    in_turn = chosen_one_by_one and dispatch.can(dispatch.greedy_scores, fisher)
    if rules.greedy and not in_turn:
        raise TypeError(
            "greedy=True works inside the blocks of js.curvature.block_fisher, for "
            f"js.Unstructured and js.NM; got a {kind} and {pattern}."
        )
    flags = jax.tree.leaves(rules.selected)
    pairs = zip(leaves_with_paths(params), flags, strict=True)
    selected = [leaf for leaf, taken in pairs if taken]
    for path, _ in selected:
        curvature.check_covers(fisher, path)
    together = _is_tiled(rules) or (rules.greedy and isinstance(pattern, patterns.NM))
    if together and dispatch.can(dispatch.group_scores, fisher):
        _check_units(selected, fisher, rules, resolve_axes(params, rules.axes))


def _check_units(
    selected: list[tuple[str, Any]],
    fisher: Any,
    rules: _Rules,
    stated: dict[str, Axes],
) -> None:
    """Raises unless the weights of each unit are neighbors within a block."""
    layouts = {layout.path: layout for layout in fisher.layouts}
    for path, w in selected:
        layout = layouts[path]
        wanted = block_layout(
            path,
            tuple(w.shape),
            block_size=layout.block_size,
            axes=stated.get(path),
            pattern=rules.pattern,
        )
        same = ("split", "order", "unit")
        if any(getattr(layout, name) != getattr(wanted, name) for name in same):
            raise ValueError(
                f"{path}: the Fisher matrix was made for units of {layout.unit} "
                f"neighbouring weights, {rules.pattern} has others, of {wanted.unit}. "
                f"Make it with block_fisher(..., pattern={rules.pattern}) and the same "
                "axes."
            )
