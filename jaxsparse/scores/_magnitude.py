"""Scores that need the weights alone."""

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype, widen
from jaxsparse._sharded import laid_out_like
from jaxsparse._together import each
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import keys_like


def magnitude(params: PyTree) -> PyTree:
    """Score weights by their magnitude, `|w|`.

    This is the plainest score, and with gradual pruning a strong one: Zhu & Gupta
    (2017, arXiv:1710.01878), Han et al. (2015, arXiv:1506.02626).

    Differs from JaxPruner's `global_magnitude`, which divides each parameter by its L2
    norm unless told otherwise: here the global scope compares plain magnitudes.

    Args:
      params: a tree of arrays.

    Returns:
      A tree of arrays of the same shapes and dtypes (float32 for 8-bit dtypes, which
      have no infinity), larger = keep; random keys stay as they are.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.scores.magnitude({"w": jnp.array([-2.0, 1.0])})
      {'w': Array([2., 1.], dtype=float32)}
    """
    _checks.check_arrays(params=params)
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(each(_size, leaves))


def _size(w: Array) -> Array:
    if _is_key(w):
        return w
    eight_bits = jnp.issubdtype(w.dtype, jnp.floating) and w.dtype.itemsize < 2
    return jnp.abs(widen(w) if eight_bits else w)


def _is_key(w) -> bool:
    # NNX keeps the random keys of dropout layers in its states; they have no order.
    return isinstance(w, jax.Array) and jnp.issubdtype(w.dtype, jax.dtypes.extended)


def random(params: PyTree, *, key: Array) -> PyTree:
    """Draw uniform random scores in [0, 1), the control of every comparison.

    A parameter's numbers depend on the key and its path only. With one key the scores
    are the same at each call, so that a rising schedule removes more and never brings
    a weight back.

    Args:
      params: a tree of arrays; only their shapes and dtypes are read.
      key: a typed key, `jax.random.key(seed)`.

    Returns:
      A tree of arrays of the same shapes, sharded as the parameters are, larger = keep;
      in float32, or float64 for float64 parameters. (In 16 bits a few hundred numbers
      would be drawn, with ties.)

    Example:
      >>> import functools, jax, jaxsparse as js
      >>> score = functools.partial(js.scores.random, key=jax.random.key(0))
      >>> score({"w": jax.numpy.ones(3)})["w"].shape
      (3,)
    """
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_key(key)

    def draw(key: Array, w: Array) -> Array:
        floating = jnp.issubdtype(w.dtype, jnp.floating)
        if _is_key(w):
            return w
        u = jax.random.uniform(
            key, w.shape, wide_dtype(w.dtype) if floating else jnp.float32
        )
        return laid_out_like(u, w)

    return jax.tree.map(draw, keys_like(key, params), params)
