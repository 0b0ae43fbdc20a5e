"""Streaming statistics of the rows that meet a kernel, as sums that merge."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsparse import _checks
from jaxsparse._host import on_host
from jaxsparse._sharded import with_auto_axes
from jaxsparse._typing import Array
from jaxsparse.calibration.statistics import InputStats, Statistics, check_statistics
from jaxsparse.linalg.factor import HIGHEST


class RunningStats(NamedTuple):
    """Sums over the rows seen so far, taken about their own mean.

    Attributes:
      count: `[*batch]`, the sum of the rows' weights.
      mean: `[*batch, d_in]`, the weighted mean of the rows.
      squares: `[*batch, d_in]`, the weighted sum of `(x - mean)^2`.
      products: `[*batch, d_in, d_in]`, the weighted sum of `(x - mean)(x - mean)^T`, or
        None.
    """

    count: Array
    mean: Array
    squares: Array
    products: Array | None


def init(
    batch: tuple[int, ...], d_in: int, *, gram: bool, dtype: Any = jnp.float32
) -> RunningStats:
    """Start statistics of no rows.

    Args:
      batch: the sizes of the batch axes, as `MatrixView.batch`: `()` for a plain
        kernel, `(experts,)` for stacked ones.
      d_in: the length of a row.
      gram: whether to keep the second moments of all pairs of inputs, `d_in^2` numbers.
      dtype: the type of the sums: float32, or float64 for float64 rows.

    Returns:
      A `RunningStats`; merging it with another gives the other.

    Raises:
      ValueError: a size that is not positive.
      TypeError: a dtype of less than float32.

    Example:
      >>> import jaxsparse as js
      >>> js.calibration.init((), 3, gram=True).products.shape
      (3, 3)
    """
    _checks.check_bool(gram=gram)
    _checks.check_positive_int(d_in, name="d_in")
    if not isinstance(batch, tuple | list):
        raise TypeError(f"batch must be a tuple of sizes, got {batch!r}.")
    for size in batch:
        _checks.check_positive_int(size, name="batch")
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"Statistics are kept in float32 or float64, not in {dtype}.")
    shape = (*batch, d_in)
    return RunningStats(
        count=jnp.zeros(batch, dtype),
        mean=jnp.zeros(shape, dtype),
        squares=jnp.zeros(shape, dtype),
        products=jnp.zeros((*shape, d_in), dtype) if gram else None,
    )


def update(state: RunningStats, x: Array, weight: Array | None = None) -> RunningStats:
    """Add rows to statistics.

    Rows are counted by weight: the share of a timestep of a diffusion model, 0 for
    padding and for the tokens that a router does not send to an expert. Rows of weight
    0 have no effect, even if they hold NaN. NaN in other rows is not checked, which
    would wait for the device; it stays in the statistics.

    Args:
      state: the statistics so far.
      x: the rows, `[*batch, n, d_in]`, of any floating type.
      weight: a number of at least 0 for each row, an array that broadcasts to `[*batch,
        n]`; 1 by default.

    Returns:
      The statistics with these rows.

    Raises:
      ValueError: rows or weights of another shape; a negative weight (in eager use).
      TypeError: rows that are not floating point, or wider than the statistics.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.calibration.init((), 2, gram=False)
      >>> state = js.calibration.update(state, jnp.array([[1.0, 2.0], [3.0, 2.0]]))
      >>> state.count, state.mean
      (Array(2., dtype=float32), Array([2., 2.], dtype=float32))
    """
    _checks.check_is(RunningStats, "js.calibration.init(...)", state=state)
    _check_rows(state, x)
    if weight is not None:
        _check_weight(weight, x.shape[:-1])
    return _update(state, x, weight)


@jax.jit
def _update(state: RunningStats, x: Array, weight: Any) -> RunningStats:
    def add(state: RunningStats, x: Array, weight: Any) -> RunningStats:
        rows = x.astype(state.mean.dtype)
        return _merged(state, _of_rows(rows, weight, state.products is not None))

    *batch, _, inputs = _spec(x)
    return _with_spec(add, (*batch, inputs), state, x, weight)


def _of_rows(x: Array, weight: Any, gram: bool) -> RunningStats:
    """The statistics of some rows, by a mean that is taken twice.

    How a backend adds up is its own choice, and a float32 sum of many numbers far from
    zero may be off by a part of their spread. The first mean is near enough for the
    differences from it to be small, and their mean is what it was off by.
    """
    *batch, n, _ = x.shape
    if weight is None:
        count = jnp.full(batch, n, x.dtype)
        w = None
    else:
        w = jnp.broadcast_to(jnp.asarray(weight).astype(x.dtype), (*batch, n))
        count = jnp.sum(w, axis=-1)
        w = w[..., None]
        x = jnp.where(w > 0, x, jnp.zeros((), x.dtype))
    by_weight = (lambda y: y) if w is None else (lambda y: w * y)
    mean = lambda y: jnp.sum(by_weight(y), axis=-2) / _at_least_one(count)[..., None]
    about = mean(x)
    x = x - about[..., None, :]
    off = mean(x)
    x = x - off[..., None, :]
    products = None
    if gram:
        # The same factor on both sides, so that the matrix is symmetric bit for bit.
        y = x if w is None else jnp.sqrt(w) * x
        products = jnp.einsum("...ni,...nj->...ij", y, y, precision=HIGHEST)
    squares = jnp.sum(by_weight(jnp.square(x)), axis=-2)
    return RunningStats(count, about + off, squares, products)


def merge(a: RunningStats, b: RunningStats) -> RunningStats:
    """Merge the statistics of two sets of rows.

    It is associative and commutative up to rounding, so that chunks, devices and
    processes may be merged in any order. With `d = mean_b - mean_a`, sums about the
    means add up as `S_a + S_b + d d^T n_a n_b / (n_a + n_b)`: Chan, Golub & LeVeque
    (1979). Nothing is subtracted, so no digits cancel where the mean is large against
    the spread.

    Args:
      a: statistics.
      b: statistics of other rows of the same shape.

    Returns:
      A `RunningStats`.

    Raises:
      ValueError: different shapes, or one has products and the other has not.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> none = js.calibration.init((), 1, gram=False)
      >>> a = js.calibration.update(none, jnp.array([[1.0]]))
      >>> b = js.calibration.update(none, jnp.array([[4.0], [4.0]]))
      >>> js.calibration.merge(a, b).mean
      Array([3.], dtype=float32)
    """
    _checks.check_is(RunningStats, "js.calibration.init(...)", a=a, b=b)
    if (a.products is None) != (b.products is None):
        raise ValueError(
            "One of the statistics has a Gram matrix, the other has none: call "
            "`init` with the same `gram` for both."
        )
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"Statistics of rows of shapes {a.mean.shape} and {b.mean.shape} cannot be "
            "merged. Were they taken before different kernels?"
        )
    return _merge(a, b)


@jax.jit
def _merge(a: RunningStats, b: RunningStats) -> RunningStats:
    spec = tuple(p or q for p, q in zip(_spec(a.mean), _spec(b.mean), strict=True))
    return _with_spec(_merged, spec, a, b)


def _merged(a: RunningStats, b: RunningStats) -> RunningStats:
    count = a.count + b.count
    share = b.count / _at_least_one(count)
    between = (a.count * share)[..., None]
    d = b.mean - a.mean
    mean = a.mean + d * share[..., None]
    squares = a.squares + b.squares + between * jnp.square(d)
    products = None
    if a.products is not None and b.products is not None:
        outer = d[..., :, None] * d[..., None, :]
        products = a.products + b.products + between[..., None] * outer
    return RunningStats(count, mean, squares, products)


def finalize(state: RunningStats) -> InputStats:
    """Turn sums into means.

    Where no row was seen (an expert that no token was sent to) all statistics are 0,
    never NaN; `unseen` counts such places.

    Args:
      state: the running statistics.

    Returns:
      An `InputStats`. Its second moments are about zero: `E[x x^T]`, which is the
      covariance plus the product of the means.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.calibration.init((), 2, gram=True)
      >>> state = js.calibration.update(state, jnp.array([[1.0, 2.0], [3.0, 2.0]]))
      >>> stats = js.calibration.finalize(state)
      >>> stats.square, stats.variance
      (Array([5., 4.], dtype=float32), Array([1., 0.], dtype=float32))
      >>> stats.gram.tolist()
      [[5.0, 4.0], [4.0, 4.0]]
    """
    _checks.check_is(RunningStats, "js.calibration.init(...)", state=state)
    return _finalize(state)


@jax.jit
def _finalize(state: RunningStats) -> InputStats:
    return _with_spec(_means, _spec(state.mean), state)


def _means(state: RunningStats) -> InputStats:
    per = _at_least_one(state.count)[..., None]
    mean, variance, gram = state.mean, state.squares / per, None
    if state.products is not None:
        gram = state.products / per[..., None]
        gram = gram + mean[..., :, None] * mean[..., None, :]
    return InputStats(state.count, mean, variance + jnp.square(mean), variance, gram)


def unseen(stats: Statistics) -> dict[str, int]:
    """List the kernels of which some part never saw a row.

    Args:
      stats: the statistics of a model's inputs.

    Returns:
      By path how many entries of the batch axes (experts, layers) have a count of 0;
      no entry for a kernel that saw rows everywhere. (It reads values, so it cannot
      run under jit.)

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.calibration.init((2,), 3, gram=False)
      >>> routed = jnp.array([[1.0], [0.0]])
      >>> state = js.calibration.update(state, jnp.ones((2, 1, 3)), routed)
      >>> axes = js.Axes(input=(1,), output=(2,), batch=(0,))
      >>> view = js.tree.matrix_view((2, 3, 4), axes)
      >>> inputs = {"x": js.calibration.finalize(state)}
      >>> stats = js.calibration.Statistics(inputs, (("experts/kernel", "x", view),))
      >>> js.calibration.unseen(stats)
      {'experts/kernel': 1}
    """
    check_statistics(stats)
    empty = {
        path: int(np.sum(on_host(stats.of(path).count) == 0)) for path in stats.paths
    }
    return {path: n for path, n in empty.items() if n}


def _at_least_one(count: Array) -> Array:
    # Where the count is 0 so are the sums, and 0 / 1 is what is wanted.
    return jnp.where(count > 0, count, 1)


def _spec(x: Array) -> tuple[Any, ...]:
    spec = jax.typeof(x).sharding.spec
    return (*spec, *[None] * (x.ndim - len(spec)))


def _with_spec(f: Callable[..., Any], spec: tuple[Any, ...], *args: Any) -> Any:
    """`f(*args)` with results sharded as `spec`, which is for `[*batch, d_in]`.

    On explicit axes JAX refuses a product of a sharded vector with itself.
    """
    lie = lambda result: P(*(*spec, None)[: result.ndim])
    return with_auto_axes(f, lambda results: jax.tree.map(lie, results), *args)


def _check_rows(state: RunningStats, x: Array) -> None:
    _checks.check_arrays(x=x)
    *batch, d_in = state.mean.shape
    shape = jnp.shape(x)
    if len(shape) != len(batch) + 2 or shape[:-2] != (*batch,) or shape[-1] != d_in:
        expected = ", ".join([*map(str, batch), "n", str(d_in)])
        raise ValueError(
            f"x: rows of shape {shape} do not fit statistics of [{expected}]. Reshape "
            f"them: x.reshape({', '.join([*map(str, batch), '-1', str(d_in)])})."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: rows must be real floating-point numbers, got {x.dtype}.")
    if x.dtype.itemsize > state.mean.dtype.itemsize:
        raise TypeError(
            f"Rows of {x.dtype} would be rounded to {state.mean.dtype}. Cast them, or "
            f"start with init(..., dtype={x.dtype})."
        )


def _check_weight(weight: Any, rows: tuple[int, ...]) -> None:
    shape = jnp.shape(weight)
    try:
        fits = np.broadcast_shapes(shape, rows) == rows
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"Weights of shape {shape} do not broadcast to one for each row, {rows}."
        )
    if _checks.is_concrete(weight) and np.size(weight) and not np.min(weight) >= 0:
        raise ValueError(
            f"Weights must be numbers of at least 0; the least is {np.min(weight)}."
        )
