"""Functions with reshapes on arrays whose sharding is part of their type."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse._typing import Array


def with_auto_axes(
    f: Callable[..., Any], specs: Callable[[Any], Any], *args: Any
) -> Any:
    """`f(*args)`, within which the compiler decides how arrays are sharded.

    On a mesh with explicit axes JAX asks it of every sum and reshape, and for a tile
    that lies on two devices it cannot be said. The results alone are stated:
    `specs(results)` makes their specs of their shapes.
    """
    mesh = explicit_mesh(jax.tree.leaves(args))
    if mesh is None:
        return f(*args)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    lie = lambda spec: NamedSharding(mesh, spec)
    stated = specs(jax.eval_shape(f, *plain))
    shardings = jax.tree.map(lie, stated, is_leaf=lambda x: isinstance(x, P))
    automatic: Any = jax.sharding.auto_axes(f, out_sharding=shardings)
    return automatic(*args)


def everywhere(results: Any) -> Any:
    """Specs for `with_auto_axes`: all results on all devices."""
    return jax.tree.map(lambda _: P(), results)


def sharded_like(f: Callable[..., Array], x: Array, *rest: Array) -> Array:
    """`f(x, *rest)`, sharded as `x` along the axes that are as long as its."""
    return with_auto_axes(f, functools.partial(_spec_like, x), x, *rest)


def each_sharded_like(
    f: Callable[..., list[Array]], arrays: Sequence[Array], *rest: Array
) -> list[Array]:
    """`f(arrays, *rest)`, each result sharded as its array."""
    specs = lambda results: list(map(_spec_like, arrays, results))
    return with_auto_axes(f, specs, list(arrays), *rest)


def _spec_like(x: Array, result: Any) -> P:
    if result.ndim != x.ndim:
        return P(*[None] * result.ndim)
    parts = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)
    sizes = zip(parts, x.shape, result.shape, strict=False)
    return P(*[part if n == m else None for part, n, m in sizes])


@jax.jit
def laid_out_like(x: Array, like: Array) -> Array:
    """The same numbers, sharded as another array of the same shape is.

    Under jit too, where on a mesh with automatic axes no type says how that is.
    """
    typed = not jax.typeof(x).sharding.mesh.empty and explicit_mesh([like]) is not None
    if typed and not manual_axes():  # there a shard lies where it does
        return jax.sharding.reshard(x, jax.typeof(like).sharding)
    return _met(x, like)


def _met(x: Array, like: Array) -> Array:
    """The same numbers, of an operation with both arrays.

    The compiler shards its result as its operands, and where shardings are types the
    result has that of all of them. It costs nothing: both branches are one.
    """
    return jnp.where(like != like, x, x)


def explicit_mesh(arrays: Sequence[Array]):
    """The mesh of the arrays that are sharded over explicit axes."""
    for x in arrays:
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
    """Zeros that lie as a sharding says.

    JAX 0.12 makes them without a mesh where it traces outside of `jax.set_mesh`, and
    does not let them meet arrays that have one with explicit axes.
    """
    x = jnp.zeros(shape, dtype, device=sharding)
    mesh = getattr(sharding, "mesh", None)
    explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
    if explicit and jax.typeof(x).sharding.mesh.empty:
        return jax.sharding.reshard(x, sharding)
    return x


def sharded_as(x: Array, like: Array) -> Array:
    """An array of what is replicated, made to lie as another one does."""
    if manual_axes():
        return x
    if explicit_mesh([like]) is not None:
        return jax.sharding.reshard(x, jax.typeof(like).sharding)
    return _met(x, like)


# Within `shard_map` an array is a shard, and its type says along which axes of the mesh
# it differs.


def manual_axes() -> tuple[str, ...]:
    """The mesh axes over which `shard_map` runs this; none outside of it."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes along which an array differs, as far as its type says."""
    aval: Any = jax.typeof(x)
    if hasattr(aval, "vma"):  # its name in some versions of JAX
        return frozenset(aval.vma or ())
    return frozenset(getattr(aval.manual_axis_type, "varying", ()))


def varying_is_known(name: str) -> bool:
    """Whether types say along which axes arrays differ: not with `check_vma=False`."""
    return bool(varying_axes(lax.axis_index(name)))


def fitting(sharding: Any, shape: tuple[int, ...]) -> Any:
    """A sharding without the axes that the mesh no longer divides."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = []
    for entry, size in zip(sharding.spec, shape, strict=False):
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        parts = math.prod(sharding.mesh.shape[n] for n in names)
        spec.append(entry if size % parts == 0 else None)
    return NamedSharding(sharding.mesh, P(*spec))
