"""ISS-P: weights that are not wanted shrink a little in every step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _checks, patterns, scores
from jaxsparse._dtypes import widen
from jaxsparse._typing import Array, Sparsity, Where
from jaxsparse.tree import AxesRule, by_rules


def soft_shrink(
    sparsity: Sparsity,
    *,
    factor: float = 0.95,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    axes: AxesRule = None,
    min_keep: int = 1,
) -> optax.GradientTransformation:
    """Shrink the smallest weights by a factor after every step, as the LAST member.

    After the optimizer's update the lowest magnitudes, a fraction `sparsity` chosen
    anew in each step, are multiplied by `factor`; the others stay. So a weight that is
    not wanted fades over some dozens of steps, and may come back until then. After it
    prune for good and fine-tune: `js.prune(params, sparsity)`, `js.keep_sparse(masks)`.
    Bai et al. (2023, ISS-P, arXiv:2303.13047)::

        tx = optax.chain(optax.adam(1e-3), js.transforms.soft_shrink(0.9))

    Differs from the reference implementation, which removes `ceil(p n)` of a layer and
    never more than 99.5 %: here the count rule and `min_keep`.

    Args:
      sparsity: the fraction that shrinks, in [0, 1); a number, or a tree or mapping of
        them, as for `jaxsparse.patterns.masks`.
      factor: in [0, 1]; 0.95 in the paper. 0 is projection in every step (iterative
        hard thresholding).
      pattern: which weights shrink together, and which compete.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      min_keep: the least number of units that each group and each layer keeps.

    Returns:
      A gradient transformation without a state of its own.

    Raises:
      ValueError: a factor or sparsity out of range; at `update`, without
        `params`, or as for `jaxsparse.patterns.masks`.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = optax.chain(optax.sgd(0.0), js.transforms.soft_shrink(0.5, factor=0.5))
      >>> params = {"w": jnp.array([[4.0, 1.0]])}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([[4. , 0.5]], dtype=float32)}
    """
    _checks.check_number(least=0, most=1, factor=factor)
    _checks.check_pattern(patterns.Pattern, pattern)
    _checks.check_where(where)
    _checks.check_axes(axes)
    _checks.check_positive_int(min_keep, name="min_keep", least=0)
    if sparsity is None and not isinstance(pattern, patterns.NM):
        raise ValueError(f"{pattern} needs a sparsity, the fraction that shrinks.")
    if sparsity is not None and jax.tree_util.all_leaves([sparsity]):
        _checks.check_sparsity(sparsity)

    def update_fn(updates, state, params=None) -> tuple[Any, Any]:
        _checks.check_has_params(params)
        _checks.check_like(params, updates=updates)
        add = lambda w, u: (widen(w) + widen(u)).astype(w.dtype)
        moved = jax.tree.map(add, params, updates)
        asked, taken = by_rules(params, sparsity, where)
        masks = patterns.masks(
            scores.magnitude(moved),
            asked,
            pattern=pattern,
            where=taken,
            axes=axes,
            min_keep=min_keep,
        )
        return jax.tree.map(_shrunk, params, updates, masks), state

    def _shrunk(w: Array, u: Array, mask: Array) -> Array:
        if jnp.ndim(mask) == 0:
            return u
        whole = widen(w) + widen(u)
        return jnp.where(mask, widen(u), factor * whole - widen(w)).astype(u.dtype)

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
