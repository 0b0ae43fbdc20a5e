"""Arrays in variables and boxes, as flax keeps them, and those without."""

from typing import Any

import jax

from jaxsparse import _checks
from jaxsparse._typing import PyTree
from jaxsparse.tree._paths import leaves_with_paths, map_with_path


def unwrap_variables(tree: PyTree) -> PyTree:
    """Replace every NNX variable by the array that it holds.

    `nnx.Optimizer` wraps each array of an optimizer state, and `nnx.state` each
    parameter; the result has the structure of `nnx.as_pure(...)`.

    Args:
      tree: any pytree.

    Returns:
      A tree without variables.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax import nnx
      >>> js.tree.unwrap_variables({"w": nnx.Param(jnp.ones(2))})
      {'w': Array([1., 1.], dtype=float32)}
    """
    # Asked by its method, so that flax need not be imported.
    is_variable = lambda x: hasattr(x, "get_value")

    def value(x: Any) -> Any:
        return x.get_value() if is_variable(x) else x

    return jax.tree.map(value, tree, is_leaf=is_variable)


def like(tree: PyTree, params: PyTree, *, name: str, of: str = "params") -> PyTree:
    """Put leaves into the containers of another tree that has leaves at the same paths.

    For example, masks of `nnx.as_pure(state)` then fit `state`, whose variables hold
    the arrays, and masks of unboxed Linen parameters fit boxed ones.

    Args:
      tree: masks, scores or the like.
      params: the parameters.
      name: the name of `tree` in messages.
      of: the name of `params` in messages.

    Returns:
      The leaves of `tree` in the structure of `params`.

    Raises:
      ValueError: leaves at other paths.
      TypeError: a function, a whole training state, or the result of `js.prune`, where
        one part of it is meant.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax import nnx
      >>> params = {"w": nnx.Param(jnp.ones(2))}
      >>> js.tree.like({"w": True}, params, name="masks")["w"].get_value()
      True
    """
    if jax.tree.structure(tree) == jax.tree.structure(params):
        return tree
    _checks.check_is_part(name, tree)
    if callable(tree) and jax.tree_util.all_leaves([tree]):
        raise TypeError(f"{name} must be a tree of arrays, got the function {tree!r}.")
    found = dict(leaves_with_paths(tree))
    if set(found) != {path for path, _ in leaves_with_paths(params)}:
        _checks.same_structure(tree, params, name=name, of=of)
    return map_with_path(lambda path, _: found[path], params)
