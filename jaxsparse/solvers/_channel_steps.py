"""Which columns of a layer go, one group of blocks after another.

The steps see neither the rows of the layer nor its gram matrix, but two matrices of
columns: `C = (G + damping I)^-1` and `M = W^T W`. When the columns `S` go,

    W <- W - W_S C_SS^-1 C_S,    C <- C - C_S^T C_SS^-1 C_S,

and with `C_SS = L L^T`, `V = L^-1 C_S`, `Y = L^-1 M_S`, `U = Y - 1/2 (Y_S L^-T) V`
that is

    C <- C - V^T V,    M <- M - V^T U - U^T V.

The rows `V` and `U` of some steps are put off and taken from both matrices in one
product: a step alone would read and write all of them for a few columns.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.linalg.factor import inverse_lower, inverse_root, matmul
from jaxsparse.linalg.gram import GramFactor
from jaxsparse.solvers._solved import least_moments

_PUT_OFF = 64  # columns that are taken from the matrices in one product
_FLOPS = 5e5  # of the factorisations of one batch


class Taken(NamedTuple):
    """What a layer loses, by block."""

    kept: Array  # [blocks]
    errors: Array  # what its removal added to the objective, 0 where kept
    step: Array  # the number of the step that removed it, -1 where kept


class _Own(NamedTuple):
    """The blocks on the diagonals, `[blocks, size, size]`, of what is left now."""

    inverse: Array  # of C
    moment: Array  # of M


class _Rows(NamedTuple):
    """What is still to be taken from the matrices, `[put off, d_in]`; 0 if nothing."""

    v: Array
    u: Array


class _Late(NamedTuple):
    """The matrices, when the columns put off have not been taken from them."""

    inverse: Array
    moment: Array


def check_blocks(
    size: Any, blocks: Any, d_in: int
) -> tuple[np.ndarray | None, int, int]:
    """How the columns of a layer fall into blocks."""
    _checks.check_positive_int(size, name="size")
    if blocks is None:
        if d_in % size:
            raise ValueError(
                f"size={size} does not divide d_in = {d_in}. Say in blocks which "
                "columns belong together."
            )
        return None, d_in // size, int(size)
    if not _checks.is_concrete(blocks):
        raise TypeError(
            "blocks must be known when the function is traced: pass a numpy array, and "
            "not as an argument of what is jitted."
        )
    blocks = np.asarray(blocks)
    if not np.issubdtype(blocks.dtype, np.integer):
        raise TypeError(f"blocks holds numbers of columns, got {blocks.dtype}.")
    if blocks.ndim != 2 or not blocks.size or size not in (1, blocks.shape[1]):
        raise ValueError(
            "blocks must be [n_blocks, size], the columns of each block; got shape "
            f"{blocks.shape} and {size=}. Leave size out, and pad nothing: all blocks "
            "are equally large."
        )
    columns = blocks.ravel().astype(np.int32)
    if columns.min() < 0 or columns.max() >= d_in:
        raise ValueError(
            f"blocks must hold columns from 0 to {d_in - 1}, got {columns.min()} to "
            f"{columns.max()}."
        )
    times = np.bincount(columns, minlength=d_in)
    if times.max() > 1:
        raise ValueError(
            f"blocks overlap: column {int(times.argmax())} is there {times.max()} "
            "times. A column goes with one block."
        )
    others = np.flatnonzero(times == 0).astype(np.int32)
    return np.concatenate([columns, others]), *blocks.shape


def greedy(
    inverse: Array,
    moment: Array,
    count: Array,
    unseen: Array,
    *,
    number: int,
    size: int,
    at_once: int,
) -> Taken:
    """Removes the cheapest blocks, `at_once` in a step, each step knowing the last."""
    width = at_once * size
    turns = max(1, min(_PUT_OFF // width, -(-number // at_once)))
    steps = (count + (at_once - 1)) // at_once
    none = jnp.zeros((turns * width, inverse.shape[0]), inverse.dtype)

    def panel(i: Array, state: tuple[_Late, _Own, Taken]):
        late, own, taken = state

        def step(j: Array, state: tuple[_Rows, _Own, Taken]):
            rows, own, taken = state
            turn = i * turns + j
            errors = _errors(own, taken.kept)
            chosen = cheapest(jnp.where(taken.kept, errors + unseen, jnp.inf), at_once)
            valid = jnp.arange(at_once, dtype=jnp.int32) < count - turn * at_once
            new = _eliminate(late, rows, chosen, valid, size)
            own = _without(own, new)
            put = lambda all, part: lax.dynamic_update_slice_in_dim(
                all, part, j * width, 0
            )
            rows = _Rows(put(rows.v, new.v), put(rows.u, new.u))
            return rows, own, _mark(taken, chosen, valid, errors, turn)

        now = jnp.minimum(turns, steps - i * turns)
        start = (_Rows(none, none), own, taken)
        rows, own, taken = lax.fori_loop(jnp.zeros_like(now), now, step, start)
        return _catch_up(late, rows), own, taken

    late = _Late(inverse, moment)
    own = _Own(
        diagonal_blocks(inverse, number, size), diagonal_blocks(moment, number, size)
    )
    panels = (steps + (turns - 1)) // turns
    start = (late, own, untouched(number, inverse.dtype))
    return lax.fori_loop(jnp.zeros_like(panels), panels, panel, start)[2]


def unseen_errors(
    w: Array, factor: GramFactor, order: Any, number: int, size: int
) -> Array:
    """Next to nothing for each block, by its weights of dead inputs."""
    wide = w.astype(factor.root.dtype)
    moments = least_moments(jnp.diagonal(factor.gram).astype(wide.dtype))
    own = jnp.sum(wide * wide, axis=0) * moments
    own = jnp.where(factor.dead, own, jnp.zeros_like(own))
    own = own if order is None else own[order]
    return jnp.sum(own[: number * size].reshape(number, size), axis=1)


def untouched(number: int, dtype) -> Taken:
    """Before the first step."""
    return Taken(
        jnp.ones(number, bool),
        jnp.zeros(number, dtype),
        jnp.full(number, -1, jnp.int32),
    )


def take(errors: Array, count: Array, unseen: Array) -> Taken:
    """Removes the cheapest blocks in one step."""
    number = errors.shape[0]
    valid = jnp.arange(number, dtype=jnp.int32) < count
    chosen = cheapest(errors + unseen, number)
    first = jnp.zeros((), jnp.int32)
    return _mark(untouched(number, errors.dtype), chosen, valid, errors, first)


def cheapest(errors: Array, count: int) -> Array:
    """The blocks with the lowest errors, in order; of equals the later goes first."""
    place = jnp.arange(errors.shape[0], dtype=jnp.int32)
    if count == 1:
        least = errors == jnp.min(errors)
        return jnp.max(jnp.where(least, place, 0), keepdims=True)
    return -lax.sort((errors, -place), num_keys=2)[1][:count]


def diagonal_blocks(matrix: Array, number: int, size: int) -> Array:
    """The first blocks on the diagonal."""
    if size == 1:
        return jnp.diagonal(matrix)[:number, None, None]
    end = number * size
    tiles = matrix[:end, :end].reshape(number, size, number, size)
    return jnp.moveaxis(jnp.diagonal(tiles, axis1=0, axis2=2), -1, 0)


def layer_errors(w: Array, upper: Array, number: int, size: int) -> Array:
    """`tr(W_b C_bb^-1 W_b^T)` from the weights."""
    end = number * size
    if size == 1:
        return jnp.sum(w * w, axis=0)[:end] / jnp.sum(upper * upper, axis=0)[:end]
    cut = lambda x: x[:, :end].reshape(-1, number, size).transpose(1, 2, 0)
    columns = cut(upper)
    solved = matmul(roots(matmul(columns, columns.transpose(0, 2, 1))), cut(w))
    return jnp.sum(solved * solved, axis=(1, 2))


def roots(blocks: Array) -> Array:
    """`R` with `R^T R = B^-1` for each block `B`, lower triangular."""
    number, size = blocks.shape[:2]
    if size == 1:
        return lax.rsqrt(blocks)
    if number * size**3 / 3 <= _FLOPS:
        return inverse_root(blocks)
    # Where larger batches are factored side by side jaxlib 0.10 can stop for ever, the
    # threads of each waiting for those of the others. One by one it does not.
    one = lambda block: jnp.linalg.cholesky(block, symmetrize_input=False)
    return inverse_lower(lax.map(one, blocks))


def _errors(own: _Own, kept: Array) -> Array:
    """`tr(C_bb^-1 M_bb)`, at least 0; NaN if a block that is kept is not positive."""
    size = own.inverse.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(size, dtype=own.inverse.dtype), own.inverse.shape)
    root = roots(jnp.where(kept[:, None, None], own.inverse, eye))
    if size == 1:
        errors = own.moment[:, 0, 0] * (root * root)[:, 0, 0]
    else:
        errors = jnp.sum(matmul(root, own.moment) * root, axis=(1, 2))
    failed = jnp.any(kept & ~jnp.isfinite(errors))
    errors = jnp.maximum(errors, jnp.zeros((), errors.dtype))
    return jnp.where(failed, jnp.full((), jnp.nan, errors.dtype), errors)


def _eliminate(
    late: _Late, rows: _Rows, chosen: Array, valid: Array, size: int
) -> _Rows:
    """The rows `V` and `U` of the blocks chosen; 0 for those that are not valid."""
    within = jnp.arange(size, dtype=jnp.int32)
    at = (chosen[:, None] * size + within[None, :]).reshape(-1)
    valid = jnp.repeat(valid, size)[:, None]
    v, u = rows.v[:, at].T, rows.u[:, at].T
    zero = jnp.zeros((), rows.v.dtype)
    inverse = jnp.where(valid, late.inverse[at] - matmul(v, rows.v), zero)
    moment = late.moment[at] - matmul(v, rows.u) - matmul(u, rows.v)
    eye = jnp.eye(at.shape[0], dtype=inverse.dtype)
    root = roots(jnp.where(valid & valid.T, inverse[:, at], eye)[None])[0]
    new = matmul(root, inverse)
    y = matmul(root, jnp.where(valid, moment, zero))
    half = matmul(matmul(y[:, at], root.T), new) / 2
    return _Rows(new, y - half)


def _without(own: _Own, rows: _Rows) -> _Own:
    """The blocks on the diagonals after a step."""
    number, size, _ = own.inverse.shape
    # [columns of the block, columns that go]
    cut = lambda x: x[:, : number * size].reshape(-1, number, size).transpose(1, 2, 0)
    v, u = cut(rows.v), cut(rows.u)
    if size == 1:
        product = lambda a, b: jnp.sum(a * b, axis=2, keepdims=True)
    else:
        product = lambda a, b: matmul(a, b.transpose(0, 2, 1))
    both = product(v, u)
    return _Own(
        own.inverse - product(v, v), own.moment - both - both.transpose(0, 2, 1)
    )


def _catch_up(late: _Late, rows: _Rows) -> _Late:
    """The matrices without what was put off."""
    v, u = rows
    first, second = jnp.concatenate([v, u]), jnp.concatenate([u, v])
    return _Late(late.inverse - matmul(v.T, v), late.moment - matmul(first.T, second))


def _mark(
    taken: Taken, chosen: Array, valid: Array, errors: Array, step: Array
) -> Taken:
    # What is not valid is written outside, which is not written.
    at = jnp.where(valid, chosen, errors.shape[0])
    put = lambda x, new: x.at[at].set(new, mode="drop")
    return Taken(
        put(taken.kept, False), put(taken.errors, errors[chosen]), put(taken.step, step)
    )
