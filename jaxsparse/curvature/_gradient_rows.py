"""Products with G, a tree of m gradients: leaves `[m, *shape]`, read once in each.

Sums are made in float32 at least. No product makes a copy of G, of its own type or a
wider one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import _sharded
from jaxsparse._loops import after
from jaxsparse._sharded import explicit_mesh
from jaxsparse._typing import Array, PyTree
from jaxsparse.linalg.factor import HIGHEST


def everywhere(sharding: Any) -> NamedSharding | None:
    """The sharding of what is the same on all devices."""
    if not isinstance(sharding, NamedSharding):
        return None
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return NamedSharding(sharding.mesh, P()) if explicit else None


def squares(tree: PyTree, wide: Any) -> Array:
    """The sum of all squares."""
    found = [jnp.sum(jnp.square(x.astype(wide))) for x in jax.tree.leaves(tree)]
    return sum(found, start=jnp.zeros((), wide))


def inner(rows: PyTree, x: PyTree, like: Array) -> Array:
    """`G x`."""
    wide = like.dtype

    def one(G: Array, x: Array) -> Array:
        if G.dtype == wide:
            axes = tuple(range(x.ndim))
            return contract(G, x.astype(wide), tuple(a + 1 for a in axes), axes)
        # As a dot product XLA would widen all of a 16-bit G first, on CPU.
        product = G.astype(wide) * x.astype(wide)[None]
        return jnp.sum(product, axis=tuple(range(1, G.ndim)))

    pairs = zip(jax.tree.leaves(rows), jax.tree.leaves(x), strict=True)
    return sum((one(G, x) for G, x in pairs), start=jnp.zeros_like(like))


def combine(rows: PyTree, c: Array, wide: Any) -> PyTree:
    """`G^T c`."""

    def one(G: Array) -> Array:
        if G.dtype == wide:
            return contract(c, G, (0,), (0,), along=G)
        together = math.gcd(len(G), 8)

        def some(i: Array, total: Array) -> Array:
            held = after(i, G)  # or XLA would widen all of it in front of the loop
            for j in range(together):
                row = lax.dynamic_index_in_dim(held, i * together + j, keepdims=False)
                total += c[i * together + j] * row.astype(wide)
            return total

        first = jnp.zeros_like(G[0], wide)
        return lax.fori_loop(0, len(G) // together, some, first)

    return jax.tree.map(one, rows)


def gram_of(G: Array, wide: Any) -> Array:
    """`G G^T`, some columns at a time: of one factor XLA makes a transposed copy."""
    m, axes = len(G), tuple(range(1, G.ndim))
    some = min(m, 16)
    steps = -(-m // some)

    def rows(i: Array) -> tuple[Array, Array]:
        start = jnp.minimum(i * some, m - some)
        held = lax.dynamic_slice_in_dim(after(i, G), start, some)
        return start, held.astype(wide)

    def columns(i: Array, total: Array) -> Array:
        start, right = rows(i)

        def part(j: Array, total: Array) -> Array:
            above, left = rows(j)
            dots = contract(left, right, axes, axes)
            return lax.dynamic_update_slice(total, dots, (above, start))

        if G.dtype != wide:
            return lax.fori_loop(0, steps, part, total)
        dots = contract(G, right, axes, axes)
        return lax.dynamic_update_slice_in_dim(total, dots, start, 1)

    start = _sharded.zeros((m, m), wide, everywhere(jax.typeof(G).sharding))
    return lax.fori_loop(0, steps, columns, start)


def contract(
    a: Array, b: Array, over_a: Any, over_b: Any, *, along: Array | None = None
) -> Array:
    """A sum of products over axes of both.

    On a mesh with explicit axes the result is on every device; or, with `along`, its
    last axes are sharded as those of these gradients.
    """
    mesh, out = explicit_mesh([a, b]), None
    if mesh is not None:
        spec = [None] * (a.ndim - len(over_a) + b.ndim - len(over_b))
        if along is not None:
            last = (*jax.typeof(along).sharding.spec, *[None] * along.ndim)
            last = last[1 : along.ndim]
            spec = [*spec[: len(spec) - len(last)], *last]
        out = NamedSharding(mesh, P(*spec))
    axes = ((over_a, over_b), ((), ()))
    return lax.dot_general(a, b, axes, precision=HIGHEST, out_sharding=out)
