"""The block-diagonal empirical Fisher matrix (WoodFisher, oBERT) and its inverse."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks, patterns
from jaxsparse._dtypes import widest
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.curvature._estimator import Estimator, Form, Sums, at_once, streamed
from jaxsparse.curvature._trees import (
    STATIC,
    check_factor,
    mean_diagonal,
    paths_of_layouts,
)
from jaxsparse.curvature.block_sums import add_sums, sum_up
from jaxsparse.curvature.layout import (
    BlockLayout,
    block_layouts,
    block_sharding,
    check_block_size,
)
from jaxsparse.linalg import triangle as _triangle
from jaxsparse.linalg.chunks import over_blocks
from jaxsparse.linalg.factor import inverse_root
from jaxsparse.linalg.triangle import Triangle
from jaxsparse.tree import AxesRule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockFisher:
    """The inverse of a damped block-diagonal Fisher matrix, as its square root.

    For each block `F^-1 = R^T R` with `R` lower triangular: `block_size + 2` numbers a
    weight, and no rounding makes a diagonal of `F^-1` negative.

    Attributes:
      roots: for each parameter `R`, a triangle of shape `[*lead, b, b]`.
      diagonals: for each parameter the diagonal of `F^-1`, `[*lead, b]`.
      damping: the number added to the diagonal, a scalar.
      treedef: the structure of the gradients.
      layouts: for each parameter how it is cut into blocks.
      accurate: whether `R` was found in float64.
    """

    roots: tuple[Triangle, ...]
    diagonals: tuple[Array, ...]
    damping: Array
    treedef: Any = dataclasses.field(metadata=STATIC)
    layouts: tuple[BlockLayout, ...] = dataclasses.field(metadata=STATIC)
    accurate: bool = dataclasses.field(metadata=STATIC)
    paths = paths_of_layouts


def block_fisher(
    grads: PyTree,
    *,
    block_size: int = 50,
    damping: float | Array | None = None,
    rel_damping: float | Array | None = None,
    pattern: patterns.Pattern = patterns.Unstructured(),
    axes: AxesRule = None,
    accurate: bool = True,
) -> BlockFisher:
    """Estimate the empirical Fisher matrix in blocks along each kernel, and invert it.

    It keeps only blocks of `block_size` neighboring weights of `F = (1/m) sum_i g_i
    g_i^T + damping * I`. Singh & Alistarh (2020, WoodFisher, arXiv:2004.14340) and
    Kurtic et al. (2022, oBERT, arXiv:2203.07259).

    A kernel is read as a matrix `[d_out, d_in]`, row by row (torch's order, that of the
    papers): neighbors are inputs of one output. Blocks do not cross layers stacked
    along batch axes; the last one of a layer may be smaller. Weights whose gradients
    are all zero (masked weights) are decoupled; their entry of `F^-1` is `1 / damping`.

    Differs from the reference implementations: they update `F^-1` by one gradient after
    another, in float32 and for one damping. With damping 1e-7 the diagonal then has
    relative errors of 6e-2 to 300 (a third of it turns negative in M-FAC's code). Here
    `F` is summed up by matrix products and inverted once by Cholesky in float64,
    whatever the type of the gradients (locally: no global setting is needed or
    touched), to 1e-6. m is the number of gradients given.

    Cost: `m * block_size * d` multiply-adds and some `block_size^2 * d` more;
    `block_size + 2` float32 a weight, summed up and inverted in place, and some 40 MB
    (on a mesh: as much again while one parameter is worked on). For BERT-base (85e6
    weights in kernels, block size 50, m = 1024 gradients): 17.7 GB of blocks, 8.7 TFLOP
    in float64, which is 0.9 s at 10 TFLOP/s, and 348 GB of float32 gradients. Sum these
    up chunk by chunk as they are made (see `block_estimator`). On 8 devices each takes
    an eighth, without communication. Blocks of 7e9 weights take 1.5 TB, or 19 devices
    of 80 GB; with block size 8 they take 280 GB, or 4 devices.

    Blocks much larger than m are cheaper without their matrix: see `mfac`.

    Args:
      grads: leaves `[m, *shape]`, as `per_example_grads` makes them; None for
        parameters that take no part.
      block_size: the weights of a block.
      damping: added to the diagonal. oBERT takes 1e-7, WoodFisher 1e-5. A larger one
        tends to magnitude pruning, a smaller one trusts few gradients too much.
      rel_damping: given instead of `damping`, a factor of the mean diagonal of `F` over
        all weights that have gradients.
      pattern: units of it are kept whole within a block, and can then be scored and
        removed together.
      axes: the axes of kernels whose layout is not flax's; see `jaxsparse.Axes`.
      accurate: False sums up and factors in the gradients' own type. It takes half the
        time, and is right only where the largest eigenvalue of `F` is below some 1e4
        times the damping.

    Returns:
      A `BlockFisher`, for `ihvp`, `inverse_diagonal`, `inverse_blocks`, the scores and
      solvers.

    Raises:
      ValueError: no gradients, gradients with NaN or Inf (in eager use), a damping
        that is not positive, a block larger than its kernel, or one that cuts units; a
        factorization that fails.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}    # m = 2, F = I
      >>> fisher = js.curvature.block_fisher(grads, block_size=2, damping=3.0)
      >>> js.curvature.inverse_diagonal(fisher)
      {'w': Array([0.25, 0.25], dtype=float32)}
    """
    form = _form(block_size, pattern, axes, accurate)
    return at_once(form, grads, damping, rel_damping)


def block_estimator(
    *,
    block_size: int = 50,
    pattern: patterns.Pattern = patterns.Unstructured(),
    axes: AxesRule = None,
    where: Where = None,
    accurate: bool = True,
) -> Estimator:
    """Build `block_fisher` from gradients that arrive a few at a time.

    The sums are `F` itself, in 48 bits and `block_size + 1` float32 a weight. Hand over
    some dozens of gradients at once: each update reads and writes all sums. Jit it with
    the sums donated, then it works in place; so does `finalize(sums, donate=True)`,
    jitted or not, and leaves no sums behind.

    Args:
      block_size: the weights of a block.
      pattern: units of it are kept whole within a block.
      axes: the axes of kernels whose layout is not flax's.
      where: which parameters take part; see `jaxsparse.tree.select`.
      accurate: as for `block_fisher`.

    Returns:
      An `Estimator`; its `finalize` gives a `BlockFisher`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> estimator = js.curvature.block_estimator(block_size=2)
      >>> sums = estimator.init({"w": jnp.zeros((1, 2))})
      >>> for g in jnp.array([[1.0, 1.0], [1.0, -1.0]]):
      ...     sums = estimator.update(sums, {"w": g.reshape(1, 1, 2)})
      >>> for damping in (3.0, 15.0):
      ...     fisher = estimator.finalize(sums, damping=damping)
      ...     print(js.curvature.inverse_diagonal(fisher)["w"])
      [[0.25 0.25]]
      [[0.0625 0.0625]]
    """
    return streamed(_form(block_size, pattern, axes, accurate), where)


def _form(
    block_size: int, pattern: patterns.Pattern, axes: AxesRule, accurate: bool
) -> Form:
    _checks.check_pattern(patterns.Pattern, pattern)
    _checks.check_axes(axes)
    check_block_size(block_size)

    def zeros(w: Array, layout: BlockLayout) -> Triangle:
        lie = block_sharding(w, layout)
        return _triangle.zeros(layout.lead, block_size, widest([w]), device=lie)

    return Form(
        layouts=lambda params: block_layouts(params, block_size, axes, pattern=pattern),
        zeros=zeros,
        add=functools.partial(sum_up, accurate=accurate),
        merge=add_sums,
        largest=_largest_diagonal,
        mean=_mean,
        finalize=functools.partial(_finalize, accurate=accurate),
    )


def _root_(sums: Triangle, scale: Array, damping: Array, accurate: bool) -> Triangle:
    stored = sums.square.dtype
    wide = jnp.float64 if accurate else stored
    b = sums.square.shape[-1]

    def root(sums: Triangle, scale: Array, damping: Array) -> Triangle:
        lower = _triangle.join(sums, wide) * scale.astype(wide)
        eye = jnp.broadcast_to(jnp.eye(b, dtype=wide), lower.shape)
        return _triangle.split(inverse_root(lower + damping.astype(wide) * eye), stored)

    with jax.enable_x64(True):
        lead = sums.square.shape[:-2]
        whole = scale, damping
        return over_blocks(root, lead, 8 * b * b, sums, whole=whole, in_place=True)


_root = jax.jit(_root_, static_argnames="accurate")
_root_in_place = jax.jit(_root_, static_argnames="accurate", donate_argnums=0)


def _mean(sums: Sums, stored: Any) -> Array:
    squares = map(_triangle.diagonal, sums.sums)
    return mean_diagonal(squares, stored) * _scale(sums)


def _scale(sums: Sums) -> Array:
    return 1 / sums.count.astype(widest([s.square for s in sums.sums]))


def _finalize(
    sums: Sums, damping: Array, *, donate: bool, accurate: bool
) -> BlockFisher:
    scale, root = _scale(sums), _root_in_place if donate else _root
    tops = tuple(map(_largest_diagonal, sums.sums))  # `root` may take the sums' memory
    roots = tuple(root(s, scale, damping, accurate=accurate) for s in sums.sums)
    diagonals = tuple(map(inverse_diagonals, roots))
    for path, d, top in zip(sums.paths, diagonals, tops, strict=True):
        largest = lambda top=top: top * scale.astype(top.dtype)
        check_factor(path, d, damping, largest, accurate=accurate)
    return BlockFisher(roots, diagonals, damping, sums.treedef, sums.layouts, accurate)


@jax.jit
def _largest_diagonal(sums: Triangle) -> Array:
    """The largest number on the diagonals; NaN or Inf if there is one."""
    return jnp.max(_triangle.diagonal(sums))


@jax.jit
def inverse_diagonals(roots: Triangle) -> Array:
    """The diagonals of `R^T R`: sums of squares, so never negative."""
    r = roots.square
    with jax.enable_x64(True):
        # In float64 squares are exact. In float32 they are, or are not, rounded before
        # they are added, as the shape on a device suits the compiler.
        squares = jnp.square(r.astype(jnp.float64))
        return jnp.sum(squares, axis=-2).astype(r.dtype)
