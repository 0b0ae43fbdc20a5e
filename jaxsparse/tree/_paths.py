"""Key paths as text: `block_0/attn/kernel`.

Rules, messages, tables and files all name a parameter by this text.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxsparse._typing import PyTree


def path_str(key_path: tuple[Any, ...]) -> str:
    """The text of a JAX key path.

    Args:
      key_path: what `jax.tree_util.tree_flatten_with_path` gives for a leaf.

    Returns:
      The keys joined by `/`. The `.value` that an NNX variable adds is left out, so
      that a Linen and an NNX model answer to the same regular expressions.

    Example:
      >>> import jax, jaxsparse as js
      >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"a": [1, {"b": 2}]})
      >>> [js.tree.path_str(path) for path, _ in leaves]
      ['a/0', 'a/1/b']
    """
    last = key_path[-1] if key_path else None
    if getattr(last, "name", None) == "value":
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths as text.

    Args:
      tree: any pytree.

    Returns:
      `(path, leaf)` pairs in the order of `jax.tree.leaves`.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.leaves_with_paths({"b": 2, "a": {"c": 1}})
      [('a/c', 1), ('b', 2)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_str(path), leaf) for path, leaf in leaves]


def map_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` whose function also receives the path as text.

    Args:
      f: called as `f(path, leaf, *rest_leaves)`.
      tree: any pytree.
      *rest: trees of which `tree` is a prefix.

    Returns:
      A tree with the structure of `tree`.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
      {'a': {'b': 'a/b=1'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(path_str(path), *leaves), tree, *rest
    )
