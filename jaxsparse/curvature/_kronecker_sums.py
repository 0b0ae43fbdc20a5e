"""The two sides of each kernel's Fisher matrix, summed up over gradients."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import widest
from jaxsparse._sharded import everywhere, with_auto_axes
from jaxsparse._typing import Array, PyTree
from jaxsparse.linalg import triangle as _triangle
from jaxsparse.linalg.chunks import SLAB_BYTES, in_parts, is_spread
from jaxsparse.linalg.factor import HIGHEST
from jaxsparse.linalg.triangle import Triangle
from jaxsparse.tree import (
    Axes,
    AxesRule,
    MatrixView,
    kernel_axes,
    leaves_with_paths,
    matrix_view,
    resolve_axes,
)


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """A parameter and how it is read as matrices, one for each layer."""

    # Its path, for messages. Layouts are equal without it: so parameters of equal shape
    # share one compilation
    path: str = dataclasses.field(compare=False)
    view: MatrixView  # which of its axes are outputs, inputs, and layers

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.view.shape


class Grams(NamedTuple):
    """Sums over gradients `G_i` `[d_out, d_in]` of a parameter."""

    input: Triangle  # `sum_i G_i^T G_i`, triangles `[*lead, d_in, d_in]`
    output: Triangle  # `sum_i G_i G_i^T`, triangles `[*lead, d_out, d_out]`


def kernel_layouts(params: PyTree, axes: AxesRule) -> tuple[KernelLayout, ...]:
    """How each parameter is read; a vector without stated axes is one column."""
    stated = resolve_axes(params, axes)

    def layout(path: str, w: Any) -> KernelLayout:
        if w.ndim < 2 and path not in stated:
            own = Axes((), tuple(range(w.ndim)))
        else:
            own = kernel_axes(path, w, stated)
        return KernelLayout(path, matrix_view(tuple(w.shape), own))

    return tuple(layout(path, w) for path, w in leaves_with_paths(params))


def no_grams(like: Array, layout: KernelLayout) -> Grams:
    """Sums of no gradients, for a parameter or gradients of this type."""
    view = layout.view
    sizes = (view.d_in, view.d_out)
    zeros = lambda size: _triangle.zeros(view.batch, size, widest([like]))
    return Grams(*map(zeros, sizes))


@functools.partial(jax.jit, static_argnames=("layout", "accurate"))
def sum_up(
    sums: Grams | None, g: Array, *, layout: KernelLayout, accurate: bool
) -> Grams:
    """Adds both products of all gradients, to zero for None."""
    sums = no_grams(g, layout) if sums is None else sums
    return _sum_up(sums, g, layout.view, accurate)


@jax.jit
def add_grams(sums: Grams, other: Grams) -> Grams:
    """The sums of two parts of the gradients, in float64."""
    with jax.enable_x64(True):
        wide = lambda s: _triangle.join(s, jnp.float64)
        together = [wide(s) + wide(o) for s, o in zip(sums, other, strict=True)]
        return Grams(*(_triangle.split(s, sums.input.square.dtype) for s in together))


def traces(sums: Grams) -> Array:
    """Not finite where anything is not."""
    inputs, outputs = map(_triangle.diagonal, sums)
    return jnp.sum(inputs) + jnp.sum(outputs)


def _sum_up(sums: Grams, g: Array, view: MatrixView, accurate: bool) -> Grams:
    stored = sums.input.square.dtype
    wide = jnp.float64 if accurate else stored
    products = functools.partial(_products, view=view, wide=wide)
    with jax.enable_x64(True):
        # Sums over what is sharded: where they lie has to be stated.
        made = with_auto_axes(products, everywhere, g)
        both = zip(sums, made, strict=True)
        both = [_triangle.join(s, wide) + new for s, new in both]
        return Grams(*(_triangle.split(s, stored) for s in both))


def _products(g: Array, *, view: MatrixView, wide) -> tuple[Array, ...]:
    """`sum_i G_i^T G_i` and `sum_i G_i G_i^T`, some gradients at a time.

    Taken from gradients as they lie: a product sums over m and one side at once.
    """
    m = g.shape[0]
    few = max(1, SLAB_BYTES // max(1, 32 * (g.size // m)))
    cut = lambda start, size: lax.dynamic_slice_in_dim(g, start, size)
    if is_spread(g):
        # Some from each device, should it be m that is sharded.
        few = _even_part(m, few, jax.typeof(g).sharding.mesh.size)
        turns = g.reshape(few, m // few, *g.shape[1:])
        cut = lambda start, _: lax.dynamic_index_in_dim(turns, start // few, 1, False)

    def add(start: Any, size: int, both: tuple[Array, ...]) -> tuple[Array, ...]:
        part = cut(start, size).astype(wide)
        new = [_product(part, view, own) for own in sides]
        return tuple(b + n for b, n in zip(both, new, strict=True))

    sides = [view.axes.input, view.axes.output]
    sizes = [view.d_in, view.d_out]
    zeros = tuple(jnp.zeros((*view.batch, size, size), wide) for size in sizes)
    return in_parts(m, min(few, m), add, zeros)


def _even_part(m: int, few: int, devices: int) -> int:
    """Of the divisors of m that devices divide the largest up to `few`; m if none."""
    even = [n for n in range(devices, m + 1, devices) if m % n == 0]
    return max([n for n in even if n <= few], default=min(even, default=m))


def _product(g: Array, view: MatrixView, own: tuple[int, ...]) -> Array:
    """For each layer the inner products of one side's rows, `[*lead, size, size]`."""
    first = [1 + a for a in own]
    second = [g.ndim + a for a in first]
    other = [a + g.ndim if a in first else a for a in range(g.ndim)]
    result = [*(1 + a for a in view.axes.batch), *first, *second]
    gram = jnp.einsum(g, list(range(g.ndim)), g, other, result, precision=HIGHEST)
    size = math.prod(view.shape[a] for a in own)
    return gram.reshape(*view.batch, size, size)
