"""What every approximation of the Fisher matrix can be asked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array, PyTree
from jaxsparse.curvature._block_inverse import (
    block_eliminate,
    block_greedy,
    block_group_solve,
    block_groups,
    block_ihvp,
    restrict_blocks,
)
from jaxsparse.curvature._blocks import BlockFisher
from jaxsparse.curvature._diagonal import DiagonalFisher
from jaxsparse.curvature._kronecker import (
    KroneckerFisher,
    kronecker_diagonal,
    kronecker_ihvp,
)
from jaxsparse.curvature._layout import from_blocks
from jaxsparse.curvature._mfac import (
    MFac,
    mfac_diagonal,
    mfac_eliminate,
    mfac_ihvp,
    restrict_mfac,
)
from jaxsparse.curvature._mfac_blocks import (
    BlockMFac,
    restrict_rows,
    rows_diagonal,
    rows_eliminate,
    rows_ihvp,
)
from jaxsparse.curvature._trees import check_shapes, leaves_at

Fisher = BlockFisher | BlockMFac | DiagonalFisher | KroneckerFisher | MFac


def ihvp(fisher: Fisher, tree: PyTree) -> PyTree:
    """The inverse-Fisher-vector product `F^-1 x`.

    Args:
      fisher: an approximation of the Fisher matrix.
      tree: x, with an array of the parameter's shape for each parameter that takes
        part; others may be there too and are not looked at.

    Returns:
      A tree with the structure of the gradients: None for what takes no part.

    Raises:
      ValueError: a parameter is missing, or of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}    # F = I
      >>> fisher = js.curvature.block_fisher(grads, block_size=2, damping=1.0)
      >>> js.curvature.ihvp(fisher, {"w": jnp.array([2.0, 4.0])})["w"].round(5)
      Array([1., 2.], dtype=float32)
    """
    xs = _arrays(fisher, tree, name="tree")
    match fisher:
        case BlockFisher():
            parts = zip(fisher.roots, xs, fisher.layouts, strict=True)
            products = [block_ihvp(r, x, layout=layout) for r, x, layout in parts]
        case DiagonalFisher():
            parts = zip(fisher.diagonals, xs, strict=True)
            products = [x.astype(d.dtype) / d for d, x in parts]
        case KroneckerFisher():
            parts = zip(fisher.factors, xs, fisher.layouts, strict=True)
            products = [
                kronecker_ihvp(f, x, fisher.damping, layout=layout)
                for f, x, layout in parts
            ]
        case MFac():
            products = mfac_ihvp(fisher, xs)
        case BlockMFac(damping=damping):
            parts = zip(fisher.rows, fisher.roots, xs, fisher.layouts, strict=True)
            products = [
                rows_ihvp(g, r, damping, x, layout=lay) for g, r, x, lay in parts
            ]
    return fisher.treedef.unflatten(products)


def inverse_diagonal(fisher: Fisher) -> PyTree:
    """The diagonal of `F^-1`, positive.

    Args:
      fisher: an approximation of the Fisher matrix.

    Returns:
      A tree with the structure of the gradients, leaves of the parameters' shapes;
      None for what takes no part.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> fisher = js.curvature.mfac({"w": jnp.array([[3.0, 0.0]])}, damping=1.0)
      >>> js.curvature.inverse_diagonal(fisher)
      {'w': Array([0.1, 1. ], dtype=float32)}
    """
    match fisher:
        case BlockFisher():
            parts = zip(fisher.diagonals, fisher.layouts, strict=True)
            diagonals = [from_blocks(d, layout) for d, layout in parts]
        case DiagonalFisher():
            diagonals = [1 / d for d in fisher.diagonals]
        case KroneckerFisher():
            parts = zip(fisher.factors, fisher.layouts, strict=True)
            diagonals = [
                kronecker_diagonal(f, fisher.damping, layout=layout)
                for f, layout in parts
            ]
        case MFac():
            diagonals = mfac_diagonal(fisher)
        case BlockMFac(damping=damping, accurate=accurate):
            parts = zip(fisher.rows, fisher.roots, fisher.layouts, strict=True)
            diagonals = [
                rows_diagonal(g, r, damping, layout=layout, accurate=accurate)
                for g, r, layout in parts
            ]
    return fisher.treedef.unflatten(diagonals)


def inverse_blocks(fisher: BlockFisher, *, size: int | None = None) -> PyTree:
    """The inverse itself, `[F^-1]_QQ` for all groups Q of neighbouring weights.

    Args:
      fisher: what `block_fisher` returned.
      size: the weights of a group, a divisor of the block size: 4 for oBERT's groups.
        None for the whole blocks.

    Returns:
      A tree with the structure of the gradients, leaves `[*lead, block_size // size,
      size, size]` in the order of `fisher.layouts` (a kernel row by row as `[d_out,
      d_in]`); for `size=None` without the axis of length 1. A last block that is
      not full has `1 / damping` on the rest of its diagonal.

    Raises:
      ValueError: `size` does not divide the block size.
      TypeError: another approximation.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}    # F = I
      >>> fisher = js.curvature.block_fisher(grads, block_size=2, damping=1.0)
      >>> js.curvature.inverse_blocks(fisher)["w"].tolist()
      [[[0.5, 0.0], [0.0, 0.5]]]
    """
    if not isinstance(fisher, BlockFisher):
        raise TypeError(
            "inverse_blocks needs js.curvature.block_fisher(...), got "
            f"{type(fisher).__name__}."
        )
    if size is not None:
        _checks.check_positive_int(size, name="size")
    groups = []
    for r, layout in zip(fisher.roots, fisher.layouts, strict=True):
        b = layout.block_size
        if size is not None and b % size:
            raise ValueError(
                f"{layout.path}: groups of {size} weights do not fill blocks of {b}. "
                f"Choose a block_size that {size} divides."
            )
        blocks = block_groups(r, layout=layout, size=size or b)
        groups.append(blocks if size else blocks[..., 0, :, :])
    return fisher.treedef.unflatten(groups)


def group_scores(fisher: BlockFisher, params: PyTree) -> tuple[PyTree, PyTree]:
    """The loss of removing each unit of the pattern on its own.

    `rho_Q = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q` for the units Q for which `fisher` was made
    (`block_fisher(..., pattern=pattern)`), all small systems at once, in float64.
    Kurtic et al. (2022, oBERT, arXiv:2203.07259).

    Args:
      fisher: what `block_fisher` returned.
      params: has an array for each parameter that takes part.

    Returns:
      Two trees with the structure of the gradients and the parameters' shapes: `rho`,
      shared by the weights of a unit; and `([F^-1]_QQ)^-1 w_Q`, whose product with
      `-F^-1` is the change that removes the unit alone.

    Raises:
      TypeError: another approximation.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> pattern = js.Block((2, 1))
      >>> grads = {"w": jnp.array([[[1.0], [1.0]], [[1.0], [-1.0]]])}    # F = I
      >>> fisher = js.curvature.block_fisher(
      ...     grads, block_size=2, damping=1.0, pattern=pattern)
      >>> params = {"w": jnp.array([[1.0], [3.0]])}
      >>> rho, _ = js.curvature.group_scores(fisher, params)   # 1/2 * 2 * (1 + 9)
      >>> rho["w"].round(4)
      Array([[10.],
             [10.]], dtype=float32)
    """
    if not isinstance(fisher, BlockFisher):
        raise TypeError(
            "Units are scored together by a block Fisher matrix, js.curvature."
            f"block_fisher(..., pattern=pattern); got {type(fisher).__name__}."
        )
    ws = _arrays(fisher, params, name="params")
    solved = [
        block_group_solve(r, w, layout=layout, size=layout.unit)
        for r, w, layout in zip(fisher.roots, ws, fisher.layouts, strict=True)
    ]
    rho, y = zip(*solved, strict=True)
    return fisher.treedef.unflatten(rho), fisher.treedef.unflatten(y)


def greedy_scores(
    fisher: BlockFisher,
    params: PyTree,
    *,
    masks: PyTree = None,
    most: int | None = None,
) -> PyTree:
    """The loss at which greedy OBS removes each weight, block by block.

    In each block the weight with the least `w_q^2 / (2 [F^-1]_qq)` goes, the others are
    changed, `F^-1` is reduced by it, and so on until none is left: `ExactOBS` of
    Frantar & Alistarh (2022, OBC, arXiv:2208.11580) on blocks of the Fisher matrix.
    Removing the lowest scores over all blocks, and then `eliminate`, is the result of
    stopping each block in time.

    Cost: `block_size^2` multiply-adds a weight in float64, one after another.

    Args:
      fisher: what `block_fisher` returned, restricted to the kept weights.
      params: has an array for each parameter that takes part.
      masks: what is still there; all by default.
      most: how many weights of each unit of the pattern may go (N:M: `of - keep`).

    Returns:
      A tree with the structure of the gradients: the increase of the loss when the
      weight goes, or the largest so far if that was larger; Inf for what stays.

    Raises:
      TypeError: another approximation.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}    # F = I
      >>> fisher = js.curvature.block_fisher(grads, block_size=2, damping=1.0)
      >>> js.curvature.greedy_scores(fisher, {"w": jnp.array([3.0, 1.0])})["w"].round(4)
      Array([9., 1.], dtype=float32)
    """
    if not isinstance(fisher, BlockFisher):
        raise TypeError(
            "Greedy OBS works in blocks: js.curvature.block_fisher(...); got "
            f"{type(fisher).__name__}."
        )
    ws = _arrays(fisher, params, name="params")
    if masks is None:
        kept = [jnp.ones_like(w, dtype=bool) for w in ws]
    else:
        kept = _masks(fisher, masks)
    scores = [
        block_greedy(r, w, k, layout=layout, most=most)
        for r, w, k, layout in zip(fisher.roots, ws, kept, fisher.layouts, strict=True)
    ]
    return fisher.treedef.unflatten(scores)


def restrict(fisher: Any, masks: PyTree) -> Any:
    """The Fisher matrix of the weights that are kept.

    Rows and columns of pruned weights are taken out of `F` (not of its inverse): what
    is left is the curvature of a network in which they stay 0. Each of them is apart
    from the rest from then on, with `1 / damping` in the inverse.

    Args:
      fisher: an approximation of the Fisher matrix. (`MFac` copies its gradients; in a
        Kronecker form nothing can be taken out: take the gradients with `masks`.)
      masks: a tree of bools with a mask for each parameter that takes part.

    Returns:
      The same kind of approximation.

    Raises:
      ValueError: masks of another model.
      TypeError: a `KroneckerFisher`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> fisher = js.curvature.mfac({"w": jnp.array([[3.0, 1.0]])}, damping=1.0)
      >>> kept = js.curvature.restrict(fisher, {"w": jnp.array([True, False])})
      >>> js.curvature.inverse_diagonal(kept)
      {'w': Array([0.1, 1. ], dtype=float32)}
    """
    full = _masks(fisher, masks)
    match fisher:
        case BlockFisher():
            return restrict_blocks(fisher, full)
        case MFac():
            return restrict_mfac(fisher, full)
        case BlockMFac():
            return restrict_rows(fisher, full)
        case DiagonalFisher():
            parts = zip(fisher.diagonals, full, strict=True)
            apart = lambda d, kept: jnp.where(kept, d, fisher.damping.astype(d.dtype))
            diagonals = tuple(apart(d, kept) for d, kept in parts)
            return dataclasses.replace(fisher, diagonals=diagonals)
    raise TypeError(
        "A Kronecker product without some of its rows is none any more. Take the "
        "gradients of the masked network: per_example_grads(..., masks=masks)."
    )


def eliminate(
    fisher: Any, params: PyTree, removed: PyTree, *, kept: PyTree = None
) -> PyTree:
    """The best change of the kept weights when others are removed, all at once.

    `min 1/2 dw^T F dw` subject to `w_q + dw_q = 0` for all q in Q has the solution
    `dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q`, computed in float64. The papers instead add
    up the changes for each weight removed alone, which is not exact for more than one.

    Args:
      fisher: from `block_fisher` or `mfac`; a diagonal Fisher matrix has nothing to
        change.
      params: has an array for each parameter that takes part.
      removed: bools of the parameters' shapes, True = in Q.
      kept: bools, True = may change; all but Q by default. What is in neither was
        pruned before, and `fisher` was restricted.

    Returns:
      dw: a tree with the structure of the gradients.

    Raises:
      ValueError: trees of another model.
      TypeError: a `KroneckerFisher`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, 1.0]])}   # two equal inputs
      >>> fisher = js.curvature.block_fisher(grads, block_size=2, damping=1e-7)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> removed = {"w": jnp.array([True, False])}
      >>> js.curvature.eliminate(fisher, params, removed)["w"].round(5)
      Array([-1.,  1.], dtype=float32)
    """
    ws = _arrays(fisher, params, name="params")
    qs = _masks(fisher, removed)
    ks = [~q for q in qs] if kept is None else _masks(fisher, kept)
    match fisher:
        case BlockFisher():
            parts = zip(fisher.roots, ws, qs, fisher.layouts, strict=True)
            changes = [block_eliminate(r, w, q, layout=lay) for r, w, q, lay in parts]
            changes = [
                jnp.where(k | q, c, jnp.zeros((), c.dtype))
                for c, k, q in zip(changes, ks, qs, strict=True)
            ]
        case MFac():
            changes = mfac_eliminate(fisher, ws, qs, ks)
        case BlockMFac(damping=damping, accurate=accurate):
            parts = zip(fisher.rows, ws, qs, ks, fisher.layouts, strict=True)
            changes = [
                rows_eliminate(g, damping, w, q, k, layout=layout, accurate=accurate)
                for g, w, q, k, layout in parts
            ]
        case DiagonalFisher():
            changes = [
                jnp.where(q, -w.astype(d.dtype), jnp.zeros((), d.dtype))
                for w, q, d in zip(ws, qs, fisher.diagonals, strict=True)
            ]
        case _:
            raise TypeError(
                "The joint update needs a block or a full Fisher matrix (block_fisher, "
                f"mfac); got {type(fisher).__name__}. Use update='independent'."
            )
    return fisher.treedef.unflatten(changes)


def _arrays(fisher: Fisher, tree: PyTree, *, name: str) -> list[Array]:
    leaves = leaves_at(tree, fisher.paths, name=name)
    check_shapes(fisher.paths, _shapes(fisher), leaves, name=name)
    return leaves


def _masks(fisher: Fisher, masks: PyTree) -> list[Array]:
    """Masks of full shape for the parameters that take part."""
    leaves = leaves_at(masks, fisher.paths, name="masks")
    shaped = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in _shapes(fisher)]
    patterns.check_masks(leaves, shaped)
    return [
        jnp.broadcast_to(mask, w.shape) for mask, w in zip(leaves, shaped, strict=True)
    ]


def _shapes(fisher: Fisher) -> list[tuple[int, ...]]:
    if isinstance(fisher, MFac):
        return [g.shape[1:] for g in fisher.grads]
    return [layout.shape for layout in fisher.layouts]


def check_covers(fisher: Any, path: str) -> None:
    """Raises unless a Fisher matrix was made for a parameter.

    Args:
      fisher: an approximation of the Fisher matrix.
      path: the parameter's path.

    Raises:
      ValueError: it takes no part in the Fisher matrix.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> fisher = js.curvature.mfac({"w": jnp.ones((1, 2)), "b": None}, damping=1.0)
      >>> js.curvature.check_covers(fisher, "w")
      >>> js.curvature.check_covers(fisher, "b")
      Traceback (most recent call last):
        ...
      ValueError: b: selected by `where`, but the Fisher matrix has no part for it...
    """
    if path not in fisher.paths:
        raise ValueError(
            f"{path}: selected by `where`, but the Fisher matrix has no part for it. "
            f"It was made for {len(fisher.paths)} parameters: {fisher.paths[:4]}... "
            "Take the gradients and prune with the same `where`."
        )
