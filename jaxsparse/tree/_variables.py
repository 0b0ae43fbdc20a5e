"""Arrays out of the variables in which NNX keeps them."""

from typing import Any

import jax

from jaxsparse._typing import PyTree


def unwrap_variables(tree: PyTree) -> PyTree:
    """Replaces every variable of flax's NNX by the array that it holds.

    `nnx.Optimizer` wraps each array of an optimizer state, and `nnx.state` each
    parameter; what is left after this has the structure of `nnx.as_pure(...)`.

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
