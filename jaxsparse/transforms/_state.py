"""What a pruning transformation remembers, and how it is found in any optax state."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _checks, patterns
from jaxsparse._together import each
from jaxsparse._typing import Array, PyTree
from jaxsparse._zeros import nonzero
from jaxsparse.tree import leaves_with_paths, unwrap_variables


class PruneScheduleState(NamedTuple):
    """The state of `prune_schedule` and `keep_sparse`: arrays only.

    The schedule and its target are not in it, so that a changed configuration takes
    effect after a restore.

    Attributes:
      step: the number of updates made, int32.
      masks: a tree of bools like the parameters, True = kept.
      score_state: what the score remembers.
      updated: whether the last update chose masks anew. (None in the second `update`
        call made by `enforce`, which reuses this step's masks.)
      regrew: whether it brought a weight back.
      leaked: the largest number of pruned weights found nonzero at once, int32; counted
        after each choice of masks and in every 100th step.
      change: the update that the last choice of masks adds to the parameters, in that
        step alone; None for scores that change none.
    """

    step: Array
    masks: PyTree
    score_state: Any
    updated: Array | None
    regrew: Array
    leaked: Array
    change: PyTree = None


class DropAndGrowState(NamedTuple):
    """The state of `drop_and_grow` besides the masks.

    Attributes:
      grow: the state of the score by which weights grow.
      ever: a tree of bools, True where a weight was active in some earlier step; None
        unless it is tracked.
    """

    grow: Any
    ever: PyTree


def find_states(opt_state: PyTree) -> list[PruneScheduleState]:
    """Find the pruning states anywhere inside an optimizer state.

    Args:
      opt_state: the state of any chain, wrapper or partition.

    Returns:
      The states in order, possibly none.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> prune_schedule = js.prune_schedule(0.5, every=1)
      >>> tx = js.enforce(optax.chain(prune_schedule, optax.adam(1e-3)))
      >>> (state,) = js.transforms.find_states(tx.init({"w": jnp.ones((2, 2))}))
      >>> int(state.step), int(state.leaked)
      (0, 0)
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_state)
    return [x for x in leaves if _is_state(x)]


def _is_state(x: Any) -> bool:
    return isinstance(x, PruneScheduleState)


def check_state(state: Any) -> None:
    """Raises where `update` was called with something else in place of the state."""
    if not isinstance(state, PruneScheduleState):
        raise TypeError(NOT_A_STATE.format(f"a {type(state).__name__}"))


NOT_A_STATE = (
    "state must be what `tx.init(params)` or the last `update` returned, got {}. The "
    "order is `tx.update(updates, state, params)`."
)


def put_states(opt_state: PyTree, states: list[PruneScheduleState]) -> PyTree:
    """Replaces the pruning states inside an optimizer state."""
    leaves, treedef = jax.tree.flatten(opt_state, is_leaf=_is_state)
    rest = iter(states)
    return treedef.unflatten([next(rest) if _is_state(x) else x for x in leaves])


def masks_by_path(opt_state: PyTree) -> dict[tuple, Array]:
    """The masks in an optimizer state by key path.

    Where two pruning transformations hold a mask of one parameter, what either of them
    removes is removed.
    """
    found: dict[tuple, Array] = {}
    for state in find_states(opt_state):
        for path, mask in jax.tree_util.tree_leaves_with_path(state.masks):
            found[path] = found[path] & mask if path in found else mask
    return found


def masks_like(params: PyTree, opt_state: PyTree) -> PyTree:
    """The masks in an optimizer state, in the structure of `params`."""
    found = masks_by_path(opt_state)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: found.get(path, jnp.ones((), bool)), params
    )


def masks_of(opt_state: PyTree) -> PyTree:
    """Return the masks in an optimizer state, wherever they are nested.

    Args:
      opt_state: the state of `enforce(...)`, of a chain, of `nnx.Optimizer`
        (`optimizer.opt_state`), or inside any wrapper.

    Returns:
      A tree of bools with the structure of the parameters, True = kept. Parameters that
      `optax.masked` or `optax.partition` hides from the pruning transformation have a
      scalar True. For NNX it has the structure of `nnx.as_pure(nnx.state(model, ...))`.

    Raises:
      ValueError: no pruning state, or several over different parts of the parameters
        that cannot be laid over each other.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> prune = js.prune_schedule(0.5, every=1)
      >>> tx = js.enforce(optax.chain(prune, optax.adam(1e-3)))
      >>> js.masks_of(tx.init({"w": jnp.array([[3.0, 1.0]]), "b": jnp.ones(2)}))
      {'b': Array(True, dtype=bool), 'w': Array([[ True, False]], dtype=bool)}
    """
    states = find_states(unwrap_variables(opt_state))
    if not states:
        raise ValueError(NO_STATE)
    hidden = lambda x: isinstance(x, optax.MaskedNode)

    def lay_over(*masks):
        shown = [m for m in masks if not hidden(m)]
        if not shown:
            return jnp.ones((), bool)
        kept = shown[0]
        for mask in shown[1:]:
            kept = kept & mask
        return kept

    return jax.tree.map(lay_over, *(s.masks for s in states), is_leaf=hidden)


