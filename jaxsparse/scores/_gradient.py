"""Scores from gradients: what the loss says of each weight, to first order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype, widen
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.linalg.ordered_sums import largest, ordered_sum
from jaxsparse.scores._range import fourth_root, lifted, product
from jaxsparse.tree import like, select


def taylor(params: PyTree, grads: PyTree) -> PyTree:
    """Score by `|w * g|`, the first-order change of the loss when a weight is removed.

    `L(w) - L(w with w_i = 0) = g_i w_i + O(w_i^2)`. Molchanov et al. (2016,
    arXiv:1611.06440) for filters; called saliency in JaxPruner. The gradient of one
    mini-batch is noisy: average over several, or see `moving_average`.

    Scores below 1e-24 are raised in order, so none ties with 0.

    Sharded parameters and gradients exchange nothing. Computing the gradient may gather
    parameters that are sharded over more than the batch; that depends on the model.

    Args:
      params: a tree of arrays.
      grads: the loss's gradient, of the same structure and shapes.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep.

    Raises:
      ValueError: gradients of another structure or shape, or with NaN (in eager use;
        under jit their scores are NaN, which counts as the lowest).
      TypeError: a leaf that is not an array.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params, grads = {"w": jnp.array([-2.0, 1.0])}, {"w": jnp.array([0.5, 3.0])}
      >>> js.scores.taylor(params, grads)
      {'w': Array([1., 3.], dtype=float32)}
    """
    grads = like(grads, params, name="grads")
    _checks.check_like(params, grads=grads)
    _checks.check_all_numbers(grads=grads)
    one = lambda w, g: product(widen(w), g.astype(wide_dtype(w.dtype)))
    return jax.tree.map(one, params, grads)


def snip(params: PyTree, grads: PyTree, *, where: Where = None) -> PyTree:
    """Score by connection sensitivity at initialization, `|w * g| / sum |w * g|`.

    The score is the derivative of the loss with respect to a gate on each weight, at
    gate 1, normalized over the selected parameters. Lee, Ajanthan & Torr (2019,
    arXiv:1810.02340). The order is that of `taylor`; the normalization makes scores of
    different batches comparable, so that they may be averaged. The sum is the same bits
    however the parameters are sharded.

    Args:
      params: a tree of arrays.
      grads: the loss's gradient on one batch, of the same structure and shapes.
      where: the parameters that the sum runs over; see `jaxsparse.tree.select`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep. The
      scores of the selected parameters add up to 1.

    Raises:
      ValueError: as for `taylor`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.array([[-2.0, 1.0]])}
      >>> grads = {"w": jnp.array([[0.5, 3.0]])}
      >>> js.scores.snip(params, grads)
      {'w': Array([[0.25, 0.75]], dtype=float32)}
    """
    sensitivity = taylor(params, grads)
    selected = jax.tree.leaves(select(params, where))
    wide = jnp.result_type(float)  # a sum in 16 bits stalls or overflows
    counted = [
        _total(s).astype(wide)
        for s, take in zip(jax.tree.leaves(sensitivity), selected, strict=True)
        if take
    ]
    total = sum(counted, start=jnp.zeros((), wide))
    # All gradients zero: no weight is better than another, and 0/0 is no score.
    total = jnp.where(total > 0, total, jnp.ones_like(total))
    root = fourth_root(total)

    def share(s: Array) -> Array:
        s = s.astype(wide)
        return lifted(s / total, fourth_root(s) / root)

    return jax.tree.map(lambda s: share(s).astype(s.dtype), sensitivity)


def _total(x: Array) -> Array:
    axes = tuple(range(x.ndim))
    if not x.size:
        return jnp.sum(x)
    most = largest(x, axes)
    return ordered_sum(x, axes, lambda total: total, most, most, x.size).reshape(())


def grasp(
    loss_fn: Callable[[PyTree, Any], Array], params: PyTree, batch: Any
) -> PyTree:
    """Score by `w * (H g)`, a weight's part in the gradient flow at initialization.

    Removing weight i changes `|g|^2` by `-2 w_i (H g)_i` to first order; GraSP keeps
    the weights whose removal would reduce the gradient flow most. `H g` costs two
    gradients (forward-over-reverse), and no Hessian is formed. Wang, Zhang & Grosse
    (2020, arXiv:2002.07376).

    Differs from the reference implementation, whose score is the negative (it removes
    the largest), divided by the sum of magnitudes (no matter for the order), and which
    divides the logits by a temperature of 200 and sums over batches: put a temperature
    into `loss_fn`, and average over batches.

    For sharded parameters the two gradients communicate as they do without this score,
    and round as the model's sums do: scores of one device differ in the last place.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`. Parameters and batch are cast to
        float32 first where they have fewer bits, because products of three derivatives
        overflow narrower types.
      params: a tree of arrays.
      batch: the batch for `loss_fn`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, of either sign, larger =
      keep.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> loss = lambda params, x: jnp.sum((params["w"] * x) ** 2) / 2
      >>> js.scores.grasp(loss, {"w": jnp.array([1.0, 2.0])}, jnp.array([1.0, 2.0]))
      {'w': Array([ 1., 64.], dtype=float32)}
    """
    _checks.check_callable(2, loss_fn=loss_fn)
    _checks.check_arrays(params=params)
    wide = lambda x: widen(x) if hasattr(x, "dtype") else x
    params, batch = jax.tree.map(wide, (params, batch))
    gradient = lambda p: jax.grad(loss_fn)(p, batch)
    with _checks.explained("loss_fn", params=params, batch=batch):
        g = gradient(params)
        _, hessian_gradient = jax.jvp(gradient, (params,), (g,))
    signed = lambda w, hg: jnp.sign(w) * jnp.sign(hg) * product(w, hg)
    return jax.tree.map(signed, params, hessian_gradient)
