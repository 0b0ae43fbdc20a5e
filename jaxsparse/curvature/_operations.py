"""What every approximation of the Fisher matrix can be asked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.curvature._block_inverse import (
    block_eliminate,
    block_ihvp,
    restrict_blocks,
)
from jaxsparse.curvature._blocks import BlockFisher
from jaxsparse.curvature._diagonal import DiagonalFisher
from jaxsparse.curvature._fisher import Fisher, arrays_of, check_fisher, masks_of
from jaxsparse.curvature._kronecker import (
    KroneckerFisher,
    kronecker_diagonal,
    kronecker_ihvp,
)
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
from jaxsparse.curvature.layout import from_blocks


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
    xs = arrays_of(fisher, tree, name="tree")
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
    check_fisher(fisher)
    match fisher:
        case BlockFisher():
            parts = zip(fisher.diagonals, fisher.layouts, strict=True)
            diagonals = [_from_blocks(d, layout=layout) for d, layout in parts]
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


def restrict(fisher: Any, masks: PyTree, *, donate: bool = False) -> Any:
    """The Fisher matrix of the weights that are kept.

    Rows and columns of pruned weights are taken out of `F` (not of its inverse): what
    is left is the curvature of a network in which they stay 0. Each of them is apart
    from the rest from then on, with `1 / damping` in the inverse.

    Args:
      fisher: an approximation of the Fisher matrix. (`MFac` copies its gradients; in a
        Kronecker form nothing can be taken out: take the gradients with `masks`.)
      masks: a tree of bools with a mask for each parameter that takes part.
      donate: whether a `BlockFisher` is restricted in its own memory; `fisher` is not
        there any more afterwards. Others are small, or are copied in any case.

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
    full = masks_of(fisher, masks)
    match fisher:
        case BlockFisher():
            return restrict_blocks(fisher, full, donate=donate)
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
    ws = arrays_of(fisher, params, name="params")
    qs = masks_of(fisher, removed, name="removed")
    ks = [~q for q in qs] if kept is None else masks_of(fisher, kept, name="kept")
    match fisher:
        case BlockFisher():
            parts = zip(fisher.roots, ws, qs, ks, fisher.layouts, strict=True)
            changes = [
                block_eliminate(r, w, q, k, layout=layout)
                for r, w, q, k, layout in parts
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


# Without jit each of its steps would make a copy.
_from_blocks = jax.jit(from_blocks, static_argnames="layout")
