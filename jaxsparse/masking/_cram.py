"""CrAM: gradients at a compressed point, so that one-shot pruning costs little."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks, patterns, scores
from jaxsparse._dtypes import widen
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.patterns.selection import choose
from jaxsparse.tree import AxesRule


def cram(
    loss_fn: Callable[..., Any],
    *,
    sparsities: Sequence[float] = (0.5, 0.7, 0.9),
    choices: Sequence[patterns.Pattern] = (patterns.Unstructured("global"),),
    rho: float = 0.05,
    plus: bool = True,
    sparse_grads: bool = True,
    where: Where = None,
    axes: AxesRule = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    """Return a `jax.value_and_grad` that trains a network to withstand compression.

    With `g` the gradient at `w`, it prunes the perturbed weights by their magnitudes
    over all layers, `v = C(w + rho * g)`, and takes the gradient `h` there; the result
    is `h`, or `h + g` with `plus`. The sparsity of `C` is drawn anew in each call.
    Peste et al. (2022, CrAM, arXiv:2207.14200). Any optimizer takes the result, and no
    mask is kept::

        value_and_grad = js.masking.cram(loss_fn, sparsities=(0.5, 0.7, 0.9))
        loss, grads = value_and_grad(params, batch, key=step_key)
        updates, opt_state = optimizer.update(grads, opt_state, params)

    Each step computes two gradients. Afterwards `js.prune(params, 0.9,
    pattern=js.Unstructured("global"))` costs little accuracy at any of the sparsities.
    For networks with BatchNorm, estimate its statistics again after pruning.

    Differs from the reference implementation, which keeps the weights strictly above
    the threshold, and so one fewer than the count rule; and from SAM
    (`optax.contrib.sam`), which normalizes `g` and does not prune.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> loss`, or `(loss, aux)` with
        `has_aux`. The loss and `aux`, batch statistics for instance, are those of the
        plain pass at `w`.
      sparsities: fractions to remove, in [0, 1), of which each call draws one.
      choices: patterns of which each call draws one, `(js.NM(2, 4), js.NM(4, 8))` for
        instance; N:M patterns have a sparsity of their own.
      rho: the length of the perturbation, relative to the gradient's.
      plus: whether to add the gradient at `w` (CrAM+), which keeps the dense network
        accurate.
      sparse_grads: whether to use `h` only for the weights that `C` keeps.
      where: which parameters are pruned; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      `f(params, *args, key, **kwargs) -> (loss, grads)`, or `((loss, aux), grads)`.

    Raises:
      ValueError: no sparsity or pattern; a sparsity outside [0, 1); a negative `rho`;
        or as for `jaxsparse.patterns.masks`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> loss_fn = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
      >>> value_and_grad = js.masking.cram(loss_fn, sparsities=(0.5,), rho=0.0)
      >>> params = {"w": jnp.array([[3.0], [1.0]])}
      >>> value_and_grad(params, jnp.eye(2), key=jax.random.key(0))
      (Array(10., dtype=float32), {'w': Array([[12.],
             [ 2.]], dtype=float32)})
    """
    _checks.check_callable(None, loss_fn=loss_fn)
    _checks.check_number(least=0, rho=rho)
    _checks.check_bool(plus=plus, sparse_grads=sparse_grads, has_aux=has_aux)
    _checks.check_where(where)
    _checks.check_axes(axes)
    given = isinstance(sparsities, Sequence) and isinstance(choices, Sequence)
    if not given or not sparsities or not choices:
        raise ValueError(
            "cram draws one of `sparsities` and one of `choices` in each call: they "
            f"are tuples with at least one; got {sparsities=}, {choices=}."
        )
    for sparsity in sparsities:
        _checks.check_sparsity(sparsity, name="sparsities: a sparsity")
    for pattern in choices:
        _checks.check_pattern(patterns.Pattern, pattern)
    gradient = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def chosen(params: PyTree, pattern: patterns.Pattern, sparsity: Array) -> PyTree:
        own = isinstance(pattern, patterns.NM)
        return choose(
            params,
            None if own else sparsity,
            pattern=pattern,
            where=where,
            axes=axes,
            of=scores.magnitude,  # which need not be held
        )[0]

    def value_and_grad(params: PyTree, *args: Any, key: Array, **kwargs: Any):
        _checks.check_key(key)
        value, grads = gradient(params, *args, **kwargs)
        moved = jax.tree.map(lambda w, g: _ascend(w, g, rho), params, grads)
        of_sparsity, of_pattern = jax.random.split(key)
        sparsity = jax.random.choice(of_sparsity, jnp.asarray(sparsities))
        masks = _one_of(
            of_pattern,
            [
                lambda moved, pattern=pattern: chosen(moved, pattern, sparsity)
                for pattern in choices
            ],
            moved,
        )
        pruned = patterns.apply(moved, masks)
        sparse = gradient(pruned, *args, **kwargs)[1]
        if sparse_grads:
            sparse = patterns.apply(sparse, masks)
        if plus:
            sparse = jax.tree.map(jnp.add, sparse, grads)
        return value, sparse

    return value_and_grad


def _ascend(w: Array, grad: Array, rho: float) -> Array:
    return (widen(w) + rho * widen(grad)).astype(w.dtype)


def _one_of(key: Array, functions: list[Callable], x: PyTree) -> PyTree:
    """The result of one of some functions, drawn at random."""
    if len(functions) == 1:
        return functions[0](x)
    shapes = [jax.tree.map(jnp.shape, jax.eval_shape(f, x)) for f in functions]
    if any(shape != shapes[0] for shape in shapes):  # of channels beside weights
        raise ValueError(
            "cram: `choices` have masks of different shapes, and one program takes "
            "them all. Broadcast each mask to its parameter."
        )
    return lax.switch(jax.random.randint(key, (), 0, len(functions)), functions, x)
