"""Functions that are compiled once, however often they are made anew."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax


class Keyed:
    """A function to be jitted that equals others with its key.

    `jax.jit` compiles each function object anew. Drivers make theirs at every call, of
    the programs of models; with this, what another call compiled serves again.

    Args:
      f: a function of arrays.
      key: all that its result depends on, beside its arguments. What is in there by
        `id` must be kept alive by `f`.
    """

    def __init__(self, f: Callable[..., Any], key: Hashable):
        self.f, self.key, self._hash = f, key, hash(key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Keyed) and self._hash == other._hash
        return self is other or (same and self.key == other.key)

    def __call__(self, *args: Any) -> Any:
        return _call(self, *args)


@functools.partial(jax.jit, static_argnums=0)
def _call(keyed: Keyed, *args: Any) -> Any:
    return keyed.f(*args)
