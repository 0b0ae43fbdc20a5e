"""Top-k with error feedback, and Deep Gradient Compression."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

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


class FeedbackState(NamedTuple):
    """The state of `top_k` and `dgc`.

    Attributes:
      step: the number of updates, int32.
      velocity: each worker's momentum, with an axis of workers in front; None for
        leaves without momentum.
      unsent: the entries that each worker has not sent yet, laid out in the same way.
      bytes_moved: the bytes that each worker has sent so far to each other worker,
        float32.
    """

    step: Array
    velocity: PyTree
    unsent: PyTree
    bytes_moved: Array

    PER_WORKER = ("velocity", "unsent")


def top_k(
    fraction: float,
    *,
    axis_name: AxisName,
    workers: int,
    error_feedback: bool = True,
) -> optax.GradientTransformation:
    """Exchange the largest entries of each gradient, and remember the others.

    Each worker adds the entries `e` that it has not sent yet to its gradient, `v = e +
    g`. Of each matrix it sends the `ceil(fraction * n)` entries with the largest `|v|`,
    as values and indices, and keeps the others as the new `e`. The update is the mean
    over workers of the entries sent. Vectors and scalars, such as biases, are sent
    whole. Seide et al. (2014), Stich et al. (2018, arXiv:1809.07599).

    Error feedback is analyzed for plain SGD and works best before it. Delayed entries
    arrive late and large, and momentum after the exchange repeats them for too long;
    `dgc` applies its momentum before the choice.

    Place it first in a chain, before any optimizer, within `jax.shard_map`, where each
    worker has the gradients of its own batch::

        tx = optax.chain(
            js.exchange.top_k(0.01, axis_name="data", workers=8), optax.adam(1e-3))
        opt_state = tx.init(params)
        split = js.exchange.specs(opt_state, "data")

        def step(params, opt_state, batch):
            params_here = jax.lax.pcast(params, "data", to="varying")
            grads = jax.grad(loss_fn)(params_here, batch)      # of this worker alone
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        step = jax.jit(jax.shard_map(
            step, mesh=mesh, in_specs=(P(), split, P("data")), out_specs=(P(), split)))

    (Without `pcast` JAX adds the gradients up over all workers, densely.)

    Args:
      fraction: of the entries of each matrix, in (0, 1].
      axis_name: the mesh axis, or axes, of the workers.
      workers: the number of workers.
      error_feedback: whether to remember entries that were not sent. Without it small
        entries are lost.

    Returns:
      A gradient transformation. Its state is a `FeedbackState`.

    Raises:
      ValueError: a fraction out of range; at `update`, outside of `shard_map`, a state
        that is not split over the workers, another number of them.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> tx = js.exchange.top_k(0.25, axis_name="data", workers=1)
      >>> state = tx.init({"w": jnp.zeros((2, 2))})
      >>> state.unsent["w"].shape
      (1, 2, 2)
    """
    _checks.check_bool(error_feedback=error_feedback)
    return _feedback(
        [fraction], 0, axis_name, workers, 0.0, nesterov=False, remembers=error_feedback
    )


def dgc(
    fraction: float,
    *,
    axis_name: AxisName,
    workers: int,
    momentum: float = 0.9,
    nesterov: bool = False,
    warmup_steps: int = 0,
    warmups: int = 5,
) -> optax.GradientTransformation:
    """Exchange the largest entries of accumulated momentum.

    Deep Gradient Compression, Lin et al. (2018, arXiv:1712.01887). For each matrix, `u
    = momentum * u + g; v = v + u`; a worker sends the `ceil(fraction * n)` entries with
    the largest `|v|`, and clears both `u` and `v` there (momentum factor masking). The
    update is the mean of the entries sent; vectors are sent whole, with the same
    momentum. The update includes momentum, so follow it by plain SGD,
    `optax.chain(js.exchange.dgc(0.001, ...), optax.sgd(rate))`, and add weight decay
    there too. Clip the worker's own gradients before it.

    Over the first `warmup_steps` the fraction falls in `warmups` equal phases, `c, c^2,
    ...` with `c = fraction ** (1 / (warmups + 1))`, e.g. 0.316, 0.1, ... for 0.001.

    Differs from the reference implementation, which samples a threshold and takes
    between 0.8 and 1.3 times the count: here the count is exact.

    Args:
      fraction: of the entries of each matrix, in (0, 1]; 0.001 in the paper.
      axis_name: the mesh axis, or axes, of the workers.
      workers: the number of workers.
      momentum: in [0, 1).
      nesterov: `u = momentum * (u + g); v = v + u + g`.
      warmup_steps: the number of steps of the warm-up; 0 for none.
      warmups: the number of phases of the warm-up.

    Returns:
      A gradient transformation. Its state is a `FeedbackState`, two copies of the
      matrices on each worker.

    Raises:
      ValueError: arguments out of range; at `update`, as for `top_k`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> tx = js.exchange.dgc(0.001, axis_name="data", workers=4)
      >>> state = tx.init({"w": jnp.zeros((2, 2))})
      >>> state.velocity["w"].shape
      (4, 2, 2)
    """
    _checks.check_number(least=0, below=1, momentum=momentum)
    _checks.check_bool(nesterov=nesterov)
    _checks.check_positive_int(warmup_steps, name="warmup_steps", least=0)
    _checks.check_positive_int(warmups, name="warmups")
    _checks.check_number(above=0, most=1, fraction=fraction)
    factor = fraction ** (1 / (warmups + 1))
    phases = [factor ** (i + 1) for i in range(warmups)] if warmup_steps else []
    return _feedback(
        [*phases, fraction],
        warmup_steps,
        axis_name,
        workers,
        momentum,
        nesterov=nesterov,
        remembers=True,
    )


def _feedback(
    fractions: Sequence[float],
    warmup_steps: int,
    axis_name: AxisName,
    workers: int,
    momentum: float,
    *,
    nesterov: bool,
    remembers: bool,
) -> optax.GradientTransformation:
    for fraction in fractions:
        _checks.check_number(above=0, most=1, fraction=fraction)
    check_workers(workers, axis_name)

    def init_fn(params: PyTree) -> FeedbackState:
        none = jax.tree.map(lambda _: None, params)
        memory = functools.partial(empty_memory, params, workers)
        return FeedbackState(
            step=jnp.asarray(np.zeros((), np.int32)),
            velocity=memory(least_ndim=0) if momentum else none,
            unsent=memory(least_ndim=2) if remembers else none,
            bytes_moved=zero_bytes(),
        )

    def update_fn(updates, state, params=None):
        del params
        check_within_shard_map(axis_name, workers)
        phase = state.step * (len(fractions) - 1) // max(1, warmup_steps)
        phase = jnp.minimum(phase, len(fractions) - 1)
        send = lambda v: _send(v, fractions, phase, axis_name)

        def one(path: str, g: Array, u: Array | None, v: Array | None):
            u = None if u is None else own_memory(path, u, g)
            v = None if v is None else own_memory(path, v, g)
            given, u = _with_momentum(g, u, momentum, nesterov)
            if jnp.ndim(g) < 2:
                moved = jnp.float32(g.size * g.dtype.itemsize)
                return mean(given, axis_name), _back(u), None, moved
            total = given if v is None else v + given
            sent, cleared, moved = send(total)
            u = None if u is None else cleared(u)
            return sent, _back(u), None if v is None else _back(cleared(total)), moved

        paths = map_with_path(lambda path, _: path, updates)
        none = lambda x: x is None
        leaves, treedef = jax.tree.flatten(updates)
        given = zip(
            jax.tree.leaves(paths),
            leaves,
            jax.tree.leaves(state.velocity, is_leaf=none),
            jax.tree.leaves(state.unsent, is_leaf=none),
            strict=True,
        )
        mean_grads, velocity, unsent, moved = zip(
            *[one(*x) for x in given], strict=True
        )
        return treedef.unflatten(mean_grads), FeedbackState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            velocity=treedef.unflatten(velocity),
            unsent=treedef.unflatten(unsent),
            bytes_moved=state.bytes_moved + sum(moved),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _back(memory: Array | None) -> Array | None:
    """A worker's memory with its axis of workers."""
    return None if memory is None else memory[None]


