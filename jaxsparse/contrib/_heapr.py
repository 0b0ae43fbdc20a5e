"""Scores of atomic experts: of each hidden unit of each expert of an MoE (HEAPr)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.linalg.factor import HIGHEST


class AtomicSums(NamedTuple):
    """Sums over the tokens of each expert; all four are 0 before the first.

    Attributes:
      count: `[*batch]`, how many tokens reached the expert (the sum of their weights).
      inputs: `[*batch, f]`, the sum of `x_k^2`.
      outputs: `[*batch, f]`, the sum of `(g . w_k)^2`.
      joint: `[*batch, f]`, the sum of `x_k^2 (g . w_k)^2`.
    """

    count: Array
    inputs: Array
    outputs: Array
    joint: Array


def atomic_init(
    batch: tuple[int, ...], size: int, *, dtype: Any = jnp.float32
) -> AtomicSums:
    """Start sums over no tokens.

    Args:
      batch: how the experts are stacked: `(experts,)`, or `(layers, experts)` for a
        scanned model.
      size: the hidden units of one expert, f.
      dtype: the type of the sums: float32 or float64.

    Returns:
      An `AtomicSums`, `4 * experts * size` numbers at most.

    Raises:
      ValueError: a size that is not positive.
      TypeError: another dtype.

    Example:
      >>> import jaxsparse as js
      >>> js.contrib.atomic_init((8,), 16).inputs.shape
      (8, 16)
    """
    _checks.check_positive_int(size, name="size")
    if not isinstance(batch, tuple | list):
        raise TypeError(f"batch must be a tuple of sizes, got {batch!r}.")
    for n in batch:
        _checks.check_positive_int(n, name="batch")
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"Sums are kept in float32 or float64, not in {dtype}.")
    zeros = lambda: jnp.zeros((*batch, size), dtype)
    return AtomicSums(jnp.zeros(batch, dtype), zeros(), zeros(), zeros())


def atomic_update(
    sums: AtomicSums, x: Array, g: Array, down: Array, *, weight: Array | None = None
) -> AtomicSums:
    """Add tokens that are laid out by expert, as an MoE by einsum does.

    `g` is the gradient of the loss at the output of the down projection. It comes from
    adding zeros there and differentiating with respect to them: `jax.grad(lambda zeros:
    loss(params, batch, zeros))(zeros)`. A loss that is summed over tokens keeps its
    squares far from the smallest float32; the order of the scores does not depend on
    it. NaN is not checked, which would wait for the device; it stays in the sums.

    Args:
      sums: the sums so far.
      x: the inputs of the down projection, `[*batch, n, f]`, of any floating type.
      g: the gradients at its output, `[*batch, n, d]`.
      down: the down projection, `[*batch, f, d]`: `y = x @ down`. It has to stay the
        same over all updates.
      weight: an array that broadcasts to `[*batch, n]`. It is 1 for the tokens that the
        router sent to the expert, and 0 for others and for padding, whose values
        (including NaN) do not matter. None counts every row, so pass weights if every
        expert computes every token.

    Returns:
      The sums with these tokens.

    Raises:
      ValueError: shapes that do not fit; a negative weight (in eager use).
      TypeError: rows that are not floating point, or wider than the sums.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> x, g = jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0]]])
      >>> down = jnp.array([[[1.0], [0.5]]])
      >>> sums = js.contrib.atomic_init((1,), 2)
      >>> sums = js.contrib.atomic_update(sums, x, g, down)
      >>> sums.inputs.tolist(), sums.outputs.tolist()
      ([[1.0, 4.0]], [[9.0, 2.25]])
    """
    _checks.check_is(AtomicSums, "js.contrib.atomic_init(...)", sums=sums)
    _checks.check_arrays(x=x, g=g, down=down)
    *batch, f = sums.inputs.shape
    n, d = _rows_and_width(x, down, len(batch))
    _check("x", x, (*batch, n, f), sums)
    _check("g", g, (*batch, n, d), sums)
    _check("down", down, (*batch, f, d), sums)
    if weight is not None:
        _check_weight(weight, (*batch, n))
    return _update(sums, x, g, down, weight)


@jax.jit
def _update(sums: AtomicSums, x: Array, g: Array, down: Array, weight: Any):
    dtype = sums.inputs.dtype
    x, g, down = (a.astype(dtype) for a in (x, g, down))
    rows = x.shape[:-1]
    w = jnp.ones(rows, dtype) if weight is None else jnp.asarray(weight).astype(dtype)
    w = jnp.broadcast_to(w, rows)
    seen = (w > 0)[..., None]
    x, g = (jnp.where(seen, a, jnp.zeros((), dtype)) for a in (x, g))
    z = jnp.einsum("...nd,...fd->...nf", g, down, precision=HIGHEST)
    w, x2, z2 = w[..., None], jnp.square(x), jnp.square(z)
    added = AtomicSums(
        jnp.sum(w[..., 0], axis=-1),
        jnp.sum(w * x2, axis=-2),
        jnp.sum(w * z2, axis=-2),
        jnp.sum(w * x2 * z2, axis=-2),
    )
    return jax.tree.map(jnp.add, sums, added)


def atomic_update_ragged(
    sums: AtomicSums, x: Array, g: Array, down: Array, group_sizes: Array
) -> AtomicSums:
    """Add tokens that are sorted by expert, as `jax.lax.ragged_dot` takes them.

    Args:
      sums: the sums so far, of one batch axis (experts).
      x: the inputs of the down projection, `[n, f]`: first those of expert 0, then
        those of expert 1, and so on.
      g: the gradients at its output, `[n, d]`; see `atomic_update`.
      down: the down projection, `[experts, f, d]`.
      group_sizes: how many rows each expert has, `[experts]` integers. Rows after the
        last expert's (padding) do not count.

    Returns:
      The sums with these tokens.

    Raises:
      ValueError: shapes that do not fit; sizes that are negative or add up to more
        than the rows (in eager use).
      TypeError: rows that are not floating point, or wider than the sums; sizes that
        are not integers.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> x, g = jnp.array([[1.0], [2.0], [4.0]]), jnp.ones((3, 1))
      >>> sums = js.contrib.atomic_init((2,), 1)
      >>> sums = js.contrib.atomic_update_ragged(
      ...     sums, x, g, jnp.ones((2, 1, 1)), jnp.array([2, 1])
      ... )
      >>> sums.count.tolist(), sums.inputs.tolist()
      ([2.0, 1.0], [[5.0], [16.0]])
    """
    _checks.check_is(AtomicSums, "js.contrib.atomic_init(...)", sums=sums)
    _checks.check_arrays(x=x, g=g, down=down, group_sizes=group_sizes)
    if sums.inputs.ndim != 2:
        raise ValueError(
            f"Ragged rows need sums over one batch axis, `[experts, f]`, got "
            f"{sums.inputs.shape}. Keep one AtomicSums for each layer and stack them."
        )
    experts, f = sums.inputs.shape
    n, d = _rows_and_width(x, down, 0)
    _check("x", x, (n, f), sums)
    _check("g", g, (n, d), sums)
    _check("down", down, (experts, f, d), sums)
    if jnp.shape(group_sizes) != (experts,):
        raise ValueError(
            f"group_sizes has shape {jnp.shape(group_sizes)}, expected ({experts},): "
            "the number of rows of each expert."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes must be integers, got {group_sizes.dtype}.")
    if _checks.is_concrete(group_sizes):
        sizes = np.asarray(group_sizes)
        if sizes.min() < 0 or sizes.sum() > n:
            raise ValueError(
                f"group_sizes must be at least 0 and add up to at most {n}, the number "
                f"of rows; got {sizes}."
            )
    return _update_ragged(sums, x, g, down, group_sizes)


@jax.jit
def _update_ragged(sums: AtomicSums, x: Array, g: Array, down: Array, sizes: Array):
    dtype, experts = sums.inputs.dtype, sums.inputs.shape[0]
    x, g, down = (a.astype(dtype) for a in (x, g, down))
    sizes = sizes.astype(jnp.int32)
    z = lax.ragged_dot(g, jnp.swapaxes(down, 1, 2), sizes, precision=HIGHEST)
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    # Rows of no expert get a number that is out of range, which segment_sum drops.
    expert = jnp.searchsorted(jnp.cumsum(sizes), row, side="right")
    add = lambda a: jax.ops.segment_sum(a, expert, num_segments=experts)
    x2, z2 = jnp.square(x), jnp.square(z)
    added = AtomicSums(sizes.astype(dtype), add(x2), add(z2), add(x2 * z2))
    return jax.tree.map(jnp.add, sums, added)


def atomic_merge(a: AtomicSums, b: AtomicSums) -> AtomicSums:
    """Add up the sums of two sets of tokens: of chunks, devices or processes.

    Args:
      a: sums.
      b: sums over other tokens, for the same experts.

    Returns:
      An `AtomicSums`; the order matters up to rounding only.

    Raises:
      ValueError: different shapes.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> none = js.contrib.atomic_init((1,), 1)
      >>> one = jnp.ones((1, 1, 1))
      >>> some = js.contrib.atomic_update(none, one, one, one)
      >>> js.contrib.atomic_merge(some, some).count.tolist()
      [2.0]
    """
    _checks.check_is(AtomicSums, "js.contrib.atomic_init(...)", a=a, b=b)
    if a.inputs.shape != b.inputs.shape:
        raise ValueError(
            f"Sums of shapes {a.inputs.shape} and {b.inputs.shape} cannot be merged. "
            "Were they taken in different layers?"
        )
    return jax.tree.map(jnp.add, a, b)


def atomic_scores(sums: AtomicSums, *, joint: bool = False) -> Array:
    """Score each hidden unit of each expert by the loss that its removal costs (HEAPr).

    Atomic expert k of expert e is a row of the gate, a row of the up projection and a
    column of the down projection, `w_k`; it adds `x_k w_k` to the expert's output.
    Without it the loss changes, to second order and with the empirical Fisher for the
    Hessian at the output, by half of

      `s[e, k] = E[x_k^2] * w_k^T C_e w_k`,  `C_e = E[g g^T]`,

    with means over the tokens that reached e. This assumes that `x_k` and `g` are
    independent; with `joint=True` the score is `s[e, k] = E[x_k^2 (g . w_k)^2]`
    instead. Li et al. (2025, arXiv:2509.22299).

    For ranking over all layers and experts, give these scores to
    `channels.drop_lowest(scope="global")`. There each expert of a layer loses equally
    many units, so that arrays stay rectangular. Ragged widths, which the paper has, are
    masks: `patterns.masks(scores, 0.2, pattern=Unstructured(scope="global"))` ranks a
    tree of scores globally, and `mask[:, None, :]` and `mask[:, :, None]` apply to up
    `[experts, d, f]` and down `[experts, f, d]`.

    Differs from the reference implementation, which forms `C_e` (`d^2` numbers for
    each expert) in a first pass and sums `x^2` in a second one. As `w_k^T g g^T w_k =
    (g . w_k)^2`, sums of `f` numbers and one pass suffice.

    Args:
      sums: the sums over the calibration set.
      joint: whether to average the product rather than multiply averages.

    Returns:
      `[*batch, f]`, larger = keep. Experts that no token reached have -1, which is
      below every other score (as in the reference implementation).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> x, g = jnp.array([[[1.0, 2.0]]] * 2), jnp.array([[[3.0]]] * 2)
      >>> down, routed = jnp.array([[[1.0], [0.5]]] * 2), jnp.array([[1.0], [0.0]])
      >>> sums = js.contrib.atomic_init((2,), 2)
      >>> sums = js.contrib.atomic_update(sums, x, g, down, weight=routed)
      >>> js.contrib.atomic_scores(sums).tolist()
      [[9.0, 9.0], [-1.0, -1.0]]
    """
    _checks.check_is(AtomicSums, "js.contrib.atomic_init(...)", sums=sums)
    _checks.check_bool(joint=joint)
    count = sums.count[..., None]
    reached = count > 0
    per = jnp.where(reached, count, jnp.ones_like(count))
    apart = (sums.inputs / per) * (sums.outputs / per)
    scores = sums.joint / per if joint else apart
    return jnp.where(reached, scores, jnp.full_like(scores, -1))


def _rows_and_width(x: Any, down: Any, batch: int) -> tuple[int, int]:
    """The n and d that the arrays have; -1 where an array has too few axes."""
    shape, out = jnp.shape(x), jnp.shape(down)
    return (shape[-2] if len(shape) >= batch + 2 else -1, out[-1] if out else -1)


def _check(name: str, x: Any, expected: tuple[int, ...], sums: AtomicSums) -> None:
    if jnp.shape(x) != expected:
        say = lambda shape: "[" + ", ".join("n" if s < 0 else str(s) for s in shape)
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}, expected {say(expected)}] for sums of "
            f"{sums.inputs.shape}. (x is [*batch, n, f], g is [*batch, n, d] and down "
            "is [*batch, f, d]; transpose or reshape what is laid out otherwise.)"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be real floating-point numbers, got {x.dtype}.")
    if x.dtype.itemsize > sums.inputs.dtype.itemsize:
        raise TypeError(
            f"{name} of {x.dtype} would be rounded to {sums.inputs.dtype}. Cast it, or "
            f"start with atomic_init(..., dtype={x.dtype})."
        )


def _check_weight(weight: Any, rows: tuple[int, ...]) -> None:
    shape = jnp.shape(weight)
    try:
        fits = np.broadcast_shapes(shape, rows) == rows
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"weight has shape {shape}, which does not broadcast to one number for "
            f"each row, {rows}."
        )
    if (
        _checks.is_concrete(weight)
        and np.size(weight)
        and not float(np.min(weight)) >= 0
    ):
        raise ValueError(
            f"weight must be at least 0; the least is {np.min(weight)}. (1 for routed "
            "tokens, 0 for others.)"
        )
