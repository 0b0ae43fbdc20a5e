"""RigL, SET, SNFS and static masks: what grows, and by which score."""

from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp

from jaxsparse import _checks, patterns, scores
from jaxsparse._typing import Array, Cadence, PyTree, Schedule, Sparsity, Where
from jaxsparse.schedules import at
from jaxsparse.transforms._drop_and_grow import drop_and_grow
from jaxsparse.transforms._prune_schedule import PruneSchedule, prune_schedule
from jaxsparse.transforms._state import DropAndGrowState, find_states
from jaxsparse.tree import AxesRule, unwrap_variables


class Selection(TypedDict, total=False):
    """Arguments that all of these hand on: see `drop_and_grow`."""

    pattern: patterns.Pattern
    where: Where
    axes: AxesRule
    min_keep: int
    axis_name: patterns.AxisName | None
    total_steps: int | None


class Moving(Selection, total=False):
    """Those of masks that move."""

    drop_fraction: float | Schedule
    track: bool


def static(
    sparsity: Sparsity, *, key: Array, **selection: Unpack[Selection]
) -> PruneSchedule:
    """Train under random masks that never change, the control of every comparison.

    With `sparsity=js.allocations.erk(params, 0.9)` it is the static baseline of RigL's
    paper; Liu et al. (2022, arXiv:2202.02643) find it strong in wide networks.

    Args:
      sparsity: as for `jaxsparse.prune_schedule`.
      key: a typed key, `jax.random.key(seed)`.
      **selection: `pattern`, `where`, `axes`, `min_keep`, `axis_name` and
        `total_steps`, as for `jaxsparse.prune_schedule`.

    Returns:
      A gradient transformation with the methods `wrap` and `adopt`, like
      `prune_schedule`. `init` makes the masks.

    Raises:
      ValueError: as for `prune_schedule`.
      TypeError: a `key` that is not a random key.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = {"w": jnp.ones((4, 8))}
      >>> static = js.transforms.static(0.75, key=jax.random.key(0))
      >>> params, state = js.init_sparse(static.wrap(optax.adam(1e-3)), params)
      >>> int(jnp.sum(params["w"] != 0))
      8
    """
    _checks.check_key(key)
    score = lambda params: scores.random(params, key=key)
    return prune_schedule(sparsity, every=at(0), score=score, **selection)


def set_(
    sparsity: Sparsity,
    *,
    every: int | Cadence,
    key: Array,
    **options: Unpack[Moving],
) -> PruneSchedule:
    """Drop the smallest weights, and grow others at random.

    Sparse evolutionary training, Mocanu et al. (2018, arXiv:1707.04780).

    Differs from the original, which drops the smallest positive and the largest
    negative weights apart: here the smallest magnitudes, as in RigL's and ITOP's code.
    Both of these draw new random numbers in each change, as is done here, from the key
    and the step; ITOP's growth meets the count in expectation, here it is exact.

    Args:
      sparsity: as for `drop_and_grow`.
      every: when masks change.
      key: a typed key, from which the first masks and all growth are drawn.
      **options: `drop_fraction` (0.3), `track`, `pattern`, `where`, `axes`, `min_keep`,
        `axis_name` and `total_steps`, as for `drop_and_grow`.

    Returns:
      A gradient transformation, as of `drop_and_grow`.

    Raises:
      ValueError: as for `drop_and_grow`.
      TypeError: a `key` that is not a random key.

    Example:
      >>> import jax, optax, jaxsparse as js
      >>> tx = js.transforms.set_(
      ...     0.9, every=100, key=jax.random.key(0)).wrap(optax.adam(1e-3))
    """
    _checks.check_key(key)
    first, growth = jax.random.split(key)

    def grow(params: PyTree, *, step: Array) -> PyTree:
        return scores.random(params, key=jax.random.fold_in(growth, step))

    return drop_and_grow(sparsity, every=every, grow=grow, key=first, **options)


