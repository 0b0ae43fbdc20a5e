"""FTWT: gates of filters that are predicted for each input."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._straight import with_derivative_of
from jaxsparse._typing import Array


def mass_targets(maps: Array, *, mass: float) -> Array:
    """Choose for each input the filters that hold most of a layer's activations (FTWT).

    The mass of a filter is the largest magnitude in its map, divided by the sum over
    the filters. Filters are kept in order of falling mass while the sum of the kept
    masses is at most `mass` (plus 1e-5). The filter that crosses this limit is dropped,
    so a small `mass` may keep none. Filters whose map is 0 are dropped.

    Args:
      maps: `[batch, *spatial, filters]`, the activations of the whole layer.
      mass: between 0 and 1; 1 drops only maps of 0.

    Returns:
      `[batch, filters]` bool, True = kept, with no derivative. Among equal masses the
      lower index is kept first.

    Raises:
      ValueError: maps without a batch, a mass outside (0, 1].
      TypeError: maps that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> maps = jnp.array([[[1.0, -6.0, 3.0], [0.0, 2.0, 1.0]]])   # 1, 6, 3 of 10
      >>> js.adaptive.mass_targets(maps, mass=0.9).tolist()
      [[False, True, True]]
    """
    _check_maps(maps)
    _checks.check_number(above=0, most=1, mass=mass)
    wide = jnp.abs(lax.stop_gradient(as_wide(maps)))
    largest = jnp.max(wide, axis=tuple(range(1, maps.ndim - 1)))
    total = jnp.sum(largest, axis=-1, keepdims=True)
    share = largest / jnp.where(total > 0, total, jnp.ones_like(total))
    order = jnp.argsort(-share, axis=-1, stable=True)
    reached = jnp.cumsum(jnp.take_along_axis(share, order, axis=-1), axis=-1)
    rank = jnp.argsort(order, axis=-1, stable=True)
    held = jnp.take_along_axis(reached, rank, axis=-1)
    return (held <= jnp.asarray(mass, held.dtype) + 1e-5) & (share > 0)


class FilterPredictor(NamedTuple):
    """The predictor of one layer's gates, a 1 x 1 convolution on pooled maps.

    Attributes:
      kernel: `[channels, filters]`.
      bias: `[filters]`.
    """

    kernel: Array
    bias: Array


def init_filter_predictor(
    channels: int, filters: int, *, key: Array
) -> FilterPredictor:
    """Make the predictor of a layer's gates: LeCun's normal kernel, a bias of 0.

    Args:
      channels: of the layer's input.
      filters: of its output.
      key: a typed key.

    Returns:
      A `FilterPredictor` of float32.

    Raises:
      ValueError: numbers below 1.
      TypeError: a `key` that is not a random key.

    Example:
      >>> import jax, jaxsparse as js
      >>> made = js.adaptive.init_filter_predictor(3, 8, key=jax.random.key(0))
      >>> made.kernel.shape, made.bias.shape
      ((3, 8), (8,))
    """
    _checks.check_positive_int(channels, name="channels")
    _checks.check_positive_int(filters, name="filters")
    _checks.check_key(key)
    draw = jax.nn.initializers.lecun_normal()
    kernel = draw(key, (channels, filters), jnp.float32)
    return FilterPredictor(kernel, jnp.zeros(filters, jnp.float32))


def filter_logits(
    predictor: FilterPredictor,
    maps: Array,
    *,
    pool: str = "max",
    decoupled: bool = True,
) -> Array:
    """Predict from a layer's input which of its filters matter, `pool(x) W + b` (FTWT).

    In each layer the predictor learns with the model, from targets that `mass_targets`
    computes from the output of the whole layer::

        logits = js.adaptive.filter_logits(predictor, x)
        whole = jax.nn.relu(conv(params, x))
        targets = js.adaptive.mass_targets(whole, mass=0.9)
        loss += optax.sigmoid_binary_cross_entropy(logits, targets).mean()
        y = whole * js.adaptive.filter_gates(logits)[:, None, None]

    Elkerdawy et al. (2022, Fire Together Wire Together, arXiv:2110.08232).

    Args:
      predictor: as `init_filter_predictor` makes.
      maps: `[batch, *spatial, channels]`, the input of the layer.
      pool: how to pool over all positions, "max" or "mean".
      decoupled: whether to keep the predictor's loss from changing the layers before
        it.

    Returns:
      `[batch, filters]`, float32 at least.

    Raises:
      ValueError: an unknown `pool`, or maps whose channels the predictor does not fit.
      TypeError: a `predictor` of another type, maps that are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> predictor = js.adaptive.FilterPredictor(jnp.eye(2), jnp.array([0.0, -5.0]))
      >>> maps = jnp.array([[[1.0, 2.0], [3.0, 0.0]]])
      >>> js.adaptive.filter_logits(predictor, maps).tolist()
      [[3.0, -3.0]]
    """
    _checks.check_is(
        FilterPredictor, "js.adaptive.init_filter_predictor(...)", predictor=predictor
    )
    _checks.check_arrays(predictor=predictor)
    _check_maps(maps)
    _checks.check_choice(("max", "mean"), pool=pool)
    _checks.check_bool(decoupled=decoupled)
    kernel, bias = map(as_wide, predictor)
    if kernel.ndim != 2 or bias.shape != kernel.shape[1:]:
        raise ValueError(
            "predictor: expected a kernel [channels, filters] and a bias [filters], "
            f"got the shapes {kernel.shape} and {bias.shape}."
        )
    if maps.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"maps: expected [batch, *spatial, {kernel.shape[0]}], got the shape "
            f"{jnp.shape(maps)}."
        )
    x = as_wide(lax.stop_gradient(maps) if decoupled else maps)
    reduce: Any = {"max": jnp.max, "mean": jnp.mean}[pool]
    pooled = reduce(x, axis=tuple(range(1, x.ndim - 1)))
    return jnp.matmul(pooled, kernel.astype(pooled.dtype)) + bias[None]


def filter_gates(logits: Array) -> Array:
    """Return gates of 0 and 1, open where `sigmoid(logits) > 1/2`, with its derivative.

    They multiply the maps of a layer. In a batch, and under `jit`, that saves no
    operation: each input has filters of its own, and all of them are computed. An
    implementation that runs each input on its own filters alone needs only a fraction
    of the layer's operations: the mean of the gates or, if the layer's input is gated
    too, the mean over inputs of the product of both fractions.

    Args:
      logits: `[batch, filters]`, from `filter_logits`.

    Returns:
      The gates, of the same shape and type.

    Raises:
      TypeError: logits that are not floating point.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> js.adaptive.filter_gates(jnp.array([[2.0, 0.0, -1.0]])).tolist()
      [[1.0, 0.0, 0.0]]
      >>> jax.grad(lambda x: js.adaptive.filter_gates(x).sum())(jnp.zeros((1, 2)))
      Array([[0.25, 0.25]], dtype=float32)
    """
    _checks.check_floats(logits=logits)
    return with_derivative_of(jax.nn.sigmoid(logits), logits > 0)


def _check_maps(maps: Array) -> None:
    _checks.check_floats(maps=maps)
    if jnp.ndim(maps) < 2 or not jnp.size(maps):
        raise ValueError(
            "maps: expected [batch, *spatial, channels], channels last, got the shape "
            f"{jnp.shape(maps)}."
        )
