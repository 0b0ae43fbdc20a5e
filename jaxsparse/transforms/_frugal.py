"""FRUGAL: an optimizer with memory on a part of the weights, and signs on the rest."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxsparse import _checks, patterns
from jaxsparse._loops import when
from jaxsparse._sharded import everywhere, laid_out_like, sharded_like, with_auto_axes
from jaxsparse._typing import Array, Cadence, PyTree, Where
from jaxsparse.schedules.horizon import as_cadence
from jaxsparse.tree import keys_like, leaves_with_paths, select

Unit = int | Literal["entries", "leaves"]


class FrugalState(NamedTuple):
    """The state of `frugal`.

    Attributes:
      step: the number of updates, int32.
      key: the data of the key from which coordinates are drawn, with the step.
      indices: by the path of a parameter (the first one of a shape, for `"leaves"`) the
        coordinates that the optimizer has, int32, increasing.
      optimizer: the state of the optimizer, of these coordinates alone.
      rest: the state of the other one, of all.
    """

    step: Array
    key: Array
    indices: dict[str, Array]
    optimizer: PyTree
    rest: PyTree


def frugal(
    optimizer: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    *,
    density: float,
    every: int | Cadence,
    key: Array,
    unit: Unit = -2,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Give an optimizer with memory a part of the coordinates, and signs the rest.

    In the steps of `every` a part of each parameter is drawn anew, and the `optimizer`
    begins anew on it, with fresh moments; in all steps it moves that part, and `rest`,
    which should remember nothing, moves the others. Zmushko et al. (2024, FRUGAL,
    arXiv:2411.07837): a density of 0.25, 200 steps, Adam beside the sign of the
    gradient, both at one learning rate, in fine-tuning at 0.1 of it for signs::

        tx = optax.chain(
            js.transforms.frugal(
                optax.scale_by_adam(), optax.scale_by_sign(),
                density=0.25, every=200, key=jax.random.key(0)),
            optax.scale_by_learning_rate(schedule))

    Memory: moments are there for the drawn part alone, arrays of its size, so Adam's
    take `2 * density` numbers a weight where the parameters take one. An integer for
    each drawn row or column comes to that, for each drawn weight with `"entries"`. A
    step takes about as long as Adam's; with single entries longer, as they are gathered
    (`pytest benchmarks/test_sparse_training.py -k split`).

    It may stand within `jaxsparse.enforce`, where pruned weights stay 0. A weight that
    comes back finds the moments of its coordinate as they are, until the next draw:
    they decayed while its gradient was masked.

    Differs from the reference implementation, whose momentum begins with the gradient
    of the first step and then adds it again, so that the first update is
    `(1 + momentum) g`: here the optimizer begins as it always does. And in that the
    counts of schedules within `optimizer` go on. Subspaces of singular vectors are left
    out.

    Args:
      optimizer: any optax optimizer. It sees a tree of parts: of a matrix a smaller
        matrix, of entries a vector, of leaves a stack of them; and parameters that
        `where` leaves out whole.
      rest: the optimizer of the others, `optax.scale_by_sign()` in the paper. It sees
        all of all parameters.
      density: the part of the coordinates that `optimizer` has, in (0, 1]; of n units
        as many as a mask of sparsity `1 - density` keeps, at least one.
      every: when coordinates are drawn; a cadence, or an integer.
      key: a typed key, `jax.random.key(seed)`; a parameter's draw depends on it, the
        step and the parameter's path.
      unit: what is drawn. An integer: indices along that axis, -2 for the inputs of a
        kernel `(in, out)` or `(*window, in, out)`, which are the columns of torch's
        `(out, in)`, one of the paper's choices; -1 for its outputs, 0 for layers of a
        stack. `"entries"`: single weights. `"leaves"`: whole parameters, among those of
        equal shape; a shape that one parameter alone has is always the optimizer's.
      where: which parameters are split; the optimizer has all others. See
        `jaxsparse.tree.select`: by default embeddings, norms and biases are not split.

    Returns:
      A gradient transformation. Its state is a `FrugalState`.

    Raises:
      ValueError: a density out of range, a `unit` that is none; at `init`, an axis that
        a parameter does not have; at `update`, without `params`.
      TypeError: an optimizer that is none, a key that is not a random key.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.transforms.frugal(
      ...     optax.trace(0.9), optax.scale_by_sign(), density=0.25, every=200,
      ...     key=jax.random.key(0))
      >>> params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> jax.tree.map(jnp.shape, state.optimizer.trace)
      {'bias': (3,), 'kernel': (2, 3)}
      >>> grads = jax.tree.map(lambda w: 5.0 * w, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> inputs = updates["kernel"][:, 0]
      >>> int(jnp.sum(inputs == 5)), int(jnp.sum(inputs == 1))
      (2, 6)
    """
    _checks.check_transformation(optimizer=optimizer, rest=rest)
    _checks.check_number(above=0, most=1, density=density)
    _checks.check_key(key)
    _checks.check_where(where)
    if isinstance(unit, str):
        _checks.check_choice(("entries", "leaves"), unit=unit)
    elif isinstance(unit, bool) or not isinstance(unit, int | np.integer):
        raise TypeError(
            f"unit must be an axis, 'entries' or 'leaves', got {_checks.shown(unit)}."
        )
    cadence = as_cadence(every)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    kind = jax.random.key_impl(key) if typed else None
    inner = optax.with_extra_args_support(optimizer)
    other = optax.with_extra_args_support(rest)
    split = functools.partial(_splits, unit=unit, density=density, where=where)

    def init_fn(params: PyTree) -> FrugalState:
        splits = split(params)
        step = jnp.asarray(np.zeros((), np.int32))
        indices = _drawn(splits, key, step)
        return FrugalState(
            step=step,
            key=jnp.array(jax.random.key_data(key)),  # a donated state is gone
            indices=indices,
            optimizer=inner.init(_parts(params, splits, indices)),
            rest=other.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        _checks.check_has_params(params)
        _checks.check_like(params, updates=updates)
        splits = split(params)

        def anew(before: Any, step: Array, params: PyTree) -> Any:
            again = jax.random.wrap_key_data(state.key, impl=kind)
            indices = _drawn(splits, again, step)
            fresh = inner.init(_parts(params, splits, indices))
            return indices, _with_schedules_of(before[1], fresh)

        begins = jnp.asarray(cadence(state.step), bool)
        before = state.indices, state.optimizer
        indices, held = when(begins, anew, before, state.step, params)
        given, own = (_parts(x, splits, indices) for x in (updates, params))
        moved, held = inner.update(given, held, own, **extra_args)
        others, rest_held = other.update(updates, state.rest, params, **extra_args)
        return _whole(others, moved, splits, indices), FrugalState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            key=state.key,
            indices=indices,
            optimizer=held,
            rest=rest_held,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Split(NamedTuple):
    """Parameters among whose units some are drawn.

    Attributes:
      path: of the first one.
      members: their places among all leaves; several only where leaves are drawn.
      units: how many units there are.
      count: how many are drawn.
      unit: as `frugal` has it, an axis counted from the front.
    """

    path: str
    members: tuple[int, ...]
    units: int
    count: int
    unit: Unit


def _splits(
    params: PyTree, unit: Unit, density: float, where: Where
) -> tuple[_Split, ...]:
    """What is split, and how."""
    _checks.check_arrays(abstract=True, params=params)
    named = leaves_with_paths(params)
    taken = jax.tree.leaves(select(params, where))
    groups: dict[Any, list[int]] = {}
    for i, ((path, w), take) in enumerate(zip(named, taken, strict=True)):
        if take and math.prod(w.shape):
            alike = (w.shape, w.dtype) if unit == "leaves" else path
            groups.setdefault(alike, []).append(i)
    found = []
    for members in groups.values():
        path, w = named[members[0]]
        here = unit
        if unit == "leaves":
            units = len(members)
        elif unit == "entries":
            units = math.prod(w.shape)
        else:
            here = _axis(path, w, unit)
            units = w.shape[here]
        count = max(1, units - int(patterns.removed_count(1 - density, units)))
        if count < units:  # else it is the optimizer's, whole
            found.append(_Split(path, tuple(members), units, count, here))
    return tuple(found)


def _axis(path: str, w: Array, unit: Any) -> int:
    if not -w.ndim <= unit < w.ndim:
        raise ValueError(
            f"{path}: unit is the axis {unit}, and the parameter has {w.ndim}. Leave "
            "it out with `where`, or take unit='entries'."
        )
    return int(unit) % w.ndim


def _drawn(splits: Sequence[_Split], key: Array, step: Array) -> dict[str, Array]:
    """The units of this step, increasing."""
    keys = keys_like(jax.random.fold_in(key, step), {s.path: 0 for s in splits})
    return {s.path: _draw(keys[s.path], s.units, s.count, s.unit) for s in splits}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, units: int, count: int, unit: Unit) -> Array:
    if unit != "entries":
        order = jax.random.permutation(key, jnp.arange(units, dtype=jnp.int32))
        return jnp.sort(order[:count])
    # Of many entries a threshold is found by counting, which takes no sort.
    drawn = jax.random.uniform(key, (units,))
    everything = lambda path, leaf: True
    mask = patterns.masks(drawn, 1 - count / units, where=everything)
    return jnp.flatnonzero(mask, size=count, fill_value=0).astype(jnp.int32)


