"""The size of each weight's gradient over examples."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import PyTree
from jaxsparse.tree import leaves_with_paths


def gradient_norms(grads: PyTree | Iterator[PyTree], *, order: int) -> PyTree:
    """Measure the size of each weight's gradient over examples, for GBLM.

    `sum_i |g_i|` for order 1, `sqrt(sum_i g_i^2)` for order 2, over examples i. Das et
    al. (2023, arXiv:2311.04902).

    Differs from the reference implementation, which adds up in float16 and rejects a
    gradient of zeros, as an expert without a token has.

    Args:
      grads: a tree with leaves `[m, *shape]`, or an iterator over such trees as
        `js.curvature.stream_grads` yields them; None for parameters without a gradient.
      order: 1 or 2.

    Returns:
      A tree with leaves `[*shape]`, in float32 (float64 for float64 gradients).

    Raises:
      ValueError: another order, no gradients, NaN in them (in eager use), or trees of
        different structures.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> stream = iter([{"w": jnp.array([[3.0], [0.0]])}, {"w": jnp.array([[-4.0]])}])
      >>> js.calibration.gradient_norms(stream, order=2)
      {'w': Array([5.], dtype=float32)}
    """
    if not isinstance(order, int) or isinstance(order, bool) or order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    total = None
    for part in grads if isinstance(grads, Iterator) else [grads]:
        if total is None:
            total = _zeros(part)
        _checks.same_structure(part, total, name="grads", of="the first gradients")
        total = _add_norms(total, part, order)
    if total is None:
        raise ValueError("There are no gradients. Was the iterator used up before?")
    _checks.check_all_numbers(grads=total)
    return total if order == 1 else jax.tree.map(jnp.sqrt, total)


def _zeros(grads: PyTree) -> PyTree:
    _checks.check_arrays(grads=grads)
    named = leaves_with_paths(grads)
    if not named:
        raise ValueError(
            "grads: expected a tree of arrays [m, *shape], but it has no leaves."
        )
    for path, g in named:
        if jnp.ndim(g) == 0:
            raise ValueError(f"{path}: gradients are `[m, *shape]`, got a scalar.")
    wide = lambda g: wide_dtype(g.dtype)
    return jax.tree.map(lambda g: jnp.zeros(g.shape[1:], wide(g)), grads)


@jax.jit(static_argnames="order")
def _add_norms(total: PyTree, grads: PyTree, order: int) -> PyTree:
    size = jnp.abs if order == 1 else jnp.square
    add = lambda t, g: t + jnp.sum(size(g.astype(t.dtype)), axis=0)
    return jax.tree.map(add, total, grads)
