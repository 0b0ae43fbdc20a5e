"""M-FAC block by block: for blocks that are too large to be inverted themselves."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._dtypes import widest
from jaxsparse._typing import Array, PyTree
from jaxsparse.curvature import dispatch
from jaxsparse.curvature._trees import (
    STATIC,
    check_factor,
    check_finite,
    for_each,
    gradient_leaves,
    largest_number,
    paths_of_layouts,
    without_m,
)
from jaxsparse.curvature.layout import (
    BlockLayout,
    block_layouts,
    from_blocks,
    to_blocks,
)
from jaxsparse.linalg import triangle as _triangle
from jaxsparse.linalg.chunks import over_blocks
from jaxsparse.linalg.factor import HIGHEST, by_root, inverse_root
from jaxsparse.linalg.triangle import Triangle
from jaxsparse.tree import AxesRule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMFac:
    """The inverse of a damped block-diagonal Fisher matrix, as gradients and factors.

    Attributes:
      rows: for each parameter its gradients in blocks, `[*lead, m, b]`. The gradients
        themselves are no longer needed.
      roots: for each parameter triangles `R` with `R^T R = (m * damping * I + G
        G^T)^-1` of each block, `[*lead, m, m]`.
      damping: the number added to the diagonal, a scalar.
      treedef: the structure of the gradients.
      layouts: for each parameter how it is cut into blocks.
      accurate: whether `R` was found in float64.
    """

    rows: tuple[Array, ...]
    roots: tuple[Triangle, ...]
    damping: Array
    treedef: Any = dataclasses.field(metadata=STATIC)
    layouts: tuple[BlockLayout, ...] = dataclasses.field(metadata=STATIC)
    accurate: bool = dataclasses.field(metadata=STATIC)
    paths = paths_of_layouts


def mfac_in_blocks(
    grads: PyTree, damping: Array, block_size: int, axes: AxesRule, accurate: bool
) -> BlockMFac:
    """M-FAC for each block on its own."""
    layouts = block_layouts(without_m(grads), block_size, axes)
    paths, leaves, _ = gradient_leaves(grads)
    rows = tuple(for_each(_in_rows, layouts, leaves))
    roots = tuple(_row_roots(g, damping, accurate=accurate) for g in rows)
    check_finite(paths, leaves, map(largest_number, leaves))
    for path, g, r in zip(paths, rows, roots, strict=True):
        largest = lambda g=g: jnp.max(jnp.mean(jnp.square(g.astype(jnp.float32)), -2))
        diagonal = _triangle.diagonal(r)
        check_factor(path, diagonal, damping, largest, accurate=accurate)
    treedef = jax.tree.structure(grads)
    return BlockMFac(rows, roots, damping, treedef, layouts, accurate)


@functools.partial(jax.jit, static_argnames="layout")
def _in_rows(g: Array, *, layout: BlockLayout) -> Array:
    """Gradients `[m, *shape]` in blocks, `[*lead, m, b]`."""
    return jnp.moveaxis(to_blocks(g, layout), 0, -2)


@functools.partial(jax.jit, static_argnames="accurate")
def _row_roots(rows: Array, damping: Array, *, accurate: bool) -> Triangle:
    """`R` with `R^T R = (m * damping * I + G G^T)^-1`, for each block."""
    stored = widest([rows])
    wide = jnp.float64 if accurate else stored
    m, b = rows.shape[-2:]

    def roots(rows: Array) -> Triangle:
        return _triangle.split(_root(rows.astype(wide), damping.astype(wide)), stored)

    with jax.enable_x64(True):
        return over_blocks(roots, rows.shape[:-2], m * (b + 8 * m), rows)


def _root(rows: Array, damping: Array) -> Array:
    gram = jnp.einsum("...mb,...nb->...mn", rows, rows, precision=HIGHEST)
    m = gram.shape[-1]
    eye = jnp.eye(m, dtype=gram.dtype) * (m * damping)
    return inverse_root(gram + jnp.broadcast_to(eye, gram.shape))


@functools.partial(jax.jit, static_argnames="layout")
def rows_ihvp(
    rows: Array, root: Triangle, x: Array, *, damping: Array, layout: BlockLayout
) -> Array:
    """`F^-1 x = (x - G^T R^T R G x) / damping`."""
    stored = root.square.dtype

    def product(rows: Array, r: Array, x: Array) -> Array:
        rows = rows.astype(stored)
        # What stands above the diagonal of r is below the rounding of the rest.
        y = jnp.einsum("...mb,...b->...m", rows, x, precision=HIGHEST)
        y = by_root(r, y)
        back = jnp.einsum("...mb,...m->...b", rows, y, precision=HIGHEST)
        return (x - back) / damping

    m, b = rows.shape[-2:]
    blocks = to_blocks(x.astype(stored), layout)
    floats = m * (m + b)  # stay in the cache from the first product to the last
    y = over_blocks(product, layout.lead, floats, rows, root.square, blocks)
    return from_blocks(y, layout)


@functools.partial(jax.jit, static_argnames=("layout", "accurate"))
def rows_diagonal(
    rows: Array, root: Triangle, *, damping: Array, layout: BlockLayout, accurate: bool
) -> Array:
    """The diagonal of `F^-1`: `(1 - sum_k V_kq^2) / damping` with `V = R G`."""
    stored = root.square.dtype
    wide = jnp.float64 if accurate else stored
    m, b = rows.shape[-2:]

    def diagonal(rows: Array, root: Triangle) -> Array:
        r = _triangle.join(root, wide)
        v = jnp.einsum("...nm,...mb->...nb", r, rows.astype(wide), precision=HIGHEST)
        rest = 1 - jnp.sum(jnp.square(v), axis=-2)
        return (rest / damping.astype(wide)).astype(stored)

    with jax.enable_x64(True):
        floats = m * (2 * b + 2 * m)
        return from_blocks(
            over_blocks(diagonal, layout.lead, floats, rows, root), layout
        )


@functools.partial(jax.jit, static_argnames=("layout", "accurate"))
def rows_eliminate(
    rows: Array,
    w: Array,
    removed: Array,
    kept: Array,
    *,
    damping: Array,
    layout: BlockLayout,
    accurate: bool,
) -> Array:
    """`G_K^T (m * damping * I + G_K G_K^T)^-1 G_Q w_Q` on K, `-w` on Q."""
    stored = widest([rows])
    wide = jnp.float64 if accurate else stored
    m, b = rows.shape[-2:]

    def change(rows: Array, w: Array, q: Array, k: Array) -> Array:
        g = rows.astype(wide)
        w = jnp.where(q, w.astype(wide), jnp.zeros((), wide))
        kept_rows = jnp.where(k[..., None, :], g, jnp.zeros((), wide))
        r = _root(kept_rows, damping.astype(wide))
        y = jnp.einsum("...mb,...b->...m", g, w, precision=HIGHEST)
        y = by_root(r, y)
        back = jnp.einsum("...mb,...m->...b", kept_rows, y, precision=HIGHEST)
        return (back - w).astype(stored)

    with jax.enable_x64(True):
        parts = [to_blocks(x, layout) for x in (w, removed, kept)]
        floats = m * (2 * b + 8 * m)
        return from_blocks(
            over_blocks(change, layout.lead, floats, rows, *parts), layout
        )


# What it answers.


@dispatch.ihvp.register
def _(fisher: BlockMFac, xs: list[Array]) -> list[Array]:
    columns, damping = (fisher.rows, fisher.roots, xs), fisher.damping
    return for_each(rows_ihvp, fisher.layouts, *columns, damping=damping)


@dispatch.inverse_diagonal.register
def _(fisher: BlockMFac) -> list[Array]:
    columns = fisher.rows, fisher.roots
    return for_each(rows_diagonal, fisher.layouts, *columns, **_options(fisher))


@dispatch.restrict.register
def _(fisher: BlockMFac, masks: list[Array], *, donate: bool) -> BlockMFac:
    """Gradients of pruned weights become 0."""
    del donate

    def without(g: Array, mask: Array, layout: BlockLayout) -> Array:
        kept = to_blocks(mask, layout)[..., None, :]
        return jnp.where(kept, g, jnp.zeros((), g.dtype))

    rows = tuple(for_each(without, fisher.layouts, fisher.rows, masks))
    root = lambda g: _row_roots(g, fisher.damping, accurate=fisher.accurate)
    roots = tuple(map(root, rows))
    return dataclasses.replace(fisher, rows=rows, roots=roots)


@dispatch.eliminate.register
def _(
    fisher: BlockMFac, ws: list[Array], removed: list[Array], kept: list[Array]
) -> list[Array]:
    columns = fisher.rows, ws, removed, kept
    return for_each(rows_eliminate, fisher.layouts, *columns, **_options(fisher))


def _options(fisher: BlockMFac) -> dict[str, Any]:
    return {"damping": fisher.damping, "accurate": fisher.accurate}
