"""Calls of the native kernels on `[tokens, features]`, with derivatives and vmap.

A layer's three products are one trilinear form: each is the derivative of the others.

    matmul:      y[b, o]  = sum over entries of w[i, o] * x[b, i]
    transposed:  dx[b, i] = sum over entries of w[i, o] * dy[b, o]
    sampled:     dw[i, o] = sum over tokens  of x[b, i] * dy[b, o], at the entries alone
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.kernels._native_sharding import split_over_tokens

# In memory the tokens of one feature lie together.
_FEATURE_MAJOR = (1, 0)


class Kind(NamedTuple):
    """What a call is compiled for.

    Attributes:
      height: the outputs of a group, 1 or 4.
      variant: an instruction set, "" for the best.
    """

    height: int
    variant: str


Structure = tuple[Array, Array]  # indices and offsets


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(kind: Kind, x: Array, values: Array, structure: Structure) -> Array:
    """`y [tokens, outputs]` of `x [tokens, inputs]`."""
    outputs = (structure[1].shape[0] - 1) * kind.height
    call = _call("matmul", outputs, kind)
    return _foldable(call)(x, values, *structure)


def _matmul_fwd(kind: Kind, x: Array, values: Array, structure: Structure) -> Any:
    return matmul(kind, x, values, structure), (x, values, structure)


def _matmul_bwd(kind: Kind, saved: Any, dy: Array) -> Any:
    x, values, structure = saved
    dx = transposed(kind, x.shape[1], dy, values, structure)
    return dx, sampled(kind, values.shape[0], x, dy, structure), None


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def transposed(
    kind: Kind, inputs: int, dy: Array, values: Array, structure: Structure
) -> Array:
    """`dx [tokens, inputs]` of `dy [tokens, outputs]`."""
    call = _call("transposed", inputs, kind)
    return _foldable(call)(dy, values, *structure)


def _transposed_fwd(
    kind: Kind, inputs: int, dy: Array, values: Array, structure: Structure
) -> Any:
    return transposed(kind, inputs, dy, values, structure), (dy, values, structure)


def _transposed_bwd(kind: Kind, inputs: int, saved: Any, dx: Array) -> Any:
    del inputs
    dy, values, structure = saved
    to_dy = matmul(kind, dx, values, structure)
    return to_dy, sampled(kind, values.shape[0], dx, dy, structure), None


transposed.defvjp(_transposed_fwd, _transposed_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sampled(kind: Kind, size: int, x: Array, dy: Array, structure: Structure) -> Array:
    """`dvalues [size]` of `x [tokens, inputs]` and `dy [tokens, outputs]`."""
    return _in_turn(_call("sampled", size, kind))(x, dy, *structure)


def _sampled_fwd(
    kind: Kind, size: int, x: Array, dy: Array, structure: Structure
) -> Any:
    return sampled(kind, size, x, dy, structure), (x, dy, structure)


def _sampled_bwd(kind: Kind, size: int, saved: Any, dvalues: Array) -> Any:
    del size
    x, dy, structure = saved
    to_x = transposed(kind, x.shape[1], dy, dvalues, structure)
    return to_x, matmul(kind, x, dvalues, structure), None


sampled.defvjp(_sampled_fwd, _sampled_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def int8_matmul(
    variant: str, x: Array, values: Array, scale: Array, structure: Structure
) -> Array:
    """`y [tokens, outputs]` of int8 values and of activations quantized on the way."""
    outputs = structure[1].shape[0] - 1
    call = _call("int8_matmul", outputs, Kind(0, variant))
    return _foldable(call)(x, values, scale, *structure)


def no_int8_gradient(*_: Any) -> Any:
    """Raises, in the place of a gradient."""
    raise TypeError(
        "Products with int8 weights have no gradient: their activations are rounded. "
        "Train in another format, such as formats.Csr16, and pack what comes out as "
        "formats.Int8Tiles."
    )


int8_matmul.defvjp(no_int8_gradient, no_int8_gradient)


@functools.cache
def _call(name: str, size: int, kind: Kind) -> Callable[..., Array]:
    """The call of a handler: matrices are feature-major, in and out.

    The result is `[tokens, size]`, or `[size]` where it is a sum over tokens.
    """
    of_tokens = name != "sampled"
    height = {"height": kind.height} if kind.height else {}

    def call(*args: Array) -> Array:
        layout = lambda ndim: _FEATURE_MAJOR if ndim == 2 else None
        shape = (args[0].shape[0], size) if of_tokens else (size,)
        if not args[0].size or not size:
            # XLA's compiler dies of what it would turn for an empty matrix.
            return jnp.zeros(shape, jnp.float32)
        f = jax.ffi.ffi_call(
            f"jaxsparse_{name}",
            jax.ShapeDtypeStruct(shape, jnp.float32),
            input_layouts=[layout(a.ndim) for a in args],
            output_layouts=layout(len(shape)),
        )
        return f(*args, variant=kind.variant, **height)

    return split_over_tokens(call, of_tokens=of_tokens)


def _foldable(call: Callable[..., Array]) -> Callable[..., Array]:
    """`call`, whose `vmap` over the first argument makes more tokens of its axis."""
    one = jax.custom_batching.custom_vmap(call)
    in_turn = _mapped(one)

    @one.def_vmap
    def rule(size: int, batched: list[bool], x: Array, *rest: Array) -> Any:
        if any(batched[1:]):
            return in_turn(size, batched, x, *rest)
        y = one(x.reshape(-1, x.shape[-1]), *rest)
        return y.reshape(size, x.shape[1], y.shape[-1]), True

    return one


def _in_turn(call: Callable[..., Array]) -> Callable[..., Array]:
    """`call`, whose `vmap` is a loop."""
    one = jax.custom_batching.custom_vmap(call)
    one.def_vmap(_mapped(one))
    return one


def _mapped(one: Callable[..., Array]) -> Callable[..., Any]:
    """A rule for `vmap` that calls for one index after the other."""

    def rule(size: int, batched: list[bool], *args: Array) -> Any:
        del size
        over = [a for a, b in zip(args, batched, strict=True) if b]

        def call(some: list[Array]) -> Array:
            left = iter(some)
            return one(
                *(next(left) if b else a for a, b in zip(args, batched, strict=True))
            )

        return lax.map(call, over), True

    return rule
