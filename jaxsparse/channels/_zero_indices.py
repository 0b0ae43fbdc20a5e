"""`zero_indices`: what a training has emptied."""

from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._host import on_host
from jaxsparse._typing import PyTree
from jaxsparse._zeros import nonzero
from jaxsparse.channels.slices import PRODUCERS, check_params, paths_of, slices_of
from jaxsparse.channels.sums import sums
from jaxsparse.coupling.drop import Drop, drop_of
from jaxsparse.coupling.grouping import Group
from jaxsparse.tree import leaves_with_paths


def zero_indices(
    params: PyTree,
    groups: Mapping[str, Group],
    *,
    roles: Collection[str] = PRODUCERS,
) -> Drop:
    """Find the channels whose weights are all exactly zero after training.

    Call it after `js.penalties.prox_group_lasso` or `js.contrib.wgsef_prox`, and pass
    the result to `js.narrowing.narrow`. A group that is zero as a whole keeps its first
    channel.

    Args:
      params: the parameters, with values.
      groups: groups by name, all of them prunable.
      roles: which members must be zero; the same as in training.

    Returns:
      A `Drop`. Each copy of a group loses as many channels as the copy with the fewest
      zeros has.

    Raises:
      ValueError: groups that are not prunable or not of these parameters.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.array([[1.0, 0.0, 2.0]]), "down": jnp.ones((3, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 1))))
      >>> js.channels.zero_indices(params, groups.prunable)
      Drop(indices={'up[1]': array([1], dtype=int32)}, sizes={'up[1]': 3})
    """
    _checks.check_arrays(params=params)
    slices = slices_of(groups, roles=roles)
    check_params(slices, params)
    leaves = dict(leaves_with_paths(params))
    here = [path for path in paths_of(slices) if path in leaves]
    used = {path: jnp.asarray(nonzero(leaves[path]), jnp.float32) for path in here}
    marked = {name: np.array(on_host(n) == 0) for name, n in sums(slices, used).items()}
    for x in marked.values():
        x[x.all(-1), 0] = False
    return drop_of(marked)
