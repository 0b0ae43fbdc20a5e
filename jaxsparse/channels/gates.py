"""Gates of channels: numbers that multiply them where kernels read them."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._host import on_host
from jaxsparse._typing import Array, PyTree, Tree
from jaxsparse.channels._score import slices_that_count
from jaxsparse.channels.scaling import factors_of
from jaxsparse.channels.slices import Slices
from jaxsparse.coupling.drop import Drop, drop_of
from jaxsparse.coupling.grouping import Group, check_by_channel, check_groups
from jaxsparse.tree import map_with_path, nearest


def scale_channels(
    groups: Mapping[str, Group],
    params: Tree,
    gates: Mapping[str, Any],
    *,
    roles: Collection[str] | None = None,
) -> Tree:
    """Multiply channels by gates, in the parameters.

    A gate multiplies its channel where kernels read it: the members of the group with
    the role "input". So the nonlinearity and the norm before have no part in it, and
    the gate has a derivative also where it is 0 and its channel gives nothing. A group
    that no kernel reads (the width of queries and keys) has its gates on the kernels
    that produce it, on both sides of the product, where a gate counts twice.

    With gates of 0 and 1 the model is the one that `js.narrowing.narrow` makes without
    the closed channels, unless a norm runs over the channels of a group (LayerNorm over
    the width of a residual stream): it counts channels that are closed behind it. For
    such groups take `roles=("output", "other")`, which gates what produces them.

    Args:
      groups: from `js.coupling.groups`.
      params: the parameters.
      gates: `[*copies, size]` by the groups' names; groups without gates stay.
      roles: the members of the groups that are multiplied, some of "input", "output",
        "batch" and "other"; by default as said.

    Returns:
      Parameters of the same structure and types, exactly 0 where a gate is 0. Products
      are taken in float32 at least.

    Raises:
      ValueError: gates of a group that is unknown or not prunable, or of another shape;
        parameters that do not fit the groups.
      TypeError: gates that are no arrays of floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.array([[1.0], [-9.0], [2.0]])}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> groups = js.coupling.groups(js.trace(apply_fn, params, jnp.ones((2, 4))))
      >>> gates = {"up[1]": jnp.array([1.0, 0.5, 0.0])}
      >>> js.channels.scale_channels(groups, params, gates)["down"].ravel().tolist()
      [1.0, -4.5, 0.0]
    """
    _checks.check_arrays(params=params)
    check_groups(groups)
    check_gates(groups, gates)
    if not gates:
        return params
    named = {name: groups[name] for name in gates}
    if roles is None:
        slices = gate_slices(named, params)
    else:
        slices = slices_that_count(named, params, _EVERYTHING, roles=roles)
    if set(slices) != set(gates):
        raise ValueError(
            f"groups: {sorted(set(gates) - set(slices))} have gates, and no members "
            "with a role that can be multiplied."
        )
    return gated(slices, params, {name: gates[name] for name in slices})


def drop_closed(gates: Mapping[str, Any]) -> Drop:
    """Return the channels whose gate is 0, for `js.narrowing.narrow`.

    All copies of a group (heads, experts, layers of a scan) lose equally many channels:
    as many as the copy with the fewest closed gates, the lower indices first.

    Args:
      gates: `[*copies, size]` by the groups' names: the hard gates of
        `js.masking.width_gates`, or any others.

    Returns:
      A `Drop`. Groups that lose nothing are left out.

    Raises:
      ValueError: a group of which all channels are closed, gates that are NaN.
      TypeError: gates whose values are not known (under jit), or that are no arrays.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.channels.drop_closed({"up[1]": jnp.array([1.0, 0.0, 1.0, 0.0])}).indices
      {'up[1]': array([1, 3], dtype=int32)}
    """
    _checks.check_mapping(gates=gates)
    for name, gate in gates.items():
        _checks.check_floats(**{f"gates[{name!r}]": gate})
        if not jnp.ndim(gate):
            raise ValueError(f"{name}: gates are `[*copies, size]`, got a scalar.")
    _checks.check_known("js.channels.drop_closed", gates=dict(gates))
    _checks.check_all_numbers(gates=dict(gates))
    closed = {name: on_host(gate) == 0 for name, gate in gates.items()}
    for name, marked in closed.items():
        if marked.all(-1).all():
            raise ValueError(
                f"{name}: the gates of all {marked.shape[-1]} channels are 0, and one "
                "of them has to stay."
            )
    return drop_of(closed)


def check_gates(groups: Mapping[str, Group], gates: Any) -> None:
    """Raises unless gates are those of prunable groups."""
    _checks.check_mapping(gates=gates)
    for name, gate in gates.items():
        if name not in groups:
            raise ValueError(
                f"{name}: gates name it, and there is no such group; the nearest: "
                f"{nearest(name, list(groups))}."
            )
        group = groups[name]
        if not group.prunable:
            why = "; ".join(map(str, group.reasons))
            raise ValueError(f"{name}: it has gates, but it is not prunable: {why}.")
        check_by_channel("gates", group, gate)


_EVERYTHING = lambda path, leaf: True


def gate_slices(groups: Mapping[str, Group], params: PyTree) -> dict[str, Slices]:
    """Where gates multiply: what kernels read, or what they make if none reads it."""
    check_groups(groups)
    members = {n: {m.role for m in g.members} for n, g in groups.items() if g.prunable}
    read = {n: groups[n] for n, roles in members.items() if "input" in roles}
    made = {
        n: groups[n]
        for n, roles in members.items()
        if "input" not in roles and "output" in roles
    }
    found: dict[str, Slices] = {}
    for part, role in ((read, "input"), (made, "output")):
        if part or not (read or made):
            found |= slices_that_count(
                part or groups, params, _EVERYTHING, roles=(role,)
            )
    return {name: found[name] for name in groups if name in found}


def gated(
    slices: Mapping[str, Slices], params: Tree, gates: Mapping[str, Array]
) -> Tree:
    """The parameters with each channel's slices times its gate."""
    factors = factors_of(slices, gates, params)
    gate = lambda path, w: _times(w, factors[path]) if path in factors else w
    return map_with_path(gate, params)


@jax.custom_jvp
def _times(w: Array, gate: Array) -> Array:
    # In float32 at least, so that the derivative by the gate is summed in it.
    wide = wide_dtype(w.dtype, gate.dtype)
    product = (w.astype(wide) * gate.astype(wide)).astype(w.dtype)
    return jnp.where(gate == 0, jnp.zeros((), w.dtype), product)


@_times.defjvp
def _(primals, tangents):
    (w, gate), (along_w, along_gate) = primals, tangents
    # By a gate of 0 too, as the product's.
    wide = wide_dtype(w.dtype, gate.dtype)
    moved = (w.astype(wide) * along_gate.astype(wide)).astype(w.dtype)
    return _times(w, gate), _times(along_w, gate) + moved
