"""Scores from the inputs of kernels: what a layer's output says of each weight."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import widen
from jaxsparse._sharded import sharded_as
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.calibration import InputStats, Statistics
from jaxsparse.calibration.statistics import check_statistics
from jaxsparse.scores._range import fourth_root, lifted, product
from jaxsparse.tree import MatrixView, leaves_with_paths, map_with_path, select


def wanda(params: PyTree, stats: Statistics, *, where: Where = None) -> PyTree:
    """Score by Wanda's `|W_ij| * sqrt(E[x_j^2])`.

    The score is the root mean square change of output i over the calibration rows when
    weight ij is removed. Sun et al. (2023, arXiv:2306.11695).

    The weights of one output unit compete in the paper: use it as
    `js.patterns.masks(scores, s, pattern=js.Unstructured(scope="output"),
    axes=stats.axes)`, or with `js.NM`, whose groups lie within one as well.

    Differs from the reference implementation, which takes the norm over a sequence
    instead of a row: all weights share a factor `sqrt(sequence length)`. Weights of
    inputs that were always 0 come last, in the order of their magnitudes (there their
    score is 0, and the index decides). An expert that saw no row
    (`js.calibration.unseen`) is scored by magnitude, in the unit of the others.

    Args:
      params: a tree of arrays.
      stats: the statistics of the inputs of the selected parameters.
      where: which parameters must have statistics; see `jaxsparse.tree.select`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep; zeros
      where there are no statistics.

    Raises:
      ValueError: a selected parameter has no statistics, or statistics of another
        shape; or the model scales or changes it before it is contracted.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.calibration.init((), 2, gram=False)
      >>> state = js.calibration.update(state, jnp.array([[3.0, 1.0]]))
      >>> view = js.tree.matrix_view((2, 1), js.Axes(input=(0,), output=(1,)))
      >>> stats = js.calibration.Statistics(
      ...     {"x": js.calibration.finalize(state)}, (("kernel", "x", view),))
      >>> js.scores.wanda({"kernel": jnp.array([[1.0], [-2.0]])}, stats)
      {'kernel': Array([[3.], [2.]], dtype=float32)}
    """
    _check(params, stats)

    def score(path: str, w: Array) -> Array:
        return product(w, _sizes_of_inputs(w, stats, path))

    return _each(score, params, stats.paths, where, stats)


def gblm(
    params: PyTree,
    stats: Statistics,
    gradients: PyTree,
    *,
    alpha: float = 100.0,
    where: Where = None,
) -> PyTree:
    """Score by GBLM's `|W| * (sqrt(E[x^2]) + alpha * G)`: Wanda and gradients.

    Das et al. (2023, arXiv:2311.04902). The two terms have different units, and `alpha`
    weighs them: the first has the unit of an output of the layer, the second that of
    the loss. The weights of one output unit compete, as for `wanda`.

    Differs from the reference implementation, whose norm of the activations covers a
    sequence of T tokens and grows with `sqrt(T)`: its scores have the order of `alpha /
    sqrt(T)` here. Both take the gradients of the dense model. Dead inputs and experts
    without rows are scored as in `wanda`.

    Args:
      params: a tree of arrays.
      stats: the statistics of the inputs of the selected parameters.
      gradients: `G`, from `js.calibration.gradient_norms`; None for the others.
      alpha: the factor of the gradients.
      where: which parameters must have both; see `jaxsparse.tree.select`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep; zeros
      where statistics or gradients are missing.

    Raises:
      ValueError: a selected parameter has no statistics or gradients, or they have
        another shape; an `alpha` that is negative; or the model scales or changes it
        before it is contracted.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.calibration.init((), 2, gram=False)
      >>> state = js.calibration.update(state, jnp.array([[3.0, 1.0]]))
      >>> view = js.tree.matrix_view((2, 1), js.Axes(input=(0,), output=(1,)))
      >>> stats = js.calibration.Statistics(
      ...     {"x": js.calibration.finalize(state)}, (("kernel", "x", view),))
      >>> params = {"kernel": jnp.array([[1.0], [-2.0]])}
      >>> sizes = {"kernel": jnp.array([[0.01], [0.02]])}
      >>> js.scores.gblm(params, stats, sizes)
      {'kernel': Array([[4.], [6.]], dtype=float32)}
    """
    _check(params, stats)
    _checks.check_number(least=0, alpha=alpha)
    _checks.check_arrays(gradients=gradients)
    sizes = dict(leaves_with_paths(gradients))

    def score(path: str, w: Array) -> Array:
        norm = _sizes_of_inputs(w, stats, path)
        size = _checked(path, w, sizes[path]).astype(w.dtype)
        size = _usual_where_unseen(size, stats, path)
        scores = jnp.abs(w) * norm + alpha * jnp.abs(w) * size
        return lifted(scores, fourth_root(w) * fourth_root(norm + alpha * size))

    both = [path for path in stats.paths if path in sizes]
    return _each(score, params, both, where, stats, sizes)


def gradient_norm(params: PyTree, gradients: PyTree, *, where: Where = None) -> PyTree:
    """Score by `|W| * G`, the gradients' half of GBLM.

    The gradients belong to single examples, so the score is not 0 at a minimum as
    `taylor` is. Das et al. (2023, arXiv:2311.04902). Weights whose gradients are all 0
    come last, in the order of their magnitudes.

    Args:
      params: a tree of arrays.
      gradients: `G`, from `js.calibration.gradient_norms`; None for the others.
      where: which parameters have to have gradients; see `jaxsparse.tree.select`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep; zeros
      where there are no gradients.

    Raises:
      ValueError: a selected parameter has no gradients, or of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> grads = {"kernel": jnp.array([[[1.0], [0.0]], [[-3.0], [1.0]]])}
      >>> sizes = js.calibration.gradient_norms(grads, order=1)
      >>> js.scores.gradient_norm({"kernel": jnp.array([[1.0], [-2.0]])}, sizes)
      {'kernel': Array([[4.], [2.]], dtype=float32)}
    """
    _checks.check_arrays(params=params, gradients=gradients)
    sizes = dict(leaves_with_paths(gradients))

    def score(path: str, w: Array) -> Array:
        size = _checked(path, w, sizes[path]).astype(w.dtype)
        return product(w, _least(size, tuple(range(w.ndim))))

    return _each(score, params, list(sizes), where, None, sizes)


def flap(
    params: PyTree,
    stats: Statistics,
    *,
    standardise: bool = False,
    where: Where = None,
) -> PyTree:
    """Score input channels by FLAP's fluctuation, `Var[x_j] * sum_i W_ij^2`.

    The score is the expected squared error of the output when channel j is replaced by
    its mean, ignoring correlations; a bias can supply the mean (`bias_compensation`).
    An et al. (2023, arXiv:2312.11983) call it WIFV. All weights of a channel get the
    score of the channel, so `js.Channel(axis=...)` selects channels along an input
    axis, and whole heads along the heads' axis of a `(heads, head_dim, out)` kernel.

    Differs from the reference implementation, whose recursion for the variance changes
    the mean that it should compare with and leaves out the first sequence, and which
    squares the scores of attention but not the others. Channels that never changed come
    last, in the order of their weights. The channels of an expert that saw no row are
    scored by their weights, in the unit of the others.

    Args:
      params: a tree of arrays.
      stats: the statistics of the inputs of the selected parameters.
      standardise: subtract the mean over the channels of a kernel and divide by their
        standard deviation, as in the paper where channels of all kernels compete in
        one global scope.
      where: which parameters must have statistics; see `jaxsparse.tree.select`.

    Returns:
      A tree of arrays of the same shapes, in float32 at least, larger = keep; zeros
      where there are no statistics.

    Raises:
      ValueError: a selected parameter has no statistics, or statistics of another
        shape; or the model scales or changes it before it is contracted.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.calibration.init((), 2, gram=False)
      >>> x = jnp.array([[3.0, 1.0], [1.0, 1.0]])
      >>> state = js.calibration.update(state, x)
      >>> view = js.tree.matrix_view((2, 2), js.Axes(input=(0,), output=(1,)))
      >>> stats = js.calibration.Statistics(
      ...     {"x": js.calibration.finalize(state)}, (("kernel", "x", view),))
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [9.0, 9.0]])}
      >>> js.scores.flap(params, stats)["kernel"].round(3)
      Array([[5., 5.], [0., 0.]], dtype=float32)
    """
    _check(params, stats)
    _checks.check_bool(standardise=standardise)

    def score(path: str, w: Array) -> Array:
        view, known = stats.view(path), stats.of(path)
        # Powers of two change no bit, and the squares of tiny weights are not 0.
        power = _power_of_two(w.reshape(view.split), view.axes.output)
        squares = jnp.square(w.reshape(view.split) / power)
        squares = jnp.sum(squares, axis=view.axes.output, keepdims=True)
        variance = _moments(known.variance, known.count).astype(w.dtype)
        channels = squares * _along_inputs(variance, view)
        root = fourth_root(channels) * jnp.square(fourth_root(power))
        channels = lifted(channels * power * power, root)
        if standardise:
            still = _along_inputs(known.variance == 0, view)
            over = view.axes.input
            channels = channels / _power_of_two(channels, over)
            channels = channels - jnp.mean(channels, axis=over, keepdims=True)
            spread = jnp.std(channels, axis=over, keepdims=True)
            channels = channels / jnp.where(spread > 0, spread, 1)
            # Next to nothing is lost next to a mean.
            near = squares * jnp.square(
                power / jnp.max(power, axis=over, keepdims=True)
            )
            most = jnp.max(near, axis=over, keepdims=True)
            share = near / jnp.where(most > 0, most, 1)
            channels = channels - jnp.where(still, 1e-3 * (1 - share), 0)
        channels = jnp.broadcast_to(channels, view.split).reshape(w.shape)
        return sharded_as(channels, w)

    return _each(score, params, stats.paths, where, stats)


def _check(params: PyTree, stats: Statistics) -> None:
    _checks.check_arrays(params=params)
    check_statistics(stats)


def _each(
    score: Callable[[str, Array], Array],
    params: PyTree,
    known: list[str] | tuple[str, ...],
    where: Where,
    stats: Statistics | None,
    sizes: dict[str, Array] | None = None,
) -> PyTree:
    """`score` where there is what it needs, else zeros, in float32 at least."""

    def one(path: str, w: Array, taken: bool) -> Array:
        if path not in known:
            if taken:
                raise ValueError(_missing(path, stats, sizes))
            return jnp.zeros_like(widen(w))
        if stats is not None:
            _check_fits(path, w, stats.of(path), stats.view(path))
            if taken:
                stats.check_plain(path)
        _checks.check_floating(path, w)
        return score(path, widen(w))

    return map_with_path(one, params, select(params, where))


def _missing(path: str, stats: Statistics | None, sizes: dict | None) -> str:
    if stats is not None and path not in stats.paths:
        why = stats.left_dense.get(path)
        return (
            f"{path}: selected by `where`, but there are no statistics of its inputs, "
            f"only of {list(stats.paths)[:4]}. Leave it out with `where`: a score "
            "without them would be in another unit."
        ) + (f" There are none because of this: {why}" if why else "")
    return (
        f"{path}: selected by `where`, but there are no gradients of it, only of "
        f"{list(sizes or {})[:4]}. Take the gradients with the same `where`."
    )


def _check_fits(path: str, w: Array, known: InputStats, view: MatrixView) -> None:
    if view.shape != jnp.shape(w):
        raise ValueError(
            f"{path}: statistics for a parameter of shape {view.shape}, which has "
            f"{jnp.shape(w)}. Were they taken of another model?"
        )
    expected = (*view.batch, view.d_in)
    if known.square.shape != expected:
        raise ValueError(
            f"{path}: statistics of shape {known.square.shape} for a kernel that is "
            f"read with inputs {expected}."
        )


def _checked(path: str, w: Array, size: Array) -> Array:
    if jnp.shape(size) != jnp.shape(w):
        raise ValueError(
            f"{path}: gradient norms of shape {jnp.shape(size)} for a parameter of "
            f"shape {jnp.shape(w)}. Pass `js.calibration.gradient_norms(grads)`, which "
            "sums over the examples."
        )
    return size


def _sizes_of_inputs(w: Array, stats: Statistics, path: str) -> Array:
    """`sqrt(E[x_j^2])` of the input of every weight."""
    view, known = stats.view(path), stats.of(path)
    norms = _moments(jnp.sqrt(known.square), known.count)
    values = _along_inputs(norms.astype(w.dtype), view)
    return jnp.broadcast_to(values, view.split).reshape(w.shape)


def _power_of_two(x: Array, axes: tuple[int, ...]) -> Array:
    """One near the largest magnitude along axes; 1 for 0, infinities and NaN."""
    most = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(most), most, jnp.ones_like(most)))
    limit = jnp.finfo(x.dtype).maxexp - 3  # beyond it the reciprocal would be 0
    return jnp.ldexp(jnp.ones_like(most), jnp.clip(exponent, -limit, limit))


def _along_inputs(values: Array, view: MatrixView) -> Array:
    """`[*batch, d_in]` in the axes of `view.split`, of size 1 along the outputs."""
    held = (*view.axes.batch, *view.axes.input)
    values = values.reshape([view.split[a] for a in held])
    values = values.transpose(sorted(range(len(held)), key=held.__getitem__))
    return jnp.expand_dims(values, view.axes.output)


def _moments(moments: Array, count: Array) -> Array:
    """Moments `[*batch, d_in]` of which none is 0: so that weights decide there.

    For a dead input next to nothing, for a matrix that saw no row the mean of those
    that did.
    """
    seen = jnp.broadcast_to((count > 0)[..., None], moments.shape)
    total = jnp.sum(jnp.where(seen, moments, 0))
    number = jnp.sum(seen, dtype=moments.dtype)
    usual = jnp.where(total > 0, total / jnp.maximum(number, 1), 1)
    return jnp.where(seen, _least(moments, (-1,), usual), usual)


def _least(values: Array, axes: tuple[int, ...], usual: Array | float = 1.0) -> Array:
    """Next to nothing in place of 0."""
    most = jnp.max(values, axis=axes, keepdims=True)
    least = 1e-20 * jnp.where(most > 0, most, usual)
    return jnp.where(values > 0, values, least)


def _usual_where_unseen(sizes: Array, stats: Statistics, path: str) -> Array:
    """Gradients' sizes, their mean where they are 0 because no row was seen."""
    view, known = stats.view(path), stats.of(path)
    unseen = jnp.broadcast_to((known.count == 0)[..., None], known.square.shape)
    unseen = jnp.broadcast_to(_along_inputs(unseen, view), view.split)
    unseen = unseen.reshape(sizes.shape)
    number = jnp.maximum(jnp.sum(~unseen, dtype=sizes.dtype), 1)
    usual = jnp.sum(jnp.where(unseen, 0, sizes)) / number
    return jnp.where(unseen, usual, sizes)
