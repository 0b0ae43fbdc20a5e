"""What each worker remembers: arrays with an axis of workers, of which it sees one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree

AxisName = str | tuple[str, ...]


def specs(opt_state: optax.OptState, axis_name: AxisName) -> PyTree:
    """Return how an optimizer state is laid out over workers, for `jax.shard_map`.

    The states of `top_k`, `dgc` and `ef21` hold arrays that differ between workers and
    have an axis of workers in front. They are split along that axis; all other arrays
    are replicated.

    Args:
      opt_state: the state, or its shapes.
      axis_name: the mesh axis, or axes, of the workers.

    Returns:
      A tree of `PartitionSpec` with the structure of `opt_state`.

    Raises:
      TypeError: an `axis_name` that is not a name or a tuple of names.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> tx = js.exchange.dgc(0.01, axis_name="data", workers=8)
      >>> state = tx.init({"w": jnp.ones((4, 4))})
      >>> split = js.exchange.specs(state, "data")
      >>> split.unsent["w"] == jax.P("data"), split.step == jax.P()
      (True, True)
    """
    _check_names(axis_name)

    def one(state: Any) -> Any:
        if not _has_memory(state):
            return P()
        own = {
            name: jax.tree.map(lambda _: P(axis_name), value)
            if name in type(state).PER_WORKER
            else jax.tree.map(lambda _: P(), value)
            for name, value in state._asdict().items()
        }
        return type(state)(**own)

    return jax.tree.map(one, opt_state, is_leaf=_has_memory)


def _has_memory(state: Any) -> bool:
    """States name the fields that have an axis of workers in front."""
    return bool(getattr(type(state), "PER_WORKER", ()))


def check_workers(workers: int, axis_name: AxisName) -> None:
    """Raises unless the arguments are a number of workers and mesh axes."""
    _checks.check_positive_int(workers, name="workers")
    _check_names(axis_name)


def _check_names(axis_name: AxisName) -> None:
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            "axis_name is the name of a mesh axis, or a tuple of names; got "
            f"{axis_name!r}."
        )


def empty_memory(params: PyTree, workers: int, *, least_ndim: int) -> PyTree:
    """Zeros for each worker and each parameter of so many axes; None for others."""

    def one(w: Array) -> Array | None:
        if jnp.ndim(w) < least_ndim:
            return None
        return jnp.zeros((workers, *jnp.shape(w)), w.dtype)

    return jax.tree.map(one, params)


def check_within_shard_map(axis_name: AxisName, workers: int) -> None:
    """Raises outside of `shard_map`, and where the workers are of another number."""
    try:
        found = int(lax.axis_size(axis_name))
    except NameError:
        raise ValueError(
            f"No mesh axis {axis_name!r} here: workers exchange gradients within "
            "jax.shard_map over it. Call the optimizer's update in the function that "
            "shard_map runs, on the gradients of the worker's own batch."
        ) from None
    if found != workers:
        raise ValueError(
            f"{workers=}, but the mesh axis {axis_name!r} has {found} devices."
        )


def own_memory(path: str, memory: Array, grad: Array) -> Array:
    """A worker's own part of what all remember."""
    if memory.shape != (1, *grad.shape):
        raise ValueError(
            f"{path}: this worker sees a memory of shape {memory.shape} of a gradient "
            f"of shape {grad.shape}, not (1, ...): split the state over the workers, "
            "with in_specs and out_specs of js.exchange.specs(opt_state, axis_name)."
        )
    return memory[0]


def zero_bytes() -> Array:
    """The counter of bytes, float32."""
    return jnp.asarray(np.zeros((), np.float32))
