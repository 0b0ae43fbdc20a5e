"""Products in plain JAX: gathered inputs, and batched products of dense matrices."""

import functools
from typing import Any

import jax.numpy as jnp

from jaxsparse._typing import Array
from jaxsparse.formats import Condensed, Nm, PackedArray, Tiles
from jaxsparse.formats.dense import planes_of
from jaxsparse.kernels._product import check_product, contract, over_rows, result_type


def gathered(x: Array, packed: PackedArray) -> Array:
    """Multiply without native code: gather inputs, then multiply dense matrices.

    - `Tiles`: `y_g = x[:, rows_g] @ values_g` for all groups of outputs in one batched
      product. This is made for balanced tiles; others are padded to the largest group
      in each call.
    - `Condensed`: one smaller product.
    - `Nm`: `y = sum_j x[:, j::of] @ (values at position j, else 0)`: no gather, for
      accelerators.

    It runs on every platform, under jit, vmap and grad.

    Args:
      x: `[*batch, ..., d_in]`, of floating point; `batch` are the kernel's batch axes.
      packed: a kernel from `js.formats.pack`, in one of these formats.

    Returns:
      `[*batch, ..., d_out]`, in the type that a dense product would have.

    Raises:
      ValueError: `x` of another width.
      TypeError: another format, or `x` not of floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> pattern, kernel = js.Balanced((1, 2)), jnp.array([[3.0, 3.0], [2.0, 4.0]])
      >>> params, masks = js.prune({"w": kernel}, 0.5, pattern=pattern)
      >>> packed = js.formats.pack(params, masks, format=pattern)["w"]
      >>> js.kernels.gathered(jnp.array([[10.0, 1.0]]), packed)
      Array([[30., 30.]], dtype=float32)
    """
    check_product(x, packed)
    engines: dict[Any, Any] = {Tiles: _tiles, Condensed: _condensed, Nm: _planes}
    if type(packed) not in engines:
        raise TypeError(
            f"packed: kernels.gathered multiplies Tiles, Condensed and Nm, got a "
            f"{type(packed).__name__}. Take kernels.matmul, which chooses."
        )
    dtype = result_type(x, packed)
    one = functools.partial(engines[type(packed)], dtype=dtype)
    return over_rows(one, x, packed).astype(dtype)


def _tiles(x: Array, packed: Tiles, dtype: Any) -> Array:
    (a, v), d_in = packed.tile, packed.view.d_in
    values, rows = padded(packed)
    groups, k = rows.shape
    inputs = x.T.reshape(d_in // a, a, x.shape[0])
    # Of the transposed activations whole rows are gathered.
    own = inputs[rows.reshape(-1)].reshape(groups, k * a, x.shape[0])
    tiles = values.reshape(groups, k * a, v)
    y = contract(tiles, own, dtype, ((1,), (1,)), ((0,), (0,)))
    return y.reshape(groups * v, x.shape[0]).T


def padded(packed: Tiles) -> tuple[Array, Array]:
    """Values `[groups, k, a, v]` and rows `[groups, k]` of one layer's tiles."""
    rows = packed.rows.astype(jnp.int32)
    if packed.offsets is None:
        return packed.values, rows
    pieces, length = rows.shape
    begin, end = packed.offsets[:, :-1, None], packed.offsets[:, 1:, None]
    slots = begin + jnp.arange(packed.most, dtype=jnp.int32)[None, None]
    there = slots < end
    at = jnp.minimum(slots, max(0, length - 1))
    piece = jnp.arange(pieces)[:, None, None]
    groups = pieces * (packed.offsets.shape[-1] - 1)
    if not length:
        return packed.values.reshape(groups, 0, *packed.tile), rows.reshape(groups, 0)
    own = there[..., None, None]
    zero = jnp.zeros((), packed.values.dtype)
    values = jnp.where(own, packed.values[piece, at], zero)
    shaped = lambda x: x.reshape(groups, packed.most, *x.shape[3:])
    return shaped(values), shaped(rows[piece, at])


def _condensed(x: Array, packed: Condensed, dtype: Any) -> Array:
    if packed.inputs is not None:
        x = x[:, packed.inputs.astype(jnp.int32)]
    y = contract(x, packed.values, dtype, ((1,), (0,)))
    if packed.outputs is None:
        return y
    whole = jnp.zeros((x.shape[0], packed.view.d_out), y.dtype)
    return whole.at[:, packed.outputs.astype(jnp.int32)].set(y, unique_indices=True)


def _planes(x: Array, packed: Nm, dtype: Any) -> Array:
    of = packed.pattern.of
    apart = x.reshape(x.shape[0], x.shape[1] // of, of)
    parts = [
        contract(apart[:, :, j], plane, dtype, ((1,), (0,)))
        for j, plane in enumerate(planes_of(packed))
    ]
    return functools.reduce(jnp.add, parts)
