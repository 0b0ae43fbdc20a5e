"""The exact top-k mask without a sort.

The k-th largest score is found bit by bit on a key that has the order of the scores.
Each pass asks one question, "how many keys are at least this large?", and its answer
is one integer per competing group. So the search runs on any device, under `vmap`,
with a traced k, and over sharded arrays at the price of one scalar all-reduce a pass;
nothing is gathered, sorted or copied. Ties are settled by a second search, over the
flat index, which makes no pass at all when there is nothing to settle.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._typing import Array
from jaxsparse.patterns._counts import count_dtype


def ordered_keys(x: Array) -> Array:
    """Unsigned integers in the order of the floating-point numbers `x`.

    The bits of a non-negative float are in order as they stand; those of a negative
    one are in reverse. -0.0 and 0.0 get the same key, NaN the key 0 below all others.

    Args:
      x: floating point, 16, 32 or 64 bits.

    Returns:
      Unsigned integers of the same width and shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsparse.patterns._threshold import ordered_keys
      >>> x = jnp.array([jnp.nan, -jnp.inf, -1.0, -0.0, 0.0, 1e-30, 2.0, jnp.inf])
      >>> keys = ordered_keys(x)
      >>> (keys[1:] >= keys[:-1]).tolist(), bool(keys[3] == keys[4])
      ([True, True, True, True, True, True, True], True)
    """
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    raw = lax.bitcast_convert_type(x, unsigned)
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    raw = jnp.where(raw == sign, jnp.zeros_like(raw), raw)
    keys = jnp.where(raw >= sign, ~raw, raw | sign)
    return jnp.where(jnp.isnan(x), jnp.zeros_like(keys), keys)


def top_k_masks(
    scores: Sequence[Array], keep: Array, *, axes: tuple[int, ...] | None = None
) -> list[Array]:
    """Masks of the `keep` largest scores of each competing group.

    Args:
      scores: floating-point arrays of one dtype. Several of them form one group, which
        needs `axes=None`.
      keep: how many stay in each group, an integer that may be traced.
      axes: the axes along which the entries of a single array compete; the indices of
        the other axes are groups of their own. None: all axes.

    Returns:
      Bool arrays of the shapes of `scores`, exactly `keep` of each group True. Among
      equal scores the one with the lower flat index (in the order of the list) comes
      first.

    Cost: one pass over the keys for each bit of the dtype, fewer when a threshold
    separates the group before that; one pass for the mask; `log2(n)` more only when
    the threshold is tied. Memory: the keys, as large as the scores.
    """
    keys = [ordered_keys(x) for x in scores]
    dtype = count_dtype(sum(_group_size(x, axes) for x in scores))
    keep = jnp.asarray(keep, dtype)
    threshold, reached = _search(keys, keep, axes)
    above = [k > threshold for k in keys]
    tied = [k == threshold for k in keys]
    cutoff = _tie_cutoff(tied, keep - _total(above, axes, dtype), reached > keep, axes)
    return [
        a | (t & (i < cutoff))
        for a, t, i in zip(above, tied, _flat_indices(tied), strict=True)
    ]


def _search(keys: Sequence[Array], keep: Array, axes) -> tuple[Array, Array]:
    """The largest key that at least `keep` keys reach, and how many reach it.

    Sets the bits of the threshold from the highest down. A group whose count is
    already exact stands still; when all do, the loop ends.
    """
    unsigned = keys[0].dtype
    bits = jnp.iinfo(unsigned).bits
    sizes = _total([k >= 0 for k in keys], axes, keep.dtype)
    start = jnp.zeros_like(sizes, dtype=unsigned)

    def unsettled(carry):
        bit, _, reached = carry
        return (bit >= 0) & jnp.any(reached != keep)

    def try_bit(carry):
        bit, threshold, reached = carry
        candidate = threshold | (jnp.ones((), unsigned) << bit.astype(unsigned))
        count = _total([k >= candidate for k in keys], axes, keep.dtype)
        accept = (count >= keep) & (reached != keep)
        return (
            bit - 1,
            jnp.where(accept, candidate, threshold),
            jnp.where(accept, count, reached),
        )

    first = (jnp.asarray(bits - 1, jnp.int32), start, sizes)
    _, threshold, reached = lax.while_loop(unsettled, try_bit, first)
    return threshold, reached


def _tie_cutoff(tied: Sequence[Array], need: Array, partly: Array, axes) -> Array:
    """The flat index below which tied entries are kept: `need` of them per group.

    Where the ties are not cut (`partly` False), it is past the last index.
    """
    n = sum(t.size for t in tied)
    dtype = count_dtype(n)
    indices = _flat_indices(tied)
    low = jnp.where(partly, jnp.zeros_like(need, dtype=dtype), n)
    high = jnp.full_like(low, n)

    def unsettled(carry):
        low, high = carry
        return jnp.any(low < high)

    def halve(carry):
        low, high = carry
        middle = low + (high - low) // 2
        kept = [t & (i < middle) for t, i in zip(tied, indices, strict=True)]
        enough = _total(kept, axes, need.dtype) >= need
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    return lax.while_loop(unsettled, halve, (low, high))[0]


def _total(flags: Sequence[Array], axes, dtype) -> Array:
    """How many flags are True in each group; axes that compete stay with size 1."""
    if len(flags) == 1:
        return _count(flags[0], axes, dtype, keepdims=axes is not None)
    return sum((_count(f, None, dtype) for f in flags), start=jnp.zeros((), dtype))


def _count(flags: Array, axes, dtype, *, keepdims: bool = False) -> Array:
    """Counts in float32 along one axis and in integers along the rest.

    Sums of float32 vectorise where sums of integers do not (twice as fast on x86), and
    they are exact below 2**24, which one axis is.
    """
    axes = tuple(range(flags.ndim)) if axes is None else axes
    if not axes:
        return flags.astype(dtype)
    inner, outer = axes[-1], axes[:-1]
    if flags.shape[inner] >= 2**24:
        return jnp.sum(flags, axis=axes, dtype=dtype, keepdims=keepdims)
    partial = jnp.sum(flags, axis=inner, dtype=jnp.float32, keepdims=True)
    total = jnp.sum(partial.astype(dtype), axis=outer, dtype=dtype, keepdims=True)
    return total if keepdims else lax.squeeze(total, axes)


def _flat_indices(arrays: Sequence[Array]) -> list[Array]:
    """Row-major positions, running on from one array to the next."""
    dtype = count_dtype(sum(x.size for x in arrays))
    indices, offset = [], 0
    for x in arrays:
        index = jnp.full(x.shape, offset, dtype)
        stride = 1
        for axis in reversed(range(x.ndim)):
            index = index + stride * lax.broadcasted_iota(dtype, x.shape, axis)
            stride *= x.shape[axis]
        indices.append(index)
        offset += x.size
    return indices


def _group_size(x: jax.Array, axes) -> int:
    return x.size if axes is None else math.prod(x.shape[a] for a in axes)
