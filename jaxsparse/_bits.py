"""Arrays of bools as bits along one axis; the first is the highest bit of its byte.

XLA packs what is traced, NumPy what is there: each shard by itself, on its host. A mask
that is written so is never gathered, and is read back onto any other sharding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import Array

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Bools on the host, an eighth of their bytes; one leaf of a tree."""

    bits: np.ndarray
    shape: Shape
    axis: int
    dtype = np.dtype(bool)

    @classmethod
    def of(cls, x: np.ndarray) -> "Packed":
        """Packs an array of bools that has axes."""
        axis = choose_axis(x)
        return cls(pack(x, axis), x.shape, axis)

    def bools(self) -> np.ndarray:
        """The array that was packed."""
        return unpack(self.bits, self.shape, self.axis)

    def stand_in(self) -> np.ndarray:
        """An array of the same shape and type that takes no memory."""
        return np.broadcast_to(np.True_, self.shape)


def packed_shape(shape: Shape, axis: int) -> Shape:
    """The shape of packed bits."""
    return (*shape[:axis], -(-shape[axis] // 8), *shape[axis + 1 :])


def choose_axis(x: Array | np.ndarray) -> int:
    """The axis to pack along: the fewest bytes, then whole bytes in every shard."""

    def cost(axis: int):
        size = np.prod(packed_shape(x.shape, axis))
        moves = isinstance(x, jax.Array) and (
            whole_bytes(x.sharding, x.shape, axis) != x.sharding
        )
        return size, moves, -axis

    return min(range(x.ndim), key=cost)


def whole_bytes(
    sharding: jax.sharding.Sharding, shape: Shape, axis: int
) -> jax.sharding.Sharding:
    """A sharding close to `sharding` under which no byte lies on two devices."""
    part = sharding.shard_shape(shape)[axis]
    if part == shape[axis] or part % 8 == 0:
        return sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        spec[axis] = None
        return jax.sharding.NamedSharding(
            sharding.mesh,
            jax.sharding.PartitionSpec(*spec),
            memory_kind=sharding.memory_kind,
        )
    devices = sorted(sharding.device_set, key=lambda d: d.id)
    everywhere = jax.sharding.Mesh(np.array(devices), ("devices",))
    return jax.sharding.NamedSharding(everywhere, jax.sharding.PartitionSpec())


def pack(x: Any, axis: int) -> Any:
    """Packs bools into bits along an axis."""
    if isinstance(x, jax.core.Tracer):
        return jnp.packbits(x, axis=axis)
    if isinstance(x, np.ndarray):
        return np.packbits(x, axis=axis)
    placed = jax.device_put(x, whole_bytes(x.sharding, x.shape, axis))
    return _by_shard(
        lambda shard: np.packbits(shard, axis=axis), placed, packed_shape(x.shape, axis)
    )


def unpack(bits: Any, shape: Shape, axis: int) -> Any:
    """Turns packed bits into bools again."""
    if isinstance(bits, jax.core.Tracer):
        return jnp.unpackbits(bits, axis=axis, count=shape[axis]).astype(bool)
    whole = isinstance(bits, np.ndarray)
    count = (shape if whole else bits.sharding.shard_shape(shape))[axis]
    plain = lambda x: np.unpackbits(x, axis=axis, count=count).view(bool)
    return plain(bits) if whole else _by_shard(plain, bits, shape)


def _by_shard(f: Callable[[np.ndarray], np.ndarray], x: Array, shape: Shape) -> Array:
    # On the host: inside `jax.set_mesh` nothing runs on one device of many.
    shards = [
        jax.device_put(f(np.asarray(shard.data)), shard.data.sharding)
        for shard in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(shape, x.sharding, shards)
