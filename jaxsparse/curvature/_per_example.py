"""Gradients one by one: of single examples, or of small batches."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import _checks, _sharded
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.curvature._trees import (
    check_finite,
    check_real,
    gradient_leaves,
    largest_number,
)
from jaxsparse.linalg.chunks import in_parts, is_spread
from jaxsparse.patterns import check_masks
from jaxsparse.tree import leaves_with_paths, like, select

LossFn = Callable[[PyTree, Any], Array]
"""`loss_fn(params, batch) -> scalar`, the mean over a batch."""


def per_example_grads(
    loss_fn: LossFn,
    params: PyTree,
    batch: Any,
    *,
    average: int = 1,
    chunk: int | None = None,
    where: Where = None,
    masks: PyTree = None,
    dtype: Any = None,
) -> PyTree:
    """Compute the gradient of each example, or of each group of `average` examples.

    `g_i = d/dw loss_fn(params, batch[i * average : (i + 1) * average])`: the loss of
    training, called with batches of `average` examples. The empirical Fisher matrix is
    defined by single examples. The papers that prune (oBERT, M-FAC) take mini-batches
    of 8 to 32: less memory and time for as much data. Near a minimum the outer product
    of a mean of k gradients is about k times smaller, so the damping has to be smaller,
    too (`rel_damping` is).

    Batch norm should run on its stored statistics, dropout not at all.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`. Eager calls compile once for each
        function object: pass a named function, not a new lambda in each turn of a loop.
      params: a tree of arrays.
      batch: a tree of arrays whose leading axis numbers n examples.
      average: how many examples one gradient is the mean of; it divides n.
      chunk: how many gradients are computed at once; it bounds the memory for
        activations. All by default. On a mesh it has to divide their number.
      where: which parameters take part; see `jaxsparse.tree.select`. The others get no
        gradient, and None in the result.
      masks: a tree of bools like `params`, True = kept: pruned weights get 0.
      dtype: the type of the stored gradients, for instance `jnp.bfloat16`; the
        parameter's own by default.

    Returns:
      A tree like `params` with leaves `[n // average, *shape]`, sharded as the batch
      and the parameters are. (Under a caller's jit the compiler decides, and the
      gradient may gather the parameters that a plain gradient gathers.)

    Raises:
      ValueError: an empty batch, one that `average` does not divide, a loss that is no
        scalar; gradients that are NaN or Inf (in eager use), with the parameter's path.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> js.curvature.per_example_grads(loss_fn, params, batch)["w"][..., 0]
      Array([[1., 0.],
             [3., 6.]], dtype=float32)
    """
    _checks.check_callable(2, loss_fn=loss_fn)
    _checks.check_arrays(params=params)
    _checks.check_positive_int(average, name="average")
    if chunk is not None:
        _checks.check_positive_int(chunk, name="chunk")
    n = _examples(batch)
    if n % average:
        raise ValueError(
            f"average={average} does not divide the {n} examples of the batch. Leave "
            f"{n % average} of them out, or choose another number."
        )
    selected = select(params, where)
    taken = jax.tree.map(lambda w, take: w if take else None, params, selected)
    rest = jax.tree.map(lambda w, take: None if take else w, params, selected)
    for path, w in leaves_with_paths(taken):
        check_real(path, w)
    if masks is not None:
        masks = like(masks, params, name="masks")
        check_masks(masks, params)
        masks = jax.tree.map(lambda k, take: k if take else None, masks, selected)
    m = n // average
    groups = jax.tree.map(lambda x: x.reshape(m, average, *x.shape[1:]), batch)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), groups)
    with _checks.explained("loss_fn", params=params, batch=first):
        loss = jax.eval_shape(loss_fn, params, first)
    _check_scalar(loss, average)
    parts = min(chunk or m, m)
    if parts < m and m % parts and is_spread(*jax.tree.leaves(groups)):
        raise ValueError(
            f"{chunk=} does not divide the {m} gradients, which lie on several "
            "devices. Choose a divisor."
        )
    lie = _shardings(taken, groups)
    options: Any = {"chunk": parts, "dtype": dtype, "shardings": lie}
    grads = _grads(loss_fn, taken, rest, masks, groups, **options)
    named = leaves_with_paths(grads)
    leaves = [g for _, g in named]
    if all(map(_checks.is_concrete, leaves)):
        check_finite([p for p, _ in named], leaves, list(map(largest_number, leaves)))
    return grads


def _shardings(taken: PyTree, groups: Any) -> tuple[NamedSharding | None, ...]:
    """How the gradients are to lie, where the compiler would be free to choose.

    That is on a mesh with automatic axes. Within a jit of the caller's it is not known
    how the parameters lie.
    """
    of = lambda x: getattr(x, "sharding", None) if _checks.is_concrete(x) else None
    data = [of(x) for x in jax.tree.leaves(groups)]
    first = [s.spec[0] for s in data if isinstance(s, NamedSharding) and s.spec]
    m_axis = first[0] if first else None

    def one(w: Array) -> NamedSharding | None:
        found = of(w)
        if not isinstance(found, NamedSharding) or found.mesh.size == 1:
            return None
        if AxisType.Explicit in found.mesh.axis_types:
            return None
        names = jax.tree.leaves(tuple(found.spec))
        free = m_axis if not set(jax.tree.leaves(m_axis)) & set(names) else None
        return NamedSharding(found.mesh, P(free, *found.spec))

    return tuple(map(one, jax.tree.leaves(taken)))


@functools.partial(jax.jit, static_argnames=("loss_fn", "chunk", "dtype", "shardings"))
def _grads(
    loss_fn, taken, rest, masks, groups, *, chunk: int, dtype, shardings
) -> PyTree:
    found = _in_chunks(loss_fn, taken, rest, masks, groups, chunk, dtype)
    leaves, treedef = jax.tree.flatten(found)
    put = lambda g, s: g if s is None else lax.with_sharding_constraint(g, s)
    return treedef.unflatten(map(put, leaves, shardings))


def _in_chunks(loss_fn, taken, rest, masks, groups, chunk: int, dtype) -> PyTree:
    def loss(taken: PyTree, group: Any) -> Array:
        pick = lambda a, b: b if a is None else a
        params = jax.tree.map(pick, taken, rest, is_leaf=lambda x: x is None)
        return loss_fn(params, group)

    def store(g: Array, mask: Array | None) -> Array:
        g = g if mask is None else jnp.where(mask, g, jnp.zeros((), g.dtype))
        return g if dtype is None else g.astype(dtype)

    def one(group: Any) -> PyTree:
        g = jax.grad(loss)(taken, group)
        if masks is None:
            return jax.tree.map(lambda g: store(g, None), g)
        return jax.tree.map(store, g, masks)

    several = jax.vmap(one)
    m = jax.tree.leaves(groups)[0].shape[0]
    if chunk == m:
        return several(groups)
    if not is_spread(*jax.tree.leaves(groups)):
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], groups))
        empty = jax.tree.map(lambda s: jnp.zeros((m, *s.shape), s.dtype), shapes)

        def fill(start: Any, size: int, out: PyTree) -> PyTree:
            cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
            write = lambda o, g: lax.dynamic_update_slice_in_dim(o, g, start, 0)
            return jax.tree.map(write, out, several(jax.tree.map(cut, groups)))

        return in_parts(m, chunk, fill, empty)
    # Every device has some of each chunk: gradient i of a chunk is number
    # i * turns + turn of all.
    turns = m // chunk
    apart = lambda x: x.reshape(chunk, turns, *x.shape[1:])
    groups = jax.tree.map(apart, groups)

    def grads_of(i: Any) -> PyTree:
        cut = lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
        return several(jax.tree.map(cut, groups))

    def empty(like: Any) -> Array:
        shape, sharding = (chunk, turns, *like.shape[1:]), like.sharding
        if sharding is not None:  # on a mesh with explicit axes it has to be the same
            spec = P(sharding.spec[0], None, *sharding.spec[1:])
            sharding = NamedSharding(sharding.mesh, spec)
        return _sharded.zeros(shape, like.dtype, sharding)

    def turn(i: Any, out: PyTree) -> PyTree:
        write = lambda o, g: lax.dynamic_update_index_in_dim(o, g, i, 1)
        return jax.tree.map(write, out, grads_of(i))

    start = jax.tree.map(empty, jax.eval_shape(lambda: grads_of(0)))
    out = lax.fori_loop(0, turns, turn, start)
    return jax.tree.map(lambda x: x.reshape(m, *x.shape[2:]), out)


def stream_grads(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    count: int | None = None,
    average: int = 1,
    chunk: int | None = None,
    where: Where = None,
    masks: PyTree = None,
    dtype: Any = None,
) -> Iterator[PyTree]:
    """Compute `per_example_grads` batch after batch, never all of them at once.

    Batches of one shape compile once. Examples of a batch that do not fill a group of
    `average` are left out.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`.
      params: a tree of arrays.
      batches: batches of any size.
      count: the number of gradients in all; the last chunk is cut. All by default.
      average: as for `per_example_grads`, like the arguments after it.
      chunk: how many gradients are computed at once.
      where: which parameters take part.
      masks: True = kept.
      dtype: the type of the stored gradients.

    Yields:
      Trees with leaves `[m, *shape]`, for an estimator's `update`.

    Raises:
      ValueError: no batch, or fewer gradients than `count`; or as for
        `per_example_grads`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2) / 2
      >>> params, batches = {"w": jnp.ones((2, 1))}, [jnp.ones((3, 2))] * 4
      >>> stream = js.curvature.stream_grads(loss_fn, params, batches, count=10)
      >>> [grads["w"].shape[0] for grads in stream]
      [3, 3, 3, 1]
    """
    # Here, and not when the first gradients are asked for.
    _checks.check_callable(2, loss_fn=loss_fn)
    _checks.check_arrays(params=params)
    _checks.check_batches(batches)
    _checks.check_positive_int(average, name="average")
    for name, value in (("count", count), ("chunk", chunk)):
        if value is not None:
            _checks.check_positive_int(value, name=name)
    select(params, where)
    if masks is not None:
        check_masks(masks, params)
    options: Any = {"average": average, "chunk": chunk, "where": where}
    options |= {"masks": masks, "dtype": dtype}
    return _streamed(loss_fn, params, batches, count, options)


def _streamed(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batches: Iterable[Any],
    count: int | None,
    options: Any,
) -> Iterator[PyTree]:
    seen, average = 0, options["average"]
    for batch in batches:
        n = _examples(batch) // average
        if count is not None:
            n = min(n, count - seen)
        if n == 0:
            continue
        batch = jax.tree.map(lambda x, n=n: x[: n * average], batch)
        seen += n
        yield per_example_grads(loss_fn, params, batch, **options)
        if seen == count:
            return
    if count is not None or not seen:
        raise ValueError(
            f"The batches gave {seen} gradients of {average} examples"
            + ("." if count is None else f", asked for {count}.")
            + " Was the iterator used up before? Pass more data, or a smaller count."
        )


def collect_grads(stream: Iterable[PyTree], *, count: int) -> PyTree:
    """Collect streamed gradients in host memory, as NumPy arrays.

    Pass them to `mfac`, which fetches them page by page, so they may be larger than a
    device's memory.

    Args:
      stream: trees with leaves `[m, *shape]`, as `stream_grads` yields them.
      count: the number of gradients in all.

    Returns:
      A tree with leaves `[count, *shape]`.

    Raises:
      ValueError: the stream ends early.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> stream = iter([{"w": jnp.ones((2, 3))}] * 2)
      >>> js.curvature.collect_grads(stream, count=4)["w"].shape
      (4, 3)
    """
    _checks.check_batches(stream, name="stream")
    _checks.check_positive_int(count, name="count")
    seen, out = 0, None
    for grads in stream:
        _checks.check_arrays(stream=grads)
        gradient_leaves(grads)
        if out is None:
            empty = lambda g: np.empty((count, *g.shape[1:]), g.dtype)
            out = jax.tree.map(empty, grads)
        n = min(jax.tree.leaves(grads)[0].shape[0], count - seen)
        for target, g in zip(jax.tree.leaves(out), jax.tree.leaves(grads), strict=True):
            target[seen : seen + n] = g[:n]
        seen += n
        if seen == count:
            return out
    raise ValueError(f"The stream gave {seen} gradients, asked for {count}.")


def _examples(batch: Any) -> int:
    _checks.check_arrays(batch=batch)
    sizes = {path: jnp.shape(x)[:1] for path, x in leaves_with_paths(batch)}
    if not sizes or () in sizes.values() or len(set(sizes.values())) > 1:
        raise ValueError(
            "A batch is a tree of arrays whose leading axis numbers the examples, of "
            f"the same length everywhere; got {sizes or batch!r}."
        )
    (n,) = next(iter(sizes.values()))
    if n == 0:
        raise ValueError("An empty batch: no examples, so no gradients (m = 0).")
    return n


def _check_scalar(loss: Any, average: int) -> None:
    if getattr(loss, "shape", None) != ():
        raise ValueError(
            "loss_fn(params, batch) must return a scalar, the mean over the batch; it "
            f"returned {loss}. It is called with batches of {average} (their leading "
            "axis is kept), as in training. For (loss, aux) return the loss alone."
        )
