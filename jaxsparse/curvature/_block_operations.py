"""What only a Fisher matrix in blocks can be asked: units, and weights in turn."""

import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.curvature._block_inverse import (
    block_greedy,
    block_group_solve,
    block_groups,
)
from jaxsparse.curvature._blocks import BlockFisher
from jaxsparse.curvature._fisher import arrays_of, masks_of


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
    _checks.check_arrays(params=params)
    ws = arrays_of(fisher, params, name="params")
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
    _checks.check_arrays(params=params)
    ws = arrays_of(fisher, params, name="params")
    if masks is None:
        kept = [jnp.ones_like(w, dtype=bool) for w in ws]
    else:
        kept = masks_of(fisher, masks)
    scores = [
        block_greedy(r, w, k, layout=layout, most=most)
        for r, w, k, layout in zip(fisher.roots, ws, kept, fisher.layouts, strict=True)
    ]
    return fisher.treedef.unflatten(scores)