def _parts(tree: PyTree, splits: Sequence[_Split], indices: dict[str, Array]) -> PyTree:
    """What the optimizer sees of a tree: the drawn parts, and what is not split.

    The stack of the drawn leaves is where the first of them was, and None the others.
    """
    leaves, treedef = jax.tree.flatten(tree)
    found: list[Any] = list(leaves)
    for s in splits:
        own = [leaves[i] for i in s.members]
        for i in s.members:
            found[i] = None
        found[s.members[0]] = _part(own, indices[s.path], s.unit)
    return treedef.unflatten(found)


def _part(own: list[Array], indices: Array, unit: Unit) -> Array:
    if unit == "leaves":
        return jnp.stack([_one_of(i, own) for i in indices])
    if unit == "entries":
        pick = lambda x, indices: x.reshape(-1)[indices]
        return with_auto_axes(pick, everywhere, own[0], indices)
    pick = lambda x, indices: jnp.take(x, indices, axis=unit, mode="clip")
    return sharded_like(pick, own[0], indices)


def _whole(
    others: PyTree, parts: PyTree, splits: Sequence[_Split], indices: dict[str, Array]
) -> PyTree:
    """The parts put back among the others."""
    leaves, treedef = jax.tree.flatten(others)
    given = treedef.flatten_up_to(parts)
    found = list(given)
    for s in splits:
        part, drawn = given[s.members[0]], indices[s.path]
        own = [leaves[i] for i in s.members]
        back = _put(own, part.astype(own[0].dtype), drawn, s)
        for i, x in zip(s.members, back, strict=True):
            found[i] = x
    return treedef.unflatten(found)


