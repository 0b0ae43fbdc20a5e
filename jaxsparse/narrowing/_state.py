"""`narrow_like`: optimizer states, masks and averages, cut along."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.coupling.drop import Drop
from jaxsparse.narrowing._arrays import cut_array
from jaxsparse.narrowing._plan import plan
from jaxsparse.primitives import axes as algebra
from jaxsparse.tracing import Trace


def narrow_like(
    trace: Trace,
    tree: PyTree,
    drop: "Drop | Mapping[str, Any]",
    *,
    allow: Collection[str] = (),
) -> PyTree:
    """Cut moments and masks as `narrow` cuts their parameters.

    Leaves are recognized by their place: those whose path ends with a parameter's path,
    as the moments in the state of Adam do, wherever they are nested (chains, masked and
    partitioned optimizers, train states). They are cut along each axis in which they
    are as long as the parameter; axes of one index stay (masks that broadcast). All
    other leaves (counters, numbers, keys) stay, and so do empty stand-ins.

    Args:
      trace: the trace of the model.
      tree: an optimizer's state, masks, averaged parameters, or all in one tree.
      drop: the channels to remove; see `narrow`.
      allow: as given to `narrow`.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: a leaf at a parameter's place that has another shape and cannot be cut
        (a factored moment), with both names; make that state anew with the optimizer's
        `init`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js, optax
      >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> trace = js.trace(apply_fn, params, jnp.ones((2, 4)))
      >>> state = optax.adam(1e-3).init(params)
      >>> state = js.narrowing.narrow_like(trace, state, {"up[1]": range(12)})
      >>> state[0].mu["up"].shape, state[0].nu["down"].shape
      ((4, 4), (4, 3))
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    cut = plan(trace, drop, allow=allow, masks=True).cut
    whole = jax.tree.unflatten(trace.treedef, list(range(len(trace.paths))))
    places = {_key(path): i for path, i in jax.tree_util.tree_leaves_with_path(whole)}
    dims = list(trace.dims.values())
    longest = max(map(len, places))

    def change(path: Any, x: Any) -> Any:
        key = _key(path)
        found = next(
            (
                places[key[start:]]
                for start in range(max(0, len(key) - longest), len(key) + 1)
                if key[start:] in places
            ),
            None,
        )
        if found is None or not hasattr(x, "shape") or not cut.touches(dims[found]):
            return x
        if x.ndim == 0 or x.size == 1 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        shape = tuple(d.size for d in dims[found])
        fits = x.ndim == len(shape) and all(
            n in (1, size) for n, size in zip(x.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: it is at the place of the parameter "
                f"{trace.paths[found]} of shape {shape}, but has the shape "
                f"{tuple(x.shape)}, of which the axes are not known. Make this state "
                "anew: optimizer.init(narrowed.params)."
            )
        own = tuple(
            d if n == d.size else algebra.leaf(1)
            for n, d in zip(x.shape, dims[found], strict=True)
        )
        return cut_array(cut, x, own)

    return jax.tree_util.tree_map_with_path(change, tree)


def _key(path: Any) -> tuple[str, ...]:
    """A path's keys, whatever kind of container they are of."""
    names = []
    for entry in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                names.append(str(getattr(entry, attribute)))
                break
        else:
            names.append(str(entry))
    return tuple(names)
