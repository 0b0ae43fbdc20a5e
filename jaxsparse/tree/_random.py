"""One random key per leaf, derived from the leaf's path."""

import hashlib

import jax

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree._paths import map_with_path


def keys_like(key: Array, tree: PyTree) -> PyTree:
    """Make a tree of random keys, one for each leaf.

    The key of a leaf depends on its path and on nothing else, so that adding a layer
    does not reshuffle the randomness of the others.

    Args:
      key: a typed key, `jax.random.key(seed)`.
      tree: any pytree.

    Returns:
      A tree of keys with the structure of `tree`.

    Example:
      >>> import jax, jaxsparse as js
      >>> keys = js.tree.keys_like(jax.random.key(0), {"a": 0, "b": 0})
      >>> more = js.tree.keys_like(jax.random.key(0), {"a": 0, "aa": 0, "b": 0})
      >>> bool(jax.numpy.all(keys["b"] == more["b"]))
      True
    """
    _checks.check_key(key)

    def fold(path: str, _):
        digest = hashlib.blake2s(path.encode(), digest_size=4).digest()
        return jax.random.fold_in(key, int.from_bytes(digest, "little"))

    return map_with_path(fold, tree)