def _put(own: list[Array], part: Array, indices: Array, split: _Split) -> list[Array]:
    if split.unit == "entries":
        put = lambda x, part, indices: (
            x.reshape(-1).at[indices].set(part, unique_indices=True).reshape(x.shape)
        )
        return [laid_out_like(sharded_like(put, own[0], part, indices), own[0])]
    # For each unit its place among the drawn ones, -1 for one that is not.
    order = jnp.arange(split.count, dtype=jnp.int32)
    place = jnp.full(split.units, -1, jnp.int32).at[indices].set(order)
    if split.unit == "leaves":
        return [_one_of(place[i] + 1, [x, *part]) for i, x in enumerate(own)]

    def spread(x: Array, part: Array, place: Array) -> Array:
        axis: Any = split.unit
        along = [1] * x.ndim
        along[axis] = split.units
        moved = jnp.take(part, jnp.maximum(place, 0), axis=axis, mode="clip")
        return jnp.where((place >= 0).reshape(along), moved, x)

    return [sharded_like(spread, own[0], part, place)]


@jax.jit
def _one_of(index: Array, arrays: list[Array]) -> Array:
    """One array of several. It reads that one alone, which a stack would not."""
    branches = [lambda xs, i=i: xs[i] for i in range(len(arrays))]
    return lax.switch(index, branches, arrays)


def _with_schedules_of(before: PyTree, fresh: PyTree) -> PyTree:
    """A fresh state whose schedules go on where those of another one are."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    goes_on = lambda old, new: old if is_schedule(old) else new
    return jax.tree.map(goes_on, before, fresh, is_leaf=is_schedule)
