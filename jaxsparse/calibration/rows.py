"""The rows of numbers that an equation contracts with a kernel."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import Array
from jaxsparse.calibration._stats import RunningStats, init, update
from jaxsparse.tracing.kernels import Reading


def rows_of(reading: Reading, eqn: Any, operands: list[Array]) -> Array:
    """The inputs that meet a kernel, in the order of its matrices' columns."""
    x = operands[reading.site.other]
    if reading.site.conv is not None:
        rows = _patches(eqn, x, operands[reading.site.operand].shape)
    else:
        contracted, batch = reading.site.of_input
        free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
        x = x.transpose(*batch, *free, *contracted)
        sizes = x.shape
        b, f = len(batch), len(batch) + len(free)
        rows = x.reshape(
            math.prod(sizes[:b]), math.prod(sizes[b:f]), math.prod(sizes[f:])
        )
    return _columns(rows, reading.inputs)


def _columns(rows: Array, inputs: np.ndarray) -> Array:
    if np.array_equal(inputs, np.arange(rows.shape[-1])):
        return rows
    first = int(inputs[0])
    if np.array_equal(inputs, np.arange(first, first + len(inputs))):
        return rows[..., first : first + len(inputs)]
    return jnp.take(rows, jnp.asarray(inputs), axis=-1)


def _patches(eqn: Any, x: Array, kernel: tuple[int, ...]) -> Array:
    """What each position of a convolution's window sees: `[groups, n, c * window]`.

    By slices: a convolution with a kernel of ones and zeros, as in `jax.lax`, takes
    long on CPU.
    """
    p = eqn.params
    spec, groups = p["dimension_numbers"], p["feature_group_count"]
    window = [kernel[a] for a in spec.rhs_spec[2:]]
    x = x.transpose(spec.lhs_spec)
    around = zip(p["padding"], p["lhs_dilation"], strict=True)
    config = [(0, 0, 0)] * 2 + [(lo, hi, by - 1) for (lo, hi), by in around]
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    n, channels = x.shape[:2]
    reach = [(w - 1) * by for w, by in zip(window, p["rhs_dilation"], strict=True)]
    out = [
        (size - r - 1) // by + 1
        for size, r, by in zip(x.shape[2:], reach, p["window_strides"], strict=True)
    ]
    taps = []
    for tap in np.ndindex(*window):
        start = [t * by for t, by in zip(tap, p["rhs_dilation"], strict=True)]
        steps = list(p["window_strides"])
        stop = [
            s + (o - 1) * by + 1 for s, o, by in zip(start, out, steps, strict=True)
        ]
        part = lax.slice(x, [0, 0, *start], [n, channels, *stop], [1, 1, *steps])
        taps.append(part.reshape(n, channels, math.prod(out)))
    patches = jnp.stack(taps, axis=2)  # [n, channels, window, positions]
    patches = patches.reshape(n, groups, -1, math.prod(out))
    patches = patches.transpose(1, 0, 3, 2)
    return patches.reshape(groups, -1, patches.shape[-1])


def _ragged_weights(sizes: Array, rows: int) -> Array:
    """Which rows each group has: `[groups, rows]` of 0 and 1."""
    end = jnp.cumsum(sizes)[:, None]
    at = jnp.arange(rows)[None]
    return ((at >= end - sizes[:, None]) & (at < end)).astype(jnp.float32)


def reading_key(reading: Reading, depth: int) -> Any:
    """What the statistics of a reading depend on, beside its equation's text."""
    site = reading.site
    inside = site.address[depth:], tuple(scan[depth:] for scan in reading.scans)
    operands = site.primitive, site.operand, site.other
    axes = site.batch, site.of_input, site.groups
    return inside, operands, axes, reading.inputs.tobytes()


def contribution(
    reading: Reading,
    eqn: Any,
    operands: list[Array],
    *,
    gram: bool,
    sample: np.ndarray | None,
    weight: Array | None,
) -> RunningStats:
    """The statistics of one evaluation of an equation."""
    rows = rows_of(reading, eqn, operands)
    by_row = None
    if weight is not None:
        by_row = jnp.broadcast_to(
            jnp.take(weight.reshape(-1), jnp.asarray(sample))[None], rows.shape[:-1]
        )
    if reading.site.by_groups:
        own = _ragged_weights(operands[2], rows.shape[1])
        rows = jnp.broadcast_to(rows, (own.shape[0], *rows.shape[1:]))
        by_row = own if by_row is None else own * by_row
    elif reading.site.batch:
        # Experts side by side: a row of zeros is a token that went elsewhere, or a
        # slot that stayed empty.
        own = jnp.any(rows != 0, axis=-1).astype(jnp.float32)
        by_row = own if by_row is None else own * by_row
    dtype = wide_dtype(rows.dtype)
    state = init((rows.shape[0],), rows.shape[-1], gram=gram, dtype=dtype)
    return update(state, rows, by_row)


def flattened(part: RunningStats) -> RunningStats:
    """With one leading axis in the place of several."""
    lead = part.count.ndim
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), part)


def placed(part: RunningStats, at: np.ndarray, total: int) -> RunningStats:
    """Statistics at their places among those of `total` kernels, which saw nothing."""
    if np.array_equal(at, np.arange(total)):
        return part
    empty = lambda x: jnp.zeros((total, *x.shape[1:]), x.dtype)
    return jax.tree.map(lambda x: empty(x).at[jnp.asarray(at)].set(x), part)


def zeros_like(shapes: Any) -> Any:
    """Statistics of nothing, of these shapes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
