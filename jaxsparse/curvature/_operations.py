"""What every approximation of the Fisher matrix can be asked."""

from typing import Any

import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.curvature import dispatch
from jaxsparse.curvature._fisher import arrays_of, check_fisher, masks_of
from jaxsparse.curvature.dispatch import Fisher


def ihvp(fisher: Fisher, tree: PyTree) -> PyTree:
    """Multiply by the inverse Fisher matrix, `F^-1 x`.

    Args:
      fisher: an approximation of the Fisher matrix.
      tree: x, with an array of the parameter's shape for each parameter that takes
        part; other arrays are ignored.

    Returns:
      A tree with the structure of the gradients: None for parameters that take no part.

    Raises:
      ValueError: a parameter is missing, or of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}    # F = I
      >>> fisher = js.curvature.block_fisher(grads, block_size=2, damping=1.0)
      >>> js.curvature.ihvp(fisher, {"w": jnp.array([2.0, 4.0])})["w"].round(5)
      Array([1., 2.], dtype=float32)
    """
    xs = arrays_of(fisher, tree, name="tree")
    return fisher.treedef.unflatten(dispatch.ihvp(fisher, xs))


def inverse_diagonal(fisher: Fisher) -> PyTree:
    """Return the diagonal of `F^-1`, which is positive.

    Args:
      fisher: an approximation of the Fisher matrix.

    Returns:
      A tree with the structure of the gradients, leaves of the parameters' shapes; None
      for parameters that take no part.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> fisher = js.curvature.mfac({"w": jnp.array([[3.0, 0.0]])}, damping=1.0)
      >>> js.curvature.inverse_diagonal(fisher)
      {'w': Array([0.1, 1. ], dtype=float32)}
    """
    check_fisher(fisher)
    return fisher.treedef.unflatten(dispatch.inverse_diagonal(fisher))


def restrict(fisher: Any, masks: PyTree, *, donate: bool = False) -> Any:
    """Return the Fisher matrix of the weights that are kept.

    It removes the rows and columns of pruned weights from `F` (not from its inverse),
    which gives the curvature of a network in which they stay 0. Pruned weights become
    decoupled; their entry in the inverse is `1 / damping`.

    Args:
      fisher: an approximation of the Fisher matrix. (`MFac` copies its gradients. A
        Kronecker form cannot be restricted: compute the gradients with `masks`.)
      masks: a tree of bools with a mask for each parameter that takes part.
      donate: whether a `BlockFisher` is restricted in its own memory, after which
        `fisher` cannot be used. Other kinds are small, or are copied in any case.

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
    _checks.check_bool(donate=donate)
    return dispatch.restrict(fisher, masks_of(fisher, masks), donate=donate)


def eliminate(
    fisher: Any, params: PyTree, removed: PyTree, *, kept: PyTree = None
) -> PyTree:
    """Return the best change of the kept weights when others are removed together.

    `min 1/2 dw^T F dw` subject to `w_q + dw_q = 0` for all q in Q has the solution
    `dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q`, computed in float64. The papers instead add
    up the changes for each weight removed alone, which is not exact for more than one.

    Args:
      fisher: from `block_fisher` or `mfac`; a diagonal Fisher matrix has nothing to
        change.
      params: has an array for each parameter that takes part.
      removed: bools of the parameters' shapes, True = in Q.
      kept: bools, True = may change; all but Q by default. Weights in neither were
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
    ws = arrays_of(fisher, params, name="params")
    qs = masks_of(fisher, removed, name="removed")
    ks = [~q for q in qs] if kept is None else masks_of(fisher, kept, name="kept")
    return fisher.treedef.unflatten(dispatch.eliminate(fisher, ws, qs, ks))


# Units, and weights in turn: what only a Fisher matrix in blocks can be asked.


def inverse_blocks(fisher: Fisher, *, size: int | None = None) -> PyTree:
    """Return the blocks `[F^-1]_QQ` for all groups Q of neighboring weights.

    Args:
      fisher: what `block_fisher` returned.
      size: the number of weights in a group, a divisor of the block size; 4 for oBERT's
        groups. None for the whole blocks.

    Returns:
      A tree with the structure of the gradients, leaves `[*lead, block_size // size,
      size, size]` in the order of `fisher.layouts` (a kernel row by row as `[d_out,
      d_in]`); for `size=None` without the axis of length 1. If the last block is not
      full, the rest of its diagonal is `1 / damping`.

    Raises:
      ValueError: `size` does not divide the block size.
      TypeError: an approximation of another kind.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}    # F = I
      >>> fisher = js.curvature.block_fisher(grads, block_size=2, damping=1.0)
      >>> js.curvature.inverse_blocks(fisher)["w"].tolist()
      [[[0.5, 0.0], [0.0, 0.5]]]
    """
    if size is not None:
        _checks.check_positive_int(size, name="size")
    found = dispatch.inverse_blocks(fisher, size=size)
    return fisher.treedef.unflatten(found)


def group_scores(fisher: Fisher, params: PyTree) -> tuple[PyTree, PyTree]:
    """Return the loss of removing each unit of the pattern on its own.

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
      TypeError: an approximation of another kind.

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
    ws = arrays_of(fisher, params, name="params")
    rho, y = zip(*dispatch.group_scores(fisher, ws), strict=True)
    return fisher.treedef.unflatten(rho), fisher.treedef.unflatten(y)


def greedy_scores(
    fisher: Fisher,
    params: PyTree,
    *,
    masks: PyTree = None,
    most: int | None = None,
) -> PyTree:
    """Return the loss at which greedy OBS removes each weight, block by block.

    Each step removes the weight of a block with the least `w_q^2 / (2 [F^-1]_qq)`,
    updates the others and takes the weight out of `F^-1`, until no weight is left. This
    is `ExactOBS` of Frantar & Alistarh (2022, OBC, arXiv:2208.11580) on blocks of the
    Fisher matrix. Removing the lowest scores over all blocks, and then `eliminate`, is
    the result of stopping each block in time.

    Cost: `block_size^2` multiply-adds a weight in float64, one after another.

    Args:
      fisher: what `block_fisher` returned, restricted to the kept weights.
      params: has an array for each parameter that takes part.
      masks: True for weights that are not pruned yet; all by default.
      most: how many weights of each unit of the pattern may go (N:M: `of - keep`).

    Returns:
      A tree with the structure of the gradients: the increase of the loss when the
      weight goes, or the largest so far if that was larger; Inf for what stays.

    Raises:
      TypeError: an approximation of another kind.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}    # F = I
      >>> fisher = js.curvature.block_fisher(grads, block_size=2, damping=1.0)
      >>> js.curvature.greedy_scores(fisher, {"w": jnp.array([3.0, 1.0])})["w"].round(4)
      Array([9., 1.], dtype=float32)
    """
    ws = arrays_of(fisher, params, name="params")
    if masks is None:
        kept = [jnp.ones_like(w, dtype=bool) for w in ws]
    else:
        kept = masks_of(fisher, masks)
    scores = dispatch.greedy_scores(fisher, ws, kept, most=most)
    return fisher.treedef.unflatten(scores)
