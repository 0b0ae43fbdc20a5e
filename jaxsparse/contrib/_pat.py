"""PAT: low-rank modules with one gate for all, which narrow the residual stream."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide, widen
from jaxsparse._straight import with_derivative_of
from jaxsparse._typing import Array, PyTree
from jaxsparse.linalg.factor import HIGHEST


class Hybrid(NamedTuple):
    """The parameters of one hybrid sparsification module.

    Attributes:
      down: `[d, r]`.
      up: `[r, d]`.
      scale: `[d]`.
    """

    down: Array
    up: Array
    scale: Array


def init_hybrid(width: int, *, key: Array, rank: int = 200) -> Hybrid:
    """Make a module that changes nothing: `up` zeros, `scale` ones.

    `down` is uniform on `+- 1 / sqrt(d)`, as the reference implementation draws it.

    Args:
      width: d, the width of the residual stream.
      key: a typed key.
      rank: r; 200 in the paper.

    Returns:
      A `Hybrid` of float32.

    Raises:
      ValueError: a width or rank below 1.
      TypeError: a `key` that is not a random key.

    Example:
      >>> import jax, jaxsparse as js
      >>> module = js.contrib.init_hybrid(8, key=jax.random.key(0), rank=2)
      >>> module.down.shape, module.up.shape, module.scale.shape
      ((8, 2), (2, 8), (8,))
    """
    _checks.check_positive_int(width, name="width")
    _checks.check_positive_int(rank, name="rank")
    _checks.check_key(key)
    bound = 1 / math.sqrt(width)
    down = jax.random.uniform(key, (width, rank), jnp.float32, -bound, bound)
    return Hybrid(
        down, jnp.zeros((rank, width), jnp.float32), jnp.ones(width, jnp.float32)
    )


def hybrid(module: Hybrid, x: Array, gate: Array) -> Array:
    """Return `(x + x down up) * gate * scale`, the hybrid sparsification module (PAT).

    Apply it to every output that writes to the residual stream (the embedding, the
    projections at the ends of attention and MLP), with a separate module at each place
    and one gate (`hybrid_gate`) for all, so that the whole width of the stream shrinks.
    Liu et al. (2024, PAT, arXiv:2408.14721)::

        def loss_fn(trained, batch, step):
            params, modules, mask = trained
            gate = js.contrib.hybrid_gate(mask, step=step, total_steps=3_000)
            task = task_loss(params, modules, gate, batch)    # calls js.contrib.hybrid
            return task + sum(js.contrib.hybrid_loss(mask, modules, width=3_072))

    At the end `fold_hybrid` merges the modules into the kernels before them, and
    `js.narrowing.narrow` removes the closed channels.

    Args:
      module: as `init_hybrid` makes.
      x: `[..., d]`.
      gate: `[d]`.

    Returns:
      An array like `x`.

    Raises:
      ValueError: a module or gate of another width.
      TypeError: a `module` of another type.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> module = js.contrib.Hybrid(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.ones(2))
      >>> js.contrib.hybrid(module, jnp.array([[1.0, 2.0]]), jnp.array([1.0, 0.5]))
      Array([[4. , 2.5]], dtype=float32)
    """
    _check_module(module)
    _checks.check_floats(x=x, gate=gate)
    d = module.scale.shape[0]
    if not jnp.ndim(x) or x.shape[-1] != d:
        raise ValueError(f"x: expected [..., {d}], got the shape {jnp.shape(x)}.")
    _check_width("gate", gate, d)
    down, up, factor = (a.astype(x.dtype) for a in _linear(module, gate))
    factor = factor.reshape([1] * (x.ndim - 1) + [d])
    moved = x + jnp.matmul(jnp.matmul(x, down), up)
    return jnp.where(factor == 0, jnp.zeros((), x.dtype), moved * factor)


def hybrid_gate(
    mask: Array, *, total_steps: int, step: Any = None, frozen_from: float = 0.8
) -> Array:
    """Return the gate of all modules at a step: open at first, 0 or 1 at the end.

    `sigmoid(T m) + max(1/2 - t / G, 0)` with `T = 1 / (1 - ln t / ln G + 1e-6)` for
    step t of `G = total_steps`. At `m = 0` the gate is 1 in the first step. From step
    `frozen_from * G` on the gate no longer changes, and m gets no gradient.

    Differs from the reference implementation, whose gates are at least 4.5e-5, and 0 at
    `m = 0` at the end, where its loss counts such a channel as kept.

    Args:
      mask: m, `[d]`, zeros at first, one for all modules.
      total_steps: G, at least 2.
      step: from 0 on, possibly traced. None: the gate of the end, `[m >= 0]`.
      frozen_from: the fraction of the steps after which the gate stays.

    Returns:
      `[d]`, of the type of the mask.

    Raises:
      ValueError: a mask that is no vector, fewer than 2 steps, a fraction outside (0,
        1).

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> mask = jnp.array([0.5, 0.0, -0.5])
      >>> gate = js.contrib.hybrid_gate(mask, step=0, total_steps=100)
      >>> [round(x, 2) for x in gate.tolist()]
      [1.12, 1.0, 0.88]
      >>> js.contrib.hybrid_gate(mask, total_steps=100).tolist()
      [1.0, 1.0, 0.0]
    """
    _check_vector(mask)
    _checks.check_positive_int(total_steps, name="total_steps", least=2)
    _checks.check_number(above=0, below=1, frozen_from=frozen_from)
    if step is None:
        return (mask >= 0).astype(mask.dtype)
    _checks.check_number(least=0, step=step)
    wide = widen(mask)
    last = math.floor(frozen_from * total_steps)
    at = jnp.asarray(step)
    t = jnp.minimum(at, last).astype(wide.dtype)
    # Before the first step the logarithm is that of 1.
    progress = jnp.log(jnp.maximum(t, 1)) / math.log(total_steps)
    sharpness = 1 / (1 - progress + 1e-6)
    m = jnp.where(at < last, wide, lax.stop_gradient(wide))
    more = jnp.maximum(0.5 - t / total_steps, 0)
    return (jax.nn.sigmoid(sharpness * m) + more).astype(mask.dtype)


class HybridLoss(NamedTuple):
    """Three terms of a loss; their sum is the paper's.

    Attributes:
      width: `10 |n - width| / width`, n the number of channels with `m >= 0`. Its
        derivative is that of `n = sum m` (straight-through).
      polarization: the mean of `(m - 1/2)^2` where `m >= 0`, and that of `(m + 1/2)^2`
        where it is below.
      identity: over the modules the sum of the mean squares of `down^T down - I`.
    """

    width: Array
    polarization: Array
    identity: Array


def hybrid_loss(mask: Array, modules: PyTree, *, width: int) -> HybridLoss:
    """Return the terms of the loss for the gate and its modules (PAT).

    Differs from the reference implementation, where the mean over no channels is NaN:
    here it is 0. A module whose rank is above the width cannot reach 0 in the last
    term.

    Args:
      mask: m, `[d]`.
      modules: a `Hybrid`, or any tree of them.
      width: the number of channels to keep.

    Returns:
      A `HybridLoss` of three scalars.

    Raises:
      ValueError: a width outside of 1 ... d, a mask that is no vector.
      TypeError: `modules` of another type.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> module = js.contrib.Hybrid(jnp.eye(4, 2), jnp.zeros((2, 4)), jnp.ones(4))
      >>> mask = jnp.array([0.5, 0.5, 0.25, -0.5])
      >>> loss = js.contrib.hybrid_loss(mask, module, width=2)
      >>> [round(float(x), 4) for x in loss]
      [5.0, 0.0208, 0.0]
    """
    _check_vector(mask)
    _checks.check_positive_int(width, name="width")
    if width > mask.shape[0]:
        raise ValueError(f"width={width}: the mask has {mask.shape[0]} channels.")
    is_module = lambda x: isinstance(x, Hybrid)
    found = jax.tree.leaves(modules, is_leaf=is_module)
    for module in found or [None]:
        _check_module(module, "modules")
    m = as_wide(mask)
    open_ = m >= 0
    count = jnp.sum(with_derivative_of(m, open_))
    pull = _mean(jnp.square(m - 0.5), open_) + _mean(jnp.square(m + 0.5), ~open_)
    identity = sum(map(_identity, found), start=jnp.zeros((), m.dtype))
    return HybridLoss(10 * jnp.abs(count - width) / width, pull, identity)


def fold_hybrid(
    module: Hybrid, kernel: Array, gate: Array, *, bias: Array | None = None
) -> tuple[Array, Array | None]:
    """Fold a module into the kernel (and bias) before it.

    `W (I + down up) diag(gate * scale)`: the model without its modules then computes
    the same. With the final gate, closed channels are exactly 0 in every output that
    writes to the stream, so they can be removed::

        closed = np.flatnonzero(gate == 0)
        small = js.narrowing.narrow(trace, folded, {name: closed})

    with a trace of the model without modules, and the name of the stream's group in
    `js.coupling.groups(trace)`. A norm that divides by the root of the mean square
    (RMSNorm, as the paper's models have) does the same before and after; LayerNorm does
    not, because closed channels affect its mean until they are removed.

    Args:
      module: as `init_hybrid` makes, trained or not.
      kernel: `[..., d]`; an embedding's rows too.
      gate: `[d]`.
      bias: `[d]`, of the same layer; None where it has none.

    Returns:
      The kernel and the bias (None where none was given), of their types; computed in
      float32 at least.

    Raises:
      ValueError: a kernel, gate or bias of another width.
      TypeError: a `module` of another type.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> module = js.contrib.Hybrid(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.ones(2))
      >>> kernel = jnp.array([[1.0, 2.0]])
      >>> js.contrib.fold_hybrid(module, kernel, jnp.array([1.0, 0.0]))[0].tolist()
      [[4.0, 0.0]]
    """
    _check_module(module)
    _checks.check_floats(kernel=kernel, gate=gate)
    d = module.scale.shape[0]
    if not jnp.ndim(kernel) or kernel.shape[-1] != d:
        raise ValueError(
            f"kernel: expected [..., {d}], got the shape {jnp.shape(kernel)}."
        )
    _check_width("gate", gate, d)
    down, up, factor = _linear(module, gate)

    def fold(w: Array) -> Array:
        wide, times = as_wide(w), functools.partial(jnp.matmul, precision=HIGHEST)
        d0, d1, by = (a.astype(wide.dtype) for a in (down, up, factor))
        moved = wide + times(times(wide, d0), d1)
        by = by.reshape([1] * (w.ndim - 1) + [d])
        folded = (moved * by).astype(w.dtype)
        return jnp.where(by == 0, jnp.zeros((), w.dtype), folded)

    if bias is not None:
        _checks.check_floats(bias=bias)
        _check_width("bias", bias, d)
        bias = fold(bias)
    return fold(kernel), bias


def _linear(module: Hybrid, gate: Array) -> tuple[Array, Array, Array]:
    """The factors of a module, and what its result is multiplied by."""
    factor = as_wide(gate) * as_wide(module.scale)
    return as_wide(module.down), as_wide(module.up), factor


def _mean(x: Array, where: Array) -> Array:
    """The mean of some numbers, 0 of none."""
    count = jnp.sum(where.astype(x.dtype))
    total = jnp.sum(jnp.where(where, x, jnp.zeros((), x.dtype)))
    return total / jnp.maximum(count, 1)


def _identity(module: Hybrid) -> Array:
    down = as_wide(module.down)
    gram = jnp.matmul(down.T, down, precision=HIGHEST)
    return jnp.mean(jnp.square(gram - jnp.eye(gram.shape[0], dtype=gram.dtype)))


def _check_module(module: Any, name: str = "module") -> None:
    _checks.check_is(Hybrid, "js.contrib.init_hybrid(...)", **{name: module})
    for part, x in zip(Hybrid._fields, module, strict=True):
        _checks.check_floats(**{f"{name}.{part}": x})
    shapes = [jnp.shape(x) for x in module]
    d, r = shapes[0] if len(shapes[0]) == 2 else (0, 0)
    if not d or shapes != [(d, r), (r, d), (d,)]:
        raise ValueError(
            f"{name}: expected the shapes (d, r), (r, d) and (d,); got {shapes}."
        )


def _check_vector(mask: Array) -> None:
    _checks.check_floats(mask=mask)
    if jnp.ndim(mask) != 1:
        raise ValueError(
            f"mask: expected a vector [d], got the shape {jnp.shape(mask)}."
        )


def _check_width(name: str, x: Array, d: int) -> None:
    if jnp.shape(x) != (d,):
        raise ValueError(f"{name}: expected the shape ({d},), got {jnp.shape(x)}.")
