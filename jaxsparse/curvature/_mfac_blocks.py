"""M-FAC block by block: for blocks that are too large to be inverted themselves."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._dtypes import widest
from jaxsparse._typing import Array
from jaxsparse.curvature.layout import BlockLayout, from_blocks, to_blocks
from jaxsparse.linalg import triangle as _triangle
from jaxsparse.linalg.chunks import over_blocks
from jaxsparse.linalg.factor import HIGHEST, inverse_root
from jaxsparse.linalg.triangle import Triangle


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "roots", "damping"],
    meta_fields=["treedef", "layouts", "accurate"],
)
@dataclasses.dataclass(frozen=True)
class BlockMFac:
    """The inverse of a damped block-diagonal Fisher matrix, as gradients and factors.

    Attributes:
      rows: for each parameter its gradients in blocks, `[*lead, m, b]`: the one copy
        that is needed, the gradients themselves may be dropped.
      roots: for each parameter triangles `R` with `R^T R = (m * damping * I + G
        G^T)^-1` of each block, `[*lead, m, m]`.
      damping: what was added to the diagonal, a scalar.
      treedef: the structure of the gradients.
      layouts: for each parameter how it is cut into blocks.
      accurate: whether `R` was found in float64.
    """

    rows: tuple[Array, ...]
    roots: tuple[Triangle, ...]
    damping: Array
    treedef: Any
    layouts: tuple[BlockLayout, ...]
    accurate: bool

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the parameters that take part."""
        return tuple(layout.path for layout in self.layouts)


@functools.partial(jax.jit, static_argnames="layout")
def in_rows(g: Array, *, layout: BlockLayout) -> Array:
    """Gradients `[m, *shape]` in blocks, `[*lead, m, b]`."""
    return jnp.moveaxis(to_blocks(g, layout), 0, -2)


@functools.partial(jax.jit, static_argnames="accurate")
def row_roots(rows: Array, damping: Array, *, accurate: bool) -> Triangle:
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
    rows: Array, root: Triangle, damping: Array, x: Array, *, layout: BlockLayout
) -> Array:
    """`F^-1 x = (x - G^T R^T R G x) / damping`."""
    stored = root.square.dtype

    def product(rows: Array, r: Array, x: Array) -> Array:
        rows = rows.astype(stored)
        # What stands above the diagonal of r is below the rounding of the rest.
        y = jnp.einsum("...mb,...b->...m", rows, x, precision=HIGHEST)
        y = jnp.einsum("...nm,...m->...n", r, y, precision=HIGHEST)
        y = jnp.einsum("...nm,...n->...m", r, y, precision=HIGHEST)
        back = jnp.einsum("...mb,...m->...b", rows, y, precision=HIGHEST)
        return (x - back) / damping

    m, b = rows.shape[-2:]
    blocks = to_blocks(x.astype(stored), layout)
    floats = m * (m + b)  # stay in the cache from the first product to the last
    y = over_blocks(product, layout.lead, floats, rows, root.square, blocks)
    return from_blocks(y, layout)


@functools.partial(jax.jit, static_argnames=("layout", "accurate"))
def rows_diagonal(
    rows: Array, root: Triangle, damping: Array, *, layout: BlockLayout, accurate: bool
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
    damping: Array,
    w: Array,
    removed: Array,
    kept: Array,
    *,
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
        y = jnp.einsum("...nm,...m->...n", r, y, precision=HIGHEST)
        y = jnp.einsum("...nm,...n->...m", r, y, precision=HIGHEST)
        back = jnp.einsum("...mb,...m->...b", kept_rows, y, precision=HIGHEST)
        return (back - w).astype(stored)

    with jax.enable_x64(True):
        parts = [to_blocks(x, layout) for x in (w, removed, kept)]
        floats = m * (2 * b + 8 * m)
        return from_blocks(
            over_blocks(change, layout.lead, floats, rows, *parts), layout
        )


def restrict_rows(fisher: BlockMFac, masks: list[Array]) -> BlockMFac:
    """`restrict` for M-FAC in blocks: gradients of pruned weights become 0."""
    rows = []
    for g, mask, layout in zip(fisher.rows, masks, fisher.layouts, strict=True):
        kept = to_blocks(mask, layout)[..., None, :]
        rows.append(jnp.where(kept, g, jnp.zeros((), g.dtype)))
    find = lambda g: row_roots(g, fisher.damping, accurate=fisher.accurate)
    return dataclasses.replace(fisher, rows=tuple(rows), roots=tuple(map(find, rows)))
