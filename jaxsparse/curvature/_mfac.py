"""The full empirical Fisher matrix, inverted without ever being formed (M-FAC)."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._dtypes import widest
from jaxsparse._typing import Array, PyTree
from jaxsparse.curvature import dispatch
from jaxsparse.curvature._mfac_blocks import BlockMFac, mfac_in_blocks
from jaxsparse.curvature._mfac_products import (
    add_gram,
    dots,
    gram_root,
    page_diagonal,
    solve_by_root,
    weighted_sum,
)
from jaxsparse.curvature._trees import (
    STATIC,
    absolute_damping,
    check_factor,
    check_finite,
    check_one_damping,
    gradient_leaves,
)
from jaxsparse.linalg import triangle as _triangle
from jaxsparse.linalg.triangle import Triangle
from jaxsparse.tree import AxesRule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MFac:
    """The inverse of a damped Fisher matrix, as the gradients and a small factor.

    Attributes:
      grads: the gradients as given, `[m, *shape]` for each parameter, not copied.
      root: the triangle `R` with `R^T R = (m * damping * I + G G^T)^-1`, `[m, m]`.
      damping: the number added to the diagonal, a scalar.
      treedef: the structure of the gradients.
      paths: the paths of the parameters that take part.
      accurate: whether `R` was found in float64.
      page_bytes: how many bytes of gradients in the host's memory are fetched at once.
    """

    grads: tuple[Any, ...]
    root: Triangle
    damping: Array
    treedef: Any = dataclasses.field(metadata=STATIC)
    paths: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    accurate: bool = dataclasses.field(metadata=STATIC)
    page_bytes: int = dataclasses.field(metadata=STATIC)


def mfac(
    grads: PyTree,
    *,
    damping: float | Array | None = None,
    rel_damping: float | Array | None = None,
    block_size: int | None = None,
    axes: AxesRule = None,
    accurate: bool = True,
    page_bytes: int = 1 << 28,
) -> MFac | BlockMFac:
    """Estimate the empirical Fisher matrix over all weights at once, matrix-free.

    `F = (1/m) G^T G + damping * I` with the gradients as rows of `G`, `[m, d]`. By
    Woodbury `F^-1 x = (x - G^T S^-1 G x) / damping`, `S = m * damping * I + G G^T`.
    Only the m x m matrix S is factored; no `d x d` or block matrix exists. Frantar,
    Kurtic & Alistarh (2021, M-FAC, arXiv:2107.03356).

    Differs from the reference implementation, which orthogonalizes the gradients one
    after another, in m passes, and overwrites them. Here one matrix product and
    Cholesky factor S, in float64 unless told otherwise. Its blocks cross the ends of
    parameters; with `block_size` they do not here. For blocks of up to four times m
    weights `block_fisher` is cheaper.

    Cost: `m^2 d` multiply-adds once, `2 m d` for a product with `F^-1`, `m^2 d` for the
    whole diagonal. Memory: the gradients and `m^2` numbers. For 25e6 weights and
    m = 1024: 102 GB of float32 gradients (bf16: 51), 52 TFLOP in float64, and 205 GB of
    traffic for a product. Sharded along the parameters each device works on its part
    and S is one all-reduce of m x m. Gradients in the host's memory (numpy arrays, see
    `collect_grads`) are fetched in pages of columns, each once for S, once for a
    diagonal and twice for a product; these work outside of jit only. For 7e9 weights
    and m = 256: 3.6 TB in bf16, 45 devices of 80 GB; block Fisher takes less.

    Args:
      grads: leaves `[m, *shape]`, as `per_example_grads` makes them; None for
        parameters that take no part. They are kept, not copied.
      damping: added to the diagonal; the paper takes 1e-5 for pruning.
      rel_damping: instead of it a factor for the mean diagonal of F, of all weights.
      block_size: None for one matrix over all weights; otherwise each block of so many
        neighbors has a matrix of its own, as in `block_fisher`. That takes a copy of
        the gradients, and `m^2` numbers for each block.
      axes: the axes of kernels whose layout is not flax's, for blocks.
      accurate: False forms and factors S in the gradients' type: right only where the
        gradients' largest squared norm is below some 1e4 times `m * damping`.
      page_bytes: how many bytes of gradients in the host's memory are fetched at once.

    Returns:
      An `MFac`, for `ihvp`, `inverse_diagonal`, `span_ihvp`, the scores and solvers; a
      `BlockMFac` with `block_size`.

    Raises:
      ValueError: no gradients, gradients with NaN or Inf (in eager use), a damping
        that is not positive; a factorization that fails.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}    # m = 2, F = I
      >>> fisher = js.curvature.mfac(grads, damping=1.0)
      >>> js.curvature.ihvp(fisher, {"w": jnp.array([2.0, 4.0])})["w"].round(5)
      Array([1., 2.], dtype=float32)
    """
    _checks.check_axes(axes)
    paths, leaves, _ = gradient_leaves(grads)
    check_one_damping(damping, rel_damping)
    _checks.check_positive_int(page_bytes, name="page_bytes")
    stored = widest(leaves)
    if block_size is not None:
        mean = lambda: _mean_square(leaves)
        damping = absolute_damping(damping, rel_damping, mean, stored)
        return mfac_in_blocks(grads, damping, block_size, axes, accurate)
    gram = _gram(leaves, accurate, page_bytes)
    check_finite(paths, leaves, [jnp.diagonal(gram.square)] * len(leaves))
    count = float(sum(math.prod(g.shape) for g in leaves))
    mean = lambda: jnp.trace(gram.square) / count
    damping = absolute_damping(damping, rel_damping, mean, stored)
    root = _checked_root("G G^T", gram, damping, accurate)
    return MFac(
        tuple(leaves),
        root,
        damping,
        jax.tree.structure(grads),
        tuple(paths),
        accurate,
        page_bytes,
    )


@jax.jit
def _mean_square(leaves) -> Array:
    """The mean diagonal of F."""
    square = lambda g: jnp.sum(jnp.square(g.astype(widest(leaves))))
    total = functools.reduce(jnp.add, map(square, leaves))
    return total / float(sum(g.size for g in leaves))


def span_ihvp(fisher: MFac, coefficients: Array) -> PyTree:
    """Return `F^-1 G^T c`, the inverse times a combination of the gradients themselves.

    It computes `m G^T S^-1 c` directly, so it does not lose digits in a difference as
    `ihvp` of the same vector does. The result is exact to rounding at any damping if
    the gradients are linearly independent (many more weights than gradients). `c =
    ones(m) / m` gives the natural gradient, a one-hot `c` the product with one
    gradient.

    Args:
      fisher: what `mfac` returned.
      coefficients: c, `[m]`.

    Returns:
      A tree with the structure of the gradients, leaves `[*shape]`.

    Raises:
      ValueError: coefficients of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> fisher = js.curvature.mfac({"w": jnp.array([[3.0, 0.0]])}, damping=1.0)
      >>> js.curvature.span_ihvp(fisher, jnp.ones(1))    # 3 / (1 + 9)
      {'w': Array([0.3, 0. ], dtype=float32)}
    """
    _checks.check_is(MFac, "js.curvature.mfac(grads, ...)", fisher=fisher)
    _checks.check_arrays(coefficients=coefficients)
    m = fisher.root.square.shape[-1]
    if jnp.shape(coefficients) != (m,):
        raise ValueError(
            f"coefficients: one for each of the {m} gradients, shape ({m},); got "
            f"{jnp.shape(coefficients)}."
        )
    c = m * solve_by_root(fisher.root, coefficients)
    combined = [_combine(fisher, g, c) for g in fisher.grads]
    return fisher.treedef.unflatten(combined)


# What an `MFac` answers.


@dispatch.ihvp.register
def _(fisher: MFac, xs: list[Array]) -> list[Array]:
    """`F^-1 x = (x - G^T S^-1 G x) / damping`."""
    c = solve_by_root(fisher.root, _all_dots(fisher, xs))
    damping = fisher.damping
    back = [_combine(fisher, g, c) for g in fisher.grads]
    return [(x.astype(b.dtype) - b) / damping for x, b in zip(xs, back, strict=True)]


@dispatch.inverse_diagonal.register
def _(fisher: MFac) -> list[Array]:
    """The diagonal of `F^-1`: `(1 - sum_k V_kq^2) / damping` with `V = R G`."""
    diagonals = []
    for g in fisher.grads:
        parts: list[Array] = [
            page_diagonal(page, fisher.root, fisher.damping, accurate=fisher.accurate)
            for _, page in _pages(g, fisher.page_bytes)
        ]
        diagonals.append(_assemble(parts, g))
    return diagonals


@dispatch.eliminate.register
def _(
    fisher: MFac, ws: list[Array], removed: list[Array], kept: list[Array]
) -> list[Array]:
    # With Q removed and K kept, F_KK^-1 F_KQ w_Q = G_K^T (m * damping * I + G_K
    # G_K^T)^-1 G_Q w_Q: one more Gram matrix, of the kept columns.
    stored = widest(fisher.grads)
    gone = [
        jnp.where(q, w.astype(stored), jnp.zeros((), stored))
        for w, q in zip(ws, removed, strict=True)
    ]
    gram = _gram(fisher.grads, fisher.accurate, fisher.page_bytes, kept)
    root = _checked_root("G_K G_K^T", gram, fisher.damping, fisher.accurate)
    c = solve_by_root(root, _all_dots(fisher, gone))
    changes = [_combine(fisher, g, c) for g in fisher.grads]
    return [
        jnp.where(k, change, -w)
        for change, k, w in zip(changes, kept, gone, strict=True)
    ]


@dispatch.shapes.register
def _(fisher: MFac) -> list[tuple[int, ...]]:
    return [g.shape[1:] for g in fisher.grads]


@dispatch.apart.register
def _(fisher: MFac) -> list[MFac]:
    return [fisher]


@dispatch.restrict.register
def _(fisher: MFac, masks: list[Array], *, donate: bool) -> MFac:
    """The gradients of pruned weights become 0, in a copy."""
    del donate
    masked = []
    for g, mask in zip(fisher.grads, masks, strict=True):
        xp: Any = np if isinstance(g, np.ndarray) else jnp
        masked.append(xp.where(xp.asarray(mask)[None], g, xp.zeros((), g.dtype)))
    gram = _gram(masked, fisher.accurate, fisher.page_bytes)
    root = _checked_root("G_K G_K^T", gram, fisher.damping, fisher.accurate)
    return dataclasses.replace(fisher, grads=tuple(masked), root=root)


# Pages: a device's own array is one, one in the host's memory is several.


def _pages(g: Any, page_bytes: int) -> Iterator[tuple[slice | None, Array]]:
    if not isinstance(g, np.ndarray):
        yield None, g
        return
    m = g.shape[0]
    flat = g.reshape(m, -1)
    columns = max(1, page_bytes // (m * g.itemsize))
    for start in range(0, flat.shape[1], columns):
        at = slice(start, start + columns)
        yield at, jnp.asarray(flat[:, at])


def _columns(x: Array, g: Any, at: slice | None) -> Array:
    return x if at is None else jnp.ravel(x)[at]


def _assemble(parts: list[Array], g: Any) -> Array:
    if not isinstance(g, np.ndarray):
        return parts[0]
    return jnp.concatenate(parts).reshape(g.shape[1:])


def _combine(fisher: MFac, g: Any, c: Array) -> Array:
    """`G^T c` for one parameter."""
    wide = fisher.root.square.dtype
    pages = _pages(g, fisher.page_bytes)
    return _assemble([weighted_sum(page, c, wide=wide) for _, page in pages], g)


def _all_dots(fisher: MFac, xs: list[Array]) -> Array:
    """`G x` over all parameters, `[m]`."""
    wide = fisher.root.square.dtype
    parts = [
        dots(page, _columns(x, g, at), wide=wide)
        for g, x in zip(fisher.grads, xs, strict=True)
        for at, page in _pages(g, fisher.page_bytes)
    ]
    return functools.reduce(jnp.add, parts)


def _checked_root(name: str, gram: Triangle, damping, accurate: bool) -> Triangle:
    root = gram_root(gram, damping, accurate=accurate)
    norms = _triangle.diagonal(gram)
    largest = lambda: jnp.max(norms) / norms.size
    diagonal = _triangle.diagonal(root)
    check_factor(name, diagonal, damping, largest, accurate=accurate)
    return root


def _gram(leaves, accurate: bool, page_bytes: int, kept=None) -> Triangle:
    stored = widest(leaves)
    m = leaves[0].shape[0]
    gram = _triangle.zeros((), m, stored)
    for i, g in enumerate(leaves):
        for at, page in _pages(g, page_bytes):
            mask = None if kept is None else _columns(kept[i], g, at)
            gram = add_gram(gram, page, mask, accurate=accurate)
    return gram
