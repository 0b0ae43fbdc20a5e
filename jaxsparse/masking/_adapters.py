"""Low-rank adapters on a pruned base that stays pruned."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import widen
from jaxsparse._typing import Array, PyTree, Tree, Where
from jaxsparse.patterns import check_masks
from jaxsparse.tree import (
    keys_like,
    leaves_with_paths,
    like,
    map_with_path,
    select,
)


class Adapter(NamedTuple):
    """A low-rank update `a b` of one kernel `[d_in, d_out]` (LoRA).

    Attributes:
      a: `[d_in, r]`, flax's `lora_a`.
      b: `[r, d_out]`, flax's `lora_b`.
    """

    a: Array
    b: Array


def init_adapters(
    params: PyTree, *, key: Array, rank: int = 8, where: Where = None
) -> PyTree:
    """Make adapters whose product is 0: `a` by He's uniform rule, `b` zeros.

    Hu et al. (2021, LoRA, arXiv:2106.09685).

    Args:
      params: the parameters; matrices among the selected ones take part.
      key: a typed key.
      rank: the rank of the updates.
      where: which parameters take part; see `jaxsparse.tree.select`.

    Returns:
      A tree with the structure of `params`: an `Adapter` for each kernel, None for
      parameters that take no part.

    Raises:
      ValueError: a selected parameter that is no matrix, `rank < 1`.
      TypeError: a `key` that is not a random key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> adapters = js.masking.init_adapters(
      ...     {"kernel": jnp.ones((6, 4))}, key=jax.random.key(0), rank=2)
      >>> adapters["kernel"].a.shape, adapters["kernel"].b.shape
      ((6, 2), (2, 4))
    """
    _checks.check_arrays(params=params)
    _checks.check_key(key)
    _checks.check_positive_int(rank, name="rank")

    def make(path: str, w: Array, take: bool, key: Array) -> Adapter | None:
        if not take:
            return None
        if w.ndim != 2:
            raise ValueError(
                f"{path}: adapters are of matrices; got shape {w.shape}. Leave it out "
                "with `where`."
            )
        draw = jax.nn.initializers.he_uniform()
        a = draw(key, (w.shape[0], rank), w.dtype)
        return Adapter(a, jnp.zeros((rank, w.shape[1]), w.dtype))

    return map_with_path(make, params, select(params, where), keys_like(key, params))


def with_adapters(
    params: Tree,
    adapters: PyTree,
    *,
    masks: PyTree = None,
    scaling: float | Array = 1.0,
) -> Tree:
    """Return `mask * (W + scaling * a b)`: the model with its adapters.

    Call it in the loss to train the adapters of a frozen model, and once afterwards to
    merge them. The mask applies to the sum, so a pruned model stays exactly as sparse
    as it was, while plain merging would fill its zeros::

        pruned, masks = js.prune(params, 0.5)
        adapters = js.masking.init_adapters(pruned, key=key)
        loss_fn = lambda adapters, batch: task_loss(
            js.masking.with_adapters(pruned, adapters, masks=masks), batch)
        ...
        merged = js.masking.with_adapters(pruned, adapters, masks=masks)

    `params` get no gradient. For `nnx.LoRA` collect `lora_a` and `lora_b` of each layer
    into an `Adapter`, and merge into the kernel.

    Args:
      params: the frozen parameters.
      adapters: by the parameters' paths, as `init_adapters` makes.
      masks: True = kept; None: nothing is masked.
      scaling: the factor of the products, `alpha / r` in LoRA.

    Returns:
      Parameters of the same structure and types.

    Raises:
      ValueError: adapters or masks that do not fit the parameters.
      TypeError: adapters that are not a tree of `Adapter`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> pruned, masks = js.prune({"w": jnp.array([[3.0, 1.0]])}, 0.5)
      >>> adapters = {"w": js.masking.Adapter(jnp.ones((1, 1)), jnp.ones((1, 2)))}
      >>> js.masking.with_adapters(pruned, adapters, masks=masks)
      {'w': Array([[4., 0.]], dtype=float32)}
    """
    named = _fitting(params, adapters)
    frozen = lax.stop_gradient(params)
    if masks is not None:
        masks = like(masks, params, name="masks")
        check_masks(masks, params)

    def one(path: str, w: Array, mask: Array | None = None) -> Array:
        if path in named:
            moved = _product(named[path].a, named[path].b)
            w = (widen(w) + jnp.asarray(scaling, moved.dtype) * moved).astype(w.dtype)
        return w if mask is None else jnp.where(mask, w, jnp.zeros((), w.dtype))

    return map_with_path(one, frozen, *([] if masks is None else [masks]))


def adapter_importance(
    params: PyTree,
    adapters: PyTree,
    grads: PyTree,
    *,
    scaling: float | Array = 1.0,
) -> PyTree:
    """Score weights by gradients of their adapters alone (LoRAPrune).

    `|G * (W + scaling * a b)|` with `G = a g_b + g_a b - g_a g_b`, the change of the
    product that a step of the adapters makes: a Taylor score without the dense gradient
    of any kernel. Average it over steps (`0.9 s + 0.1 new`), and sum it over coupled
    channels with `jaxsparse.channels.channel_scores`. Zhang et al. (2023, LoRAPrune,
    arXiv:2305.18403).

    Differs from the paper, which squares; like its code, this takes the magnitude. The
    code's normalization by each layer's norm is `jaxsparse.channels.normalize_norm`.

    Args:
      params: the frozen parameters.
      adapters: by the parameters' paths.
      grads: gradients of the loss with respect to the adapters.
      scaling: the factor of the products.

    Returns:
      A tree with the structure of `params`: scores, larger = keep, float32 at least,
      and None for parameters without an adapter.

    Raises:
      ValueError: adapters or gradients that do not fit.
      TypeError: adapters that are not a tree of `Adapter`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.array([[3.0, 1.0]])}
      >>> adapters = {"w": js.masking.Adapter(jnp.ones((1, 1)), jnp.zeros((1, 2)))}
      >>> grads = {"w": js.masking.Adapter(jnp.zeros((1, 1)), jnp.ones((1, 2)))}
      >>> js.masking.adapter_importance(params, adapters, grads)
      {'w': Array([[3., 1.]], dtype=float32)}
    """
    named = _fitting(params, adapters)
    along = _by_path(grads, "grads")
    _checks.check_like(adapters, of="adapters", grads=grads)

    def one(path: str, w: Array) -> Array | None:
        if path not in named:
            return None
        (a, b), (g_a, g_b) = named[path], along[path]
        change = _product(a, g_b) + _product(g_a, b) - _product(g_a, g_b)
        whole = widen(w) + jnp.asarray(scaling, change.dtype) * _product(a, b)
        return jnp.abs(change * whole)

    return map_with_path(one, params)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(widen(a), widen(b), precision=lax.Precision.HIGHEST)


def _by_path(adapters: PyTree, name: str) -> dict[str, Adapter]:
    """The adapter of each parameter that has one."""
    is_own = lambda x: isinstance(x, Adapter)
    leaves, treedef = jax.tree.flatten(adapters, is_leaf=is_own)
    if not leaves or not all(map(is_own, leaves)):
        raise TypeError(
            f"{name}: a tree of js.masking.Adapter(a, b) by the parameters' paths, as "
            "js.masking.init_adapters(params, ...) makes."
        )
    numbers: Any = treedef.unflatten(range(len(leaves)))
    return {path: leaves[i] for path, i in leaves_with_paths(numbers)}


def _fitting(params: PyTree, adapters: PyTree) -> dict[str, Adapter]:
    """The adapters by path; raises where they do not fit their base."""
    _checks.check_arrays(params=params, adapters=adapters)
    named, owners = _by_path(adapters, "adapters"), dict(leaves_with_paths(params))
    for path, (a, b) in named.items():
        w = owners.get(path)
        if w is None:
            raise ValueError(
                f"adapters: {path or 'that'} is no parameter. "
                "js.masking.init_adapters(params, ...) makes adapters for these."
            )
        fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
        if not fits or (a.shape[0], b.shape[1]) != jnp.shape(w):
            raise ValueError(
                f"adapters: {path or 'that'} has factors of shapes {a.shape} and "
                f"{b.shape}, which do not fit a kernel of shape {jnp.shape(w)}."
            )
    return named
