"""Key paths as text: `block_0/attn/kernel`.

Rules, messages, tables and files all name a parameter by this text, so no two leaves
of a tree have the same.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax

from jaxsparse import _checks
from jaxsparse._text import path_text, shown
from jaxsparse._typing import PyTree


def path_str(key_path: tuple[Any, ...]) -> str:
    """Return the text of a JAX key path.

    Args:
      key_path: what `jax.tree_util.tree_flatten_with_path` gives for a leaf.

    Returns:
      The keys joined by `/`. The `.value` that an NNX variable adds is left out, so
      that a Linen and an NNX model answer to the same regular expressions. Two leaves
      of one tree may share it, where a key has a `/` of its own; the paths of
      `leaves_with_paths` and `map_with_path` tell them apart. Characters that cannot be
      printed, such as control characters, are escaped as `%1B`.

    Example:
      >>> import jax, jaxsparse as js
      >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"a": [1, {"b": 2}]})
      >>> [js.tree.path_str(path) for path, _ in leaves]
      ['a/0', 'a/1/b']
    """
    if not isinstance(key_path, tuple | list):
        raise TypeError(f"key_path must be a tuple of keys, got {key_path!r}.")
    return shown(path_text(key_path))


def leaves_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """List the leaves of a tree with their paths as text.

    `path_str` makes a path from a leaf's keys. Keys may contain a `/` (Haiku's module
    names do); where two leaves would get the same path, each `/` within their keys is
    written as `%2F`.

    Args:
      tree: any pytree.

    Returns:
      `(path, leaf)` pairs in the order of `jax.tree.leaves`; no two paths are equal.

    Raises:
      ValueError: paths that are equal even so, because a key holds `%2F` itself.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.leaves_with_paths({"b": 2, "a": {"c": 1}})
      [('a/c', 1), ('b', 2)]
      >>> js.tree.leaves_with_paths({"a": {"b": 1}, "a/b": 2})
      [('a/b', 1), ('a%2Fb', 2)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = _distinct([path for path, _ in leaves])
    return [(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]


def map_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map a function over a tree; it receives the path as text, too.

    Args:
      f: called as `f(path, leaf, *rest_leaves)`.
      tree: any pytree.
      *rest: trees that have `tree` as a prefix.

    Returns:
      A tree with the structure of `tree`.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
      {'a': {'b': 'a/b=1'}}
    """
    _checks.check_callable(2 + len(rest), f=f)
    named, treedef = leaves_with_paths(tree), jax.tree.structure(tree)
    others = [treedef.flatten_up_to(other) for other in rest]
    each = zip(named, *others, strict=True)
    return treedef.unflatten([f(path, x, *leaves) for (path, x), *leaves in each])


def _distinct(key_paths: list[tuple[Any, ...]]) -> list[str]:
    """The texts of key paths, which are made to differ."""
    paths = [path_str(keys) for keys in key_paths]
    if len(set(paths)) == len(paths):
        return paths
    often = collections.Counter(paths)
    for i, keys in enumerate(key_paths):
        if often[paths[i]] > 1:
            parts = (path_str((key,)).replace("/", "%2F") for key in keys)
            paths[i] = "/".join(parts)
    often = collections.Counter(paths)
    same = [path for path, count in often.items() if count > 1]
    if same:
        raise ValueError(
            f"{same[0]}: {often[same[0]]} leaves of the tree have this path. Rename a "
            "key of theirs: what is said of one would be taken for the other."
        )
    return paths
