"""Compiled kernels for processors: none are built here."""

from jaxsparse._typing import Array


def available() -> bool:
    """Whether they can be called."""
    return False


def why_not() -> str:
    """What is missing, in one line; "" where nothing is."""
    return "they are not part of this build of jaxsparse"


def csr_matmul(x: Array, values: Array, columns: Array, offsets: Array) -> Array:
    """`x [..., d_in] @ w`, of `[nnz]` values and columns, and `[d_out + 1]` offsets."""
    raise RuntimeError(f"No native kernels: {why_not()}.")


def tiles4_matmul(x: Array, values: Array, rows: Array, offsets: Array) -> Array:
    """`x [..., d_in] @ w`, of values `[n, 4]`, rows, and `[d_out / 4 + 1]` offsets."""
    raise RuntimeError(f"No native kernels: {why_not()}.")
