"""What of a tree belongs to an approximation of the Fisher matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array, PyTree
from jaxsparse.curvature import dispatch
from jaxsparse.curvature._trees import leaves_at
from jaxsparse.curvature.dispatch import Fisher


def arrays_of(fisher: Fisher, tree: PyTree, *, name: str) -> list[Array]:
    """The arrays of a tree for the parameters that take part."""
    check_fisher(fisher)
    return leaves_at(tree, fisher.paths, dispatch.shapes(fisher), name=name)


def masks_of(fisher: Fisher, masks: PyTree, *, name: str = "masks") -> list[Array]:
    """Masks of full shape for the parameters that take part."""
    check_fisher(fisher)
    _checks.check_bools(masks, name=name)
    leaves = leaves_at(masks, fisher.paths, name=name)
    shapes = dispatch.shapes(fisher)
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    by_path = lambda xs: dict(zip(fisher.paths, xs, strict=True))
    patterns.check_masks(by_path(leaves), by_path(map(struct, shapes)))
    return [jnp.broadcast_to(m, shape) for m, shape in zip(leaves, shapes, strict=True)]


def apart(fisher: Fisher) -> list[Fisher]:
    """Split a Fisher matrix into independent parts, one per parameter where possible.

    Process the parts one after another to hold the scratch memory of one parameter
    only.

    Args:
      fisher: an approximation of the Fisher matrix.

    Returns:
      Approximations of trees `{path: array}`, without copies; `MFac` as it is, since it
      has one matrix for all parameters.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"a": jnp.ones((1, 2)), "b": jnp.ones((1, 3))}
      >>> fisher = js.curvature.diagonal_fisher(grads, damping=1.0)
      >>> [part.paths for part in js.curvature.apart(fisher)]
      [('a',), ('b',)]
    """
    check_fisher(fisher)
    return dispatch.apart(fisher)


def check_fisher(fisher: Any) -> None:
    """Raises a TypeError unless `fisher` is an approximation of a Fisher matrix."""
    _checks.check_is(Fisher, "js.curvature.block_fisher(grads, ...)", fisher=fisher)


def check_covers(fisher: Any, path: str) -> None:
    """Raise an error unless a Fisher matrix was made for a parameter.

    Args:
      fisher: an approximation of the Fisher matrix.
      path: the parameter's path.

    Raises:
      ValueError: it takes no part in the Fisher matrix.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> fisher = js.curvature.mfac({"w": jnp.ones((1, 2)), "b": None}, damping=1.0)
      >>> js.curvature.check_covers(fisher, "w")
      >>> js.curvature.check_covers(fisher, "b")
      Traceback (most recent call last):
        ...
      ValueError: b: selected by `where`, but the Fisher matrix has no part for it...
    """
    check_fisher(fisher)
    if path not in fisher.paths:
        raise ValueError(
            f"{path}: selected by `where`, but the Fisher matrix has no part for it. "
            f"It was made for {len(fisher.paths)} parameters: {fisher.paths[:4]}... "
            "Take the gradients and prune with the same `where`."
        )
