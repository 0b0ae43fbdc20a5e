"""Pruned weights that are not zero, and those that new masks bring back."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxsparse._loops import when
from jaxsparse._sharded import manual_axes, varying_axes, varying_is_known
from jaxsparse._typing import Array, PyTree
from jaxsparse._zeros import nonzero

Pair = tuple[Array, Array]
Flag = Callable[[Array, Array], Array]

_MOST = 8  # arrays read at once; more are slower, and a byte counts to 255


def regrew_in(new: PyTree, old: PyTree, axis_name: Any) -> Array:
    """Whether new masks bring a weight back."""
    pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))
    return _any(pairs, _came_back, axis_name)


def most_leaked(most: Array, params: PyTree, masks: PyTree, axis_name: Any) -> Array:
    """The number of pruned weights that are not zero, or `most` if that is more."""
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
    pairs = [(w, mask) for w, mask in leaves if jnp.ndim(mask)]

    def count(most: Array, pairs: list[Pair]) -> Array:
        counts = [
            _over_shards(lax.psum, _sum(x), axis_name)
            for x in _laid_over(pairs, _leaked)
        ]
        total = sum(counts, start=jnp.zeros((), jnp.float32))
        return jnp.maximum(most, jnp.minimum(total, 2.0**30).astype(most.dtype))

    return when(_any(pairs, _leaked, axis_name), count, most, pairs)


def _any(pairs: list[Pair], flag: Flag, axis_name: Any) -> Array:
    # On CPU a maximum of bytes takes a quarter of the time of `any`, and a sixteenth of
    # that of a sum.
    found = [jnp.max(x, initial=0) for x in _laid_over(pairs, flag)]
    some = functools.reduce(jnp.maximum, found, jnp.zeros((), jnp.uint8))
    return _over_shards(lax.pmax, some.astype(jnp.int32), axis_name) > 0


def _leaked(w: Array, mask: Array) -> Array:
    return nonzero(w) & ~mask


def _came_back(new: Array, old: Array) -> Array:
    return new & ~old


# One program where there is no jit around it.
@functools.partial(jax.jit, static_argnums=1)
def _laid_over(pairs: list[Pair], flag: Flag) -> list[Array]:
    """Flags as bytes, those of all arrays added up in one.

    A pass for each array would be most of what a step takes to compile beyond the
    search; that for arrays of one shape is compiled once. Where there is a mesh, arrays
    of one shape may lie in different ways, and each stays by itself.
    """
    alone: list[Array] = []
    shapes: dict[Any, list[Array]] = {}
    for pair in pairs:
        x = flag(*pair)
        spread = bool(manual_axes()) or not jax.typeof(x).sharding.mesh.empty
        own = alone if spread else shapes.setdefault(x.shape, [])
        own.append(x.astype(jnp.uint8))
    sums = []
    for own in shapes.values():
        parts = -(-len(own) // _MOST)  # of equal length, which share a kernel
        sums += [functools.reduce(jnp.add, own[i::parts]) for i in range(parts)]
    full = 255 // _MOST  # so many a byte can count
    return alone + [_added(sums[i : i + full]) for i in range(0, len(sums), full)]


def _added(sums: list[Array]) -> Array:
    """All of them from the first entry on, in an array as long as the longest."""
    if len(sums) == 1:
        return sums[0]
    found = jnp.zeros(max(x.size for x in sums), jnp.uint8)
    for x in sums:
        more = x.reshape(-1) + lax.slice(found, (0,), (x.size,))
        found = lax.dynamic_update_slice(found, more, (0,))
    return found


def _sum(x: Array) -> Array:
    # Of unsigned integers: for a sum of floats XLA would make an array of them.
    return jnp.sum(x, dtype=jnp.uint32).astype(jnp.float32)


def _over_shards(collect: Callable[..., Array], x: Array, axis_name: Any) -> Array:
    """Of all devices that hold other shards; the state is the same on all of them."""
    manual = manual_axes()
    if not manual:
        return x
    if varying_is_known(manual[0]):
        names = tuple(sorted(varying_axes(x)))
    else:
        is_spec = lambda s: isinstance(s, PartitionSpec)
        leaves = jax.tree.leaves(axis_name, is_leaf=is_spec)
        parts = [p for leaf in leaves for p in (leaf if is_spec(leaf) else (leaf,))]
        named = {n for p in parts for n in (p if isinstance(p, tuple) else (p,))}
        names = tuple(n for n in manual if n in named)
    return collect(x, names) if names else x