def _with_momentum(
    g: Array, u: Array | None, momentum: float, nesterov: bool
) -> tuple[Array, Array | None]:
    """What a step adds, and the new momentum."""
    if u is None:
        return g, None
    if nesterov:
        u = momentum * (u + g)
        return u + g, u
    u = momentum * u + g
    return u, u


def _send(
    v: Array, fractions: Sequence[float], phase: Array, axis_name: AxisName
) -> tuple[Array, Callable[[Array], Array], Array]:
    """The mean of what workers send of `v`, how to clear that, and its bytes."""

    def at(fraction: float, v: Array) -> tuple[Array, Array, Array]:
        values, indices = largest(v, count_of(fraction, v))
        sent = mean_of_sent(values, indices, v, axis_name)
        gone = jnp.ones(v.size, bool).at[indices].set(False, unique_indices=True)
        moved = jnp.float32(bytes_sent(values, indices))
        return sent, gone.reshape(v.shape), moved

    if len(fractions) == 1:
        sent, left, moved = at(fractions[0], v)
    else:
        branches: Any = [lambda v, f=f: at(f, v) for f in fractions]
        sent, left, moved = lax.switch(phase, branches, v)
    return sent, lambda x: jnp.where(left, x, jnp.zeros((), x.dtype)), moved
