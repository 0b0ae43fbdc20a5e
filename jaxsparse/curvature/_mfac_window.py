"""M-FAC over a sliding window of gradients: one in, one out, one product.

With m rows `G` the empirical Fisher matrix and the small system behind its inverse are

    F = damping I + G^T G / m        S = m damping I + G G^T    (m x m)
    F^-1 x = (x - G^T S^-1 G x) / damping,

and for the gradient `g_j` of row j, without that difference of nearly equal numbers,
`F^-1 g_j = m G^T S^-1 e_j`. `S` is kept factored (`linalg.sliding`). Gradients stay
trees: there is no copy of all parameters in one vector, and none of `G`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import _checks, _sharded
from jaxsparse._dtypes import widest
from jaxsparse._loops import when
from jaxsparse._typing import Array, PyTree
from jaxsparse.curvature._gradient_rows import (
    combine,
    everywhere,
    gram_of,
    inner,
    squares,
)
from jaxsparse.curvature._trees import check_damping
from jaxsparse.linalg import sliding
from jaxsparse.patterns import check_masks
from jaxsparse.tree import leaves_with_paths, like, map_with_path


class MFacWindow(NamedTuple):
    """The last m gradients, and a factor that inverts their Fisher matrix quickly.

    Attributes:
      grads: a tree like the parameters, leaves `[m, *shape]`: `G`, a ring. Rows that
        were not written yet are zeros.
      gram: `G G^T`, `[m, m]`.
      factor: upper triangular `U` with `U^T U = m damping I + G G^T`, in the order of
        age, the oldest gradient first.
      damping: the damping in `factor`.
      oldest: the row of `grads` that the next gradient replaces, int32.
    """

    grads: PyTree
    gram: Array
    factor: sliding.Factor
    damping: Array
    oldest: Array


def window_init(
    params: PyTree, *, window: int, damping: Any, dtype: Any = None
) -> MFacWindow:
    """Start an empty window of gradients.

    Memory: `window` times the parameters, and `2 window^2` numbers.

    Args:
      params: a tree of arrays, or of their shapes; None and `optax.MaskedNode` are no
        parameters. Rows are sharded as the parameters are.
      window: the number of gradients it holds, m. All m rows count from the start,
        including those that are still zeros: `F = damping I + (1/m) sum g g^T`, as in
        the reference implementation.
      damping: the number added to the diagonal of F.
      dtype: the type of the stored gradients; the parameters' by default. Sums are made
        in float32 at least. (In 16 bits a step takes 1.5 times as long on CPU.)

    Returns:
      A window.

    Raises:
      ValueError: `window < 1`, `damping <= 0`; more gradients than fit into memory.
      TypeError: parameters that are not real floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.ones((2, 3))}
      >>> state = js.curvature.window_init(params, window=4, damping=1e-3)
      >>> state.grads["w"].shape
      (4, 2, 3)
    """
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_positive_int(window, name="window")
    check_damping(damping)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a real floating-point type, got {dtype!r}.")
    for path, w in leaves_with_paths(params):
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(
                f"{path}: a window holds gradients of real floating-point parameters, "
                f"got {w.dtype}. Leave it out, for instance with optax.masked."
            )
    advice = "Take a smaller window, or dtype=jnp.bfloat16."
    _checks.check_window_fits("window_init", params, window, dtype, advice)
    rows = jax.tree.map(lambda w: _empty_rows(w, window, dtype), params)
    wide = widest(jax.tree.leaves(rows))
    device = None
    for G in jax.tree.leaves(rows):
        device = device or everywhere(getattr(G, "sharding", None))
    damping = jnp.full((), damping, wide, device=device)
    return MFacWindow(
        grads=rows,
        gram=_sharded.zeros((window, window), wide, device),
        factor=sliding.empty_factor(window, _shift(window, damping)),
        damping=damping,
        oldest=jnp.zeros((), jnp.int32, device=device),
    )


def window_update(
    state: MFacWindow, grads: PyTree, *, damping: Any = None
) -> MFacWindow:
    """Replace the oldest gradient of a window.

    One pass over `G` for the new inner products, `2 m d` FLOP, and `O(m^2)` for the
    factor. If the state is donated, the row is written in place.

    If a gradient or its squared norm is not finite, the window does not change.

    Args:
      state: a window.
      grads: a tree like the parameters.
      damping: another damping from now on; None keeps that of the window.

    Returns:
      A window.

    Raises:
      ValueError: gradients of another structure or shape, `damping <= 0`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.curvature.window_init({"w": jnp.zeros(2)}, window=2, damping=0.5)
      >>> state = js.curvature.window_update(state, {"w": jnp.array([1.0, 2.0])})
      >>> state.gram
      Array([[5., 0.],
             [0., 0.]], dtype=float32)
    """
    _check_like_rows(state, grads, name="grads")
    return _update(state, grads, _damping(state, damping))[0]


def window_update_ihvp(
    state: MFacWindow, grads: PyTree, *, damping: Any = None
) -> tuple[MFacWindow, PyTree]:
    """Replace the oldest gradient by `g`, and return `F^-1 g = m G^T S^-1 e_g`.

    Two passes over `G`, `4 m d` FLOP, and `O(m^2)`. With `c = S^-1 e_g`, scaled to 1 at
    `g`, the product is

        m r / (m damping |c|^2 + |r|^2),    r = G^T c,

    the part of `g` that the other gradients do not explain, over its curvature. Nothing
    cancels there, and an error of `c` enters the denominator squared.

    In float32 the relative error is about 1e-7 times the condition number of `S`: at
    most 1e-6 where gradients point in different directions, whatever the damping. (The
    formula with `1 / damping` loses all digits there.) If the other gradients explain a
    gradient up to rounding, no digit of the product is right; it is then neither NaN
    nor large. On CPU XLA sums a parameter of 1e6 weights to 2e-5 of `|g|^2` only; the
    error is then 1e-5 where gradients share half of their length, and still 2e-7 where
    they share none.

    Args:
      state: a window.
      grads: a tree like the parameters. A gradient with NaN or Inf does not enter the
        window, and its product is NaN in the same places. If only its squared norm is
        infinite, the product is 0.
      damping: another damping from now on; None keeps that of the window.

    Returns:
      The window, and a tree like `grads`.

    Raises:
      ValueError: gradients of another structure or shape, `damping <= 0`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.curvature.window_init({"w": jnp.zeros(2)}, window=2, damping=0.5)
      >>> grads = {"w": jnp.array([1.0, 2.0])}
      >>> js.curvature.window_update_ihvp(state, grads)[1]  # g m / (m damping + |g|^2)
      {'w': Array([0.33333334, 0.6666667 ], dtype=float32)}
    """
    _check_like_rows(state, grads, name="grads")
    return _update_ihvp(state, grads, _damping(state, damping))


def window_ihvp(state: MFacWindow, tree: PyTree, *, damping: Any = None) -> PyTree:
    """Return `F^-1 x = (x - G^T S^-1 G x) / damping` for any x.

    Two passes over `G`, `4 m d` FLOP, and `O(m^2)`. For the newest gradient itself
    `window_update_ihvp` is far more accurate.

    Args:
      state: a window.
      tree: x, a tree like the parameters.
      damping: another damping, for this product: it costs a Cholesky factor of S. The
        window's by default.

    Returns:
      A tree like `tree`.

    Raises:
      ValueError: a tree of another structure or shape, `damping <= 0`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> state = js.curvature.window_init({"w": jnp.zeros(2)}, window=1, damping=3.0)
      >>> state = js.curvature.window_update(state, {"w": jnp.array([0.0, 1.0])})
      >>> js.curvature.window_ihvp(state, {"w": jnp.array([3.0, 4.0])})
      {'w': Array([1., 1.], dtype=float32)}
    """
    _check_like_rows(state, tree, name="tree")
    return _ihvp(state, tree, _damping(state, damping))


def window_mask(state: MFacWindow, masks: PyTree) -> MFacWindow:
    """Remove pruned coordinates from all gradients of a window.

    The result is the window that training with the remaining parameters alone would
    have filled. It costs `2 m^2 d` FLOP, as many as m / 2 steps of
    `window_update_ihvp`.

    Args:
      state: a window.
      masks: a tree of bools like the parameters, True = kept; a scalar leaf for a
        parameter that is not pruned.

    Returns:
      A window.

    Raises:
      ValueError: masks of another model.
      TypeError: masks whose dtype is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"w": jnp.zeros(2)}
      >>> state = js.curvature.window_init(params, window=1, damping=0.5)
      >>> state = js.curvature.window_update(state, {"w": jnp.array([1.0, 2.0])})
      >>> masks = {"w": jnp.array([True, False])}
      >>> js.curvature.window_mask(state, masks).gram
      Array([[1.]], dtype=float32)
    """
    _check_state(state)
    shapes = jax.tree.map(
        lambda G: jax.ShapeDtypeStruct(G.shape[1:], G.dtype), state.grads
    )
    masks = like(masks, state.grads, name="masks", of="the window's parameters")
    check_masks(masks, shapes)
    return _mask(state, masks)


def _check_state(state: Any) -> None:
    _checks.check_is(MFacWindow, "js.curvature.window_init(params, ...)", state=state)


def _check_like_rows(state: MFacWindow, tree: PyTree, *, name: str) -> None:
    _check_state(state)
    _checks.check_arrays(**{name: tree})
    _checks.same_structure(tree, state.grads, name=name, of="the window's parameters")

    def one(path: str, x: Any, G: Array) -> None:
        options = {"name": name, "of": "the window's parameter"}
        _checks.check_shape(path, x, G.shape[1:], **options)

    map_with_path(one, tree, state.grads)


def _damping(state: MFacWindow, damping: Any) -> Array:
    if damping is None:
        return state.damping
    check_damping(damping)
    return jnp.asarray(damping, state.damping.dtype)


# Compiled once for all eager calls; inside of a caller's jit they are part of it.


@jax.jit
def _update(state: MFacWindow, grads: PyTree, damping: Array):
    """The window with one more gradient, and whether that was entered."""
    m, wide = len(state.gram), state.gram.dtype
    new = jax.tree.map(lambda g, G: g.astype(G.dtype), grads, state.grads)
    # No inner product of what is entered, and no sum of m of them, overflows.
    fits = squares(new, wide) <= jnp.finfo(wide).max / 2**16

    def write(rows: PyTree, new: PyTree, row: Array) -> PyTree:
        put = lambda G, g: lax.dynamic_update_index_in_dim(G, g, row, 0)
        return jax.tree.map(put, rows, new)

    # A write outside of a loop XLA would repeat in each use of the rows, with a copy.
    rows = when(fits, write, state.grads, new, state.oldest)
    dots = inner(rows, new, state.gram[0])

    def enter(system: tuple, dots: Array, damping: Array):
        gram, factor, row = system
        gram = gram.at[row].set(dots).at[:, row].set(dots)
        row = (row + 1) % m
        return gram, sliding.next_factor(factor, gram, row, _shift(m, damping)), row

    system = (state.gram, state.factor, state.oldest)
    gram, factor, oldest = when(fits, enter, system, dots, state.damping)
    new_state = MFacWindow(rows, gram, factor, state.damping, oldest)
    factor = _factor_for(new_state, damping)
    return new_state._replace(factor=factor, damping=damping), fits


@jax.jit
def _update_ihvp(state: MFacWindow, grads: PyTree, damping: Array):
    state, fits = _update(state, grads, damping)
    m, wide = len(state.gram), state.gram.dtype
    c, damped = sliding.newest_column(state.factor)
    rest = combine(state.grads, jnp.roll(c, state.oldest), wide)
    scale = m / (damped + squares(rest, wide))
    one = lambda g, r: jnp.where(fits, (scale * r).astype(g.dtype), g * 0)
    return state, jax.tree.map(one, grads, rest)


@jax.jit
def _ihvp(state: MFacWindow, tree: PyTree, damping: Array) -> PyTree:
    wide = state.gram.dtype
    x = jax.tree.map(lambda x: x.astype(wide), tree)
    dots = jnp.roll(inner(state.grads, x, state.gram[0]), -state.oldest)
    c = sliding.solve(_factor_for(state, damping), dots)
    seen = combine(state.grads, jnp.roll(c, state.oldest), wide)
    one = lambda out, x, p: ((x - p) / damping).astype(out.dtype)
    return jax.tree.map(one, tree, x, seen)


@jax.jit
def _mask(state: MFacWindow, masks: PyTree) -> MFacWindow:
    m, wide = len(state.gram), state.gram.dtype

    def clear(rows: PyTree, masks: PyTree) -> PyTree:
        def one(G: Array, mask: Array) -> Array:
            if jnp.ndim(mask) == 0:
                return G
            return jnp.where(mask[None], G, jnp.zeros((), G.dtype))

        return jax.tree.map(one, rows, masks)

    # In a loop, for the reason given in `_update`.
    rows = when(state.oldest >= 0, clear, state.grads, masks)
    found = (gram_of(G, wide) for G in jax.tree.leaves(rows))
    gram = sum(found, start=jnp.zeros_like(state.gram))
    factor = sliding.factorise(gram, state.oldest, _shift(m, state.damping))
    return state._replace(grads=rows, gram=gram, factor=factor)


def _factor_for(state: MFacWindow, damping: Array) -> sliding.Factor:
    """The factor of the window, made anew where the damping is another."""

    def anew(factor: sliding.Factor, *system: Array) -> sliding.Factor:
        del factor
        return sliding.factorise(*system)

    system = (state.gram, state.oldest, _shift(len(state.gram), damping))
    return when(damping != state.damping, anew, state.factor, *system)


def _shift(m: int, damping: Array) -> Array:
    """`m damping`, and no subnormal number that would flush to zero."""
    return jnp.maximum(m * damping, jnp.finfo(damping.dtype).tiny)


def _empty_rows(w: Any, m: int, dtype: Any) -> Array:
    shape, dtype = (m, *w.shape), dtype or w.dtype
    sharding = getattr(w, "sharding", None)  # that of a tracer is known if explicit
    if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
        sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec))
        return _sharded.zeros(shape, dtype, sharding)
    return jnp.zeros(shape, dtype)
