"""EF21: workers exchange what is new in their gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree
from jaxsparse.exchange._largest import (
    bytes_sent,
    count_of,
    largest,
    mean,
    mean_of_sent,
)
from jaxsparse.exchange._workers import (
    AxisName,
    check_within_shard_map,
    check_workers,
    empty_memory,
    own_memory,
    zero_bytes,
)
from jaxsparse.tree import map_with_path


class EF21State(NamedTuple):
    """The state of `ef21`.

    Attributes:
      own: each worker's estimate of its gradient, with an axis of workers in front;
        None for vectors.
      mean: the mean of all estimates, the same on all workers; None likewise.
      bytes_moved: the bytes that each worker has sent so far to each other worker,
        float32.
    """

    own: PyTree
    mean: PyTree
    bytes_moved: Array

    PER_WORKER = ("own",)


def ef21(
    fraction: float,
    *,
    axis_name: AxisName,
    workers: int,
    weight: Array | float | None = None,
) -> optax.GradientTransformation:
    """Exchange the largest entries of the change of each gradient.

    Each worker keeps an estimate `h` of its gradient: it sends `c`, the `ceil(fraction
    * n)` largest entries of `g - h` of each matrix, and `h = h + c`; the update is the
    mean of all estimates, which moves by the mean of the entries sent. Vectors are sent
    whole. Richtarik et al. (2021, EF21, arXiv:2106.05203); with plain gradient descent
    it converges for rates up to `1 / (L + L2 sqrt(b / t))`, `t = 1 - sqrt(1 -
    fraction)`, `b = (1 - fraction) / t`.

    With `weight` it is EF21-W (Richtarik et al., 2024, arXiv:2402.10774): a worker
    compresses `g / (workers * weight)`, and the estimates are averaged by the weights
    `weight_i = L_i / sum(L)`, with `L_i` the smoothness of each worker's loss.

    The method assumes exact gradients. With small batches the changes are mostly noise,
    and `dgc` and `top_k` do better. Place it in the chain as `top_k`.

    Args:
      fraction: of the entries of each matrix, in (0, 1].
      axis_name: the mesh axis, or axes, of the workers.
      workers: the number of workers.
      weight: the weight of this worker (within `shard_map`,
        `weights[jax.lax.axis_index(axis_name)]`); the weights of all workers add up to
        1.

    Returns:
      A gradient transformation. Its state is an `EF21State`.

    Raises:
      ValueError: a fraction out of range; at `update`, as for `top_k`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> tx = js.exchange.ef21(0.1, axis_name="data", workers=2)
      >>> tx.init({"w": jnp.zeros((2, 2))}).own["w"].shape
      (2, 2, 2)
    """
    _checks.check_number(above=0, most=1, fraction=fraction)
    check_workers(workers, axis_name)

    def init_fn(params: PyTree) -> EF21State:
        matrix = lambda w: jnp.zeros_like(w) if jnp.ndim(w) > 1 else None
        return EF21State(
            own=empty_memory(params, workers, least_ndim=2),
            mean=jax.tree.map(matrix, params),
            bytes_moved=zero_bytes(),
        )

    def update_fn(updates, state, params=None):
        del params
        check_within_shard_map(axis_name, workers)
        share = 1.0 if weight is None else jnp.asarray(weight) * workers

        def one(path: str, g: Array, own: Array | None, total: Array | None):
            if own is None or total is None:
                moved = jnp.float32(g.size * g.dtype.itemsize)
                return mean(g, axis_name), None, None, moved
            own = own_memory(path, own, g)
            here = jnp.asarray(share, g.dtype)
            values, indices = largest(g / here - own, count_of(fraction, g))
            own = own.ravel().at[indices].add(values, unique_indices=True)
            total = total + mean_of_sent(values * here, indices, g, axis_name)
            moved = jnp.float32(bytes_sent(values, indices))
            return total, own.reshape(1, *g.shape), total, moved

        none = lambda x: x is None
        leaves, treedef = jax.tree.flatten(updates)
        given = zip(
            jax.tree.leaves(map_with_path(lambda path, _: path, updates)),
            leaves,
            jax.tree.leaves(state.own, is_leaf=none),
            jax.tree.leaves(state.mean, is_leaf=none),
            strict=True,
        )
        found, own, total, moved = zip(*[one(*x) for x in given], strict=True)
        return treedef.unflatten(found), EF21State(
            own=treedef.unflatten(own),
            mean=treedef.unflatten(total),
            bytes_moved=state.bytes_moved + sum(moved),
        )

    return optax.GradientTransformation(init_fn, update_fn)
