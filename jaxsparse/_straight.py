"""The straight-through step: a value, with the derivative of another one."""

from typing import Any

from jax import lax

from jaxsparse._typing import Array


def with_derivative_of(soft: Array, value: Any) -> Array:
    """The numbers of `value`, in the type and with the derivative of `soft`."""
    # The difference of a finite number and itself is 0, and adding it changes nothing.
    fixed = lax.stop_gradient(value).astype(soft.dtype)
    return fixed + (soft - lax.stop_gradient(soft))
