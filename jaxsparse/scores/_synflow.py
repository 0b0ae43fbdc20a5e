"""Synaptic flow: a score without data that never cuts a layer off."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import widen
from jaxsparse._typing import Array, PyTree
from jaxsparse.scores._range import product


def synflow(
    apply_fn: Callable[[PyTree, Any], Array], params: PyTree, inputs: Any
) -> PyTree:
    """Score by `|w| * dR/d|w|` with `R = sum(apply_fn(|params|, ones))`.

    The score is the flow of all paths through a weight when all weights are positive
    and all inputs are 1. It needs no data. Its sum is the same for every layer, so a
    global selection that is repeated with fresh scores never removes a whole layer; a
    single cut may. Tanaka et al. (2020, arXiv:2006.05467) take 100 rounds::

        js.prune(params, 0.98, score=lambda p: js.scores.synflow(apply_fn, p, x),
                 pattern=js.Unstructured(scope="global"), steps=100)

    Differs from the reference implementation, which computes in float64: `R` is a
    product over layers and leaves float32's range in nets of some dozens of layers
    without normalization. Infinite scores tie, and `jaxsparse.patterns.masks` raises
    for NaN only: turn on `jax_enable_x64` for such nets. Batch norm has to run on its
    stored statistics.

    For sharded parameters the gradient's sums are added up in another order than on one
    device. Scores differ in the last place, and where many nearly tie, a few weights in
    a thousand may be chosen differently. In float64 that is far rarer.

    Args:
      apply_fn: `apply_fn(params, inputs) -> outputs`, linear in its inputs but for
        activations that pass positive numbers on (ReLU). Parameters and inputs are
        cast to float32 first where they have fewer bits.
      params: a tree of arrays.
      inputs: an example input, of any values: its shape, dtype and structure count.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, not negative, larger =
      keep.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> apply = lambda params, x: x @ params["a"] @ params["b"]
      >>> params = {"a": jnp.array([[-1.0, 2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> scores = js.scores.synflow(apply, params, jnp.zeros((1, 1)))
      >>> scores["a"].tolist(), scores["b"].tolist()
      ([[3.0, 2.0]], [[3.0], [2.0]])
    """
    _checks.check_callable(2, apply_fn=apply_fn)
    _checks.check_arrays(params=params)
    positive = jax.tree.map(lambda w: jnp.abs(widen(w)), params)
    _checks.check_arrays(inputs=inputs)
    ones = jax.tree.map(lambda x: widen(jnp.ones_like(x)), inputs)
    flow = lambda p: jnp.sum(apply_fn(p, ones))
    with _checks.explained("apply_fn", params=params, inputs=inputs):
        slopes = jax.grad(flow)(positive)
    return jax.tree.map(product, positive, slopes)
