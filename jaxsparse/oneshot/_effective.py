"""Kernels that are scaled or masked before they act: solved as what acts.

With `E = S * W` entry by entry, and `S` not dependent on `W`, a zero of `E` is one of
`W`. What the solver makes of `E` is divided by `S` again.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import solvers
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import Array
from jaxsparse.linalg.chunks import is_spread
from jaxsparse.linalg.energy import energy
from jaxsparse.oneshot._segments import Segments
from jaxsparse.oneshot._unseen import over_places
from jaxsparse.tracing import Kernel
from jaxsparse.tracing.changes import check_solvable


class NoScale(ValueError):
    """What the kernel at `path` is multiplied by could not be found."""

    def __init__(self, path: str, message: str):
        super().__init__(message)
        self.path = path


def unsolvable(kernels: Mapping[str, Kernel]) -> dict[str, str]:
    """The kernels that the model changes other than by a product."""
    found = {}
    for path, kernel in kernels.items():
        try:
            check_solvable(path, kernel.changes, kernels)
        except ValueError as error:
            found[path] = str(error)
    return found


def scales_of(
    pieces: Segments,
    kernels: Mapping[str, Kernel],
    paths: tuple[str, ...],
    leaves: Mapping[str, Array],
    value: Callable[[int], Any],
) -> dict[str, Array]:
    """`S` of each kernel that is changed before it is contracted.

    It is the derivative of the operands that are contracted: they are products.
    """
    found = {}
    for path, kernel in kernels.items():
        if not kernel.changes:
            continue
        number, raw = pieces.flat.arguments[paths.index(path)], leaves[path]
        total = None
        for reading in kernel.readings:
            site = reading.site
            steps = [s for s in pieces.flat.steps if s.address == site.address]
            if not steps:
                raise NoScale(
                    path,
                    f"{_said(kernel)}, within a loop at {site.source}, where the scale "
                    "could not be found. Leave it out with `where`, or fold the scale "
                    "into the kernel.",
                )
            for step in steps:
                part = _scale(pieces, step.ins[site.operand], number, raw, value)
                total = part if total is None else _joined(total, part)
                if total is None or not jnp.any(part != 0):
                    raise NoScale(
                        path,
                        f"{_said(kernel)}, and is not the same product at all places "
                        "that read it, or one whose derivative is not the scale. Leave "
                        "it out with `where`, or fold the scale into the kernel.",
                    )
        assert total is not None, "a kernel has a reading"
        found[path] = total
    return found


def _said(kernel: Kernel) -> str:
    first = kernel.changes[0]
    return f"{kernel.path}: it is changed by `{first.primitive}` at {first.source}"


def _scale(
    pieces: Segments, wanted: Any, number: int, raw: Array, value: Callable[[int], Any]
) -> Array:
    segment = pieces.segment([wanted], ())

    def operand(raw: Array) -> Array:
        (acts,) = segment.call([raw if x == number else value(x) for x in segment.ins])
        return acts

    acts, back = jax.vjp(operand, jnp.asarray(raw))
    (scale,) = back(jnp.ones_like(acts))
    (squared,) = back(acts)
    wide = wide_dtype(scale.dtype)
    scale, raw = scale.astype(wide), jnp.asarray(raw).astype(wide)
    # Otherwise an entry is there twice, or its derivative is made up.
    off = jnp.abs(squared.astype(wide) - raw * scale * scale)
    near = off <= 0.05 * jnp.abs(raw * scale * scale) + 1e-30
    return jnp.where(jnp.all(near), scale, jnp.zeros_like(scale))


def _joined(a: Array, b: Array) -> Array | None:
    """Of two places that read a kernel; None where they scale an entry differently."""
    both = (a != 0) & (b != 0)
    if jnp.any(both & (jnp.abs(a - b) > 1e-5 * jnp.abs(a))):
        return None
    return jnp.where(a != 0, a, b)


@jax.jit
def scaled(matrices: Array, scale: Array) -> Array:
    """The weights that act."""
    return matrices.astype(scale.dtype) * scale


@jax.jit
def unscaled(
    matrices: Array, scale: Array, solved: solvers.Solved, gram: Array | None
) -> solvers.Solved:
    """The weights to store, so that those that were solved act."""
    before = matrices.astype(scale.dtype) * scale
    acts = jnp.where(scale == 0, 0, solved.w.astype(scale.dtype))
    moved = (acts / jnp.where(scale == 0, 1, scale)).astype(matrices.dtype)
    stays = (acts == before) | (scale == 0)
    new = jnp.where(solved.mask, jnp.where(stays, matrices, moved), 0)
    info = solved.info
    if gram is not None:
        square = lambda x: energies(x, gram.astype(x.dtype))
        error, whole = square(acts - before), square(before)
        kind = info.error.dtype
        relative = jnp.where(whole > 0, error / jnp.where(whole > 0, whole, 1), 0)
        info = info._replace(
            error=error.astype(kind), relative_error=relative.astype(kind)
        )
    return solved._replace(w=new.astype(matrices.dtype), info=info)


def energies(matrices: Array, gram: Array) -> Array:
    """`tr(W G W^T)` of each matrix `[p, d_out, d_in]`, whatever of it is sharded."""
    if is_spread(matrices, gram):
        return jnp.sum((matrices @ gram) * matrices, axis=(1, 2))
    return over_places(lambda w, gram: energy(w.T, gram), matrices, gram)
