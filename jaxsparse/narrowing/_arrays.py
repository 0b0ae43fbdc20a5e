"""Cutting arrays of every kind: of the host, of a device, of many, traced, abstract."""

import functools
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from jaxsparse._sharded import explicit_mesh, fitting
from jaxsparse.narrowing._cut import Cut
from jaxsparse.primitives.dims import Dims


def cut_array(cut: Cut, x: Any, dims: Dims) -> Any:
    """An array without what goes, where and as it was."""
    return _changed(cut, x, dims, cut.take, cut.shape(dims))


def put_array(cut: Cut, x: Any, dims: Dims) -> Any:
    """The inverse of `cut_array`, with zeros."""
    return _changed(cut, x, dims, cut.put, tuple(d.size for d in dims))


def _changed(cut: Cut, x: Any, dims: Dims, how: Any, shape: tuple[int, ...]) -> Any:
    if not cut.touches(dims):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    if isinstance(x, np.ndarray | Tracer):
        return how(x, dims)
    if len(x.sharding.device_set) == 1:
        if next(iter(x.sharding.device_set)).platform == "cpu":
            # On the host numpy's gather is several times faster than an eager one.
            changed = how(np.asarray(x), dims)
            return jax.device_put(changed, x.sharding if x.committed else None)
        return how(x, dims)
    named = isinstance(x.sharding, NamedSharding)
    sharding = fitting(x.sharding, shape) if named else None
    change = functools.partial(how, dims=dims)
    if explicit_mesh([x]) is not None:  # there a gather has to be told what it gives
        change = jax.sharding.auto_axes(change, out_sharding=sharding)
    return jax.jit(change, out_shardings=sharding)(x)