def rigl(
    sparsity: Sparsity,
    *,
    every: int | Cadence,
    key: Array,
    **options: Unpack[Moving],
) -> PruneSchedule:
    """Drop the smallest weights, and grow those with the largest gradients.

    In a change, of the `k` weights that a layer keeps the `floor(f * k)` smallest are
    dropped, and as many grow where the dense gradient `|g|` of this step is largest.
    Evci et al. (2020, RigL, arXiv:1911.11134). As in the paper::

        rigl = js.transforms.rigl(
            js.allocations.erk(params, 0.9),
            every=js.schedules.every(100, end=int(0.75 * steps)),
            drop_fraction=optax.cosine_decay_schedule(0.3, int(0.75 * steps)),
            key=jax.random.key(0))
        tx = rigl.wrap(optax.sgd(rate, momentum=0.9), skip_updates=True)
        params, opt_state = js.init_sparse(tx, params)

    Weights that grow begin at 0 with their moments reset. The gradients are those of
    the step, all-reduced where the batch is sharded; nothing is gathered.

    Differs from the reference implementation, which skips the optimizer's update in the
    steps that change masks (`skip_updates=True` does; without it kept weights learn in
    every step), and adds noise of 1e-5 to the magnitudes in one of its versions; from
    JaxPruner, which keeps `round(k (1 - f))` and sorts all weights; and from ITOP's
    code, which drops `ceil(f k)`.

    Args:
      sparsity: as for `drop_and_grow`; `js.allocations.erk(params, 0.9)` in the paper.
      every: when masks change.
      key: a typed key, from which the first masks are drawn.
      **options: `drop_fraction` (0.3), `track`, `pattern`, `where`, `axes`, `min_keep`,
        `axis_name` and `total_steps`, as for `drop_and_grow`.

    Returns:
      A gradient transformation, as of `drop_and_grow`. Its state is a bool for each
      weight and a few numbers.

    Raises:
      ValueError: as for `drop_and_grow`; in `keep_sparse`, which sees no
        gradients.
      TypeError: a `key` that is not a random key.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> rigl = js.transforms.rigl(
      ...     0.5, every=1, drop_fraction=0.5, key=jax.random.key(0))
      >>> tx = rigl.wrap(optax.sgd(0.1), skip_updates=True)
      >>> params, state = js.init_sparse(tx, {"w": jnp.ones((1, 4))})
      >>> grads = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> updates, state = tx.update(grads, state, params)
      >>> bool(js.masks_of(state)["w"][0, 3])       # the largest gradient
      True
    """
    by_gradient = lambda params, grads: scores.magnitude(grads)
    return drop_and_grow(sparsity, every=every, grow=by_gradient, key=key, **options)


def snfs(
    sparsity: Sparsity,
    *,
    every: int | Cadence,
    key: Array,
    decay: float = 0.9,
    **options: Unpack[Moving],
) -> PruneSchedule:
    """Drop the smallest weights, and grow those with the largest mean gradients.

    The mean is `a <- decay * a + (1 - decay) * g`, of the dense gradient, in every
    step. Dettmers & Zettlemoyer (2019, sparse networks from scratch,
    arXiv:1907.04840).

    Differs from the original, which also moves sparsity from layer to layer by their
    mean momentum: here, as in RigL's code, each layer keeps its own.

    Args:
      sparsity: as for `drop_and_grow`.
      every: when masks change.
      key: a typed key, from which the first masks are drawn.
      decay: of the mean, in [0, 1).
      **options: `drop_fraction` (0.3), `track`, `pattern`, `where`, `axes`, `min_keep`,
        `axis_name` and `total_steps`, as for `drop_and_grow`.

    Returns:
      A gradient transformation, as of `drop_and_grow`. Its state has one more copy of
      the parameters, in float32.

    Raises:
      ValueError: a decay outside [0, 1), or as for `drop_and_grow`.
      TypeError: a `key` that is not a random key.

    Example:
      >>> import jax, optax, jaxsparse as js
      >>> tx = js.transforms.snfs(
      ...     0.9, every=100, key=jax.random.key(0)).wrap(optax.adam(1e-3))
    """
    mean = scores.moving_average(lambda params, grads: grads, decay=decay)
    size = lambda params, grads, state: scores.magnitude(mean.score(None, None, state))
    grow = mean._replace(score=size, needs_grads=False)
    return drop_and_grow(sparsity, every=every, grow=grow, key=key, **options)


def explored(opt_state: PyTree) -> PyTree:
    """Return which fraction of each parameter's weights was ever active.

    ITOP's measure of in-time over-parameterization, by which dynamic sparse training is
    as good as it explores: Liu et al. (2021, arXiv:2102.02887).

    Args:
      opt_state: the state of an optimizer with `drop_and_grow(..., track=True)`, or a
        function made of it, anywhere inside.

    Returns:
      A tree of float32 scalars like the parameters; 1 for those that take no part.

    Raises:
      ValueError: no such state, or one that is not tracked.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> method = js.transforms.set_(
      ...     0.75, every=1, key=jax.random.key(0), track=True)
      >>> tx = method.wrap(optax.adam(1e-3))
      >>> js.transforms.explored(tx.init({"w": jnp.ones((4, 8))}))
      {'w': Array(0.25, dtype=float32)}
    """
    for state in find_states(unwrap_variables(opt_state)):
        moving: Any = state.score_state
        if isinstance(moving, DropAndGrowState) and moving.ever is not None:
            return jax.tree.map(_explored, moving.ever, state.masks)
    raise ValueError(
        "No tracked masks in this optimizer state: pass track=True to rigl, set_, snfs "
        "or drop_and_grow."
    )


def _explored(ever: Array, mask: Array) -> Array:
    return jnp.mean(ever | mask, dtype=jnp.float32)