def _prunes(state: PruneScheduleState) -> bool:
    """Whether any mask removes anything."""
    return not all(jax.device_get(each(jnp.all, jax.tree.leaves(state.masks))))


def leaked_weights(w: Array, mask: Array) -> Array:
    """How many weights are not zero where their mask is False."""
    return jnp.sum(nonzero(w) & ~mask)


NO_STATE = (
    "No pruning transformation in this optimizer state. Put js.prune_schedule(...) "
    "into the chain, for instance js.enforce(optax.chain(js.prune_schedule(...), "
    "optax.adam(1e-3))). (Of an nnx.Optimizer pass the optimizer itself or its "
    "opt_state, not nnx.state(optimizer). For masks alone, js.report.table(params, "
    "masks) names weights that are not zero.)"
)


def assert_sparse(opt_state: PyTree, params: PyTree = None) -> None:
    """Raise an error if pruned weights are not zero.

    The literal chain `optax.chain(prune_schedule, optimizer)` masks gradients but
    cannot hold weights at zero when plain `optax.apply_updates` follows. Nor can
    anything, when a wrapper outside `enforce` changes the parameters again (averages:
    `optax.ema`, `optax.lookahead`, `optax.contrib.schedule_free`). Both are found
    here. It reads values: call it now and then, outside jit.

    It warns when nothing is pruned yet. Before a schedule begins that is expected;
    after a training it means that the schedule lies outside of it.

    Args:
      opt_state: the state of any chain with a pruning transformation.
      params: the parameters of the same moment; when given, each is counted now, and
        the message names them.

    Raises:
      ValueError: pruned weights are, or once were found, nonzero.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> prune = js.prune_schedule(0.5, every=1)
      >>> tx = optax.chain(prune, optax.sgd(0.1))   # literal
      >>> params = {"w": jnp.array([[3.0, 1.0]])}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> js.assert_sparse(state, optax.apply_updates(params, updates))
      Traceback (most recent call last):
        ...
      ValueError: 1 pruned weights are not zero (w: 1). ...
      >>> js.assert_sparse(state, js.apply_updates(params, updates, state))
    """
    opt_state = unwrap_variables(opt_state)
    states = find_states(opt_state)
    if not states:
        raise ValueError(NO_STATE)
    _checks.check_known("js.assert_sparse", opt_state=states, params=params)
    where = ""
    leaked = max(int(jnp.max(s.leaked)) for s in states)
    if params is not None:
        params = unwrap_variables(params)
        _checks.check_arrays(params=params)
        patterns.check_masks(masks_like(params, opt_state), params)
        masks = jax.tree.leaves(masks_like(params, opt_state))
        named = leaves_with_paths(params)
        leaks = jax.device_get(each(leaked_weights, [w for _, w in named], masks))
        counts = {path: int(n) for (path, _), n in zip(named, leaks, strict=True)}
        found = {path: n for path, n in counts.items() if n}
        if found:
            leaked = sum(found.values())
            where = " (" + ", ".join(f"{p}: {n}" for p, n in found.items()) + ")"
    steps = max(int(jnp.max(s.step)) for s in states)
    if not leaked and steps and not any(map(_prunes, states)):
        warnings.warn(
            f"Nothing is pruned after {steps} steps: all masks keep everything. Does "
            "the schedule begin later, or only after the training ends? "
            "prune_schedule(..., total_steps=n) finds that out beforehand.",
            stacklevel=2,
        )
    if leaked:
        raise ValueError(
            f"{leaked} pruned weights are not zero{where}. After a literal "
            "optax.chain(prune_schedule, ...) use js.apply_updates(params, updates, "
            "opt_state) in place of optax.apply_updates, or wrap the chain in "
            "js.enforce. If it is wrapped, something outside of it changes the "
            "parameters: put that inside, or apply the masks after it."
        )
