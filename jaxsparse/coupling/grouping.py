"""`groups`: which axes of which parameters must lose the same indices together."""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxsparse import _checks
from jaxsparse.coupling.copies import batches
from jaxsparse.coupling.zeros import Masked, masked_in
from jaxsparse.primitives import axes as algebra
from jaxsparse.program import inner
from jaxsparse.tracing import Kernel, Trace

Role = Literal["input", "output", "batch", "other"]


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter, or the part of it that belongs to a group.

    Attributes:
      path: the parameter's path.
      axis: which of its axes.
      index: `[n]`, for each position along the axis the group's channel there, -1 where
        it has none.
      copies: for each group that batches this one, its axis in the parameter, and its
        channel at each position there.
      role: what the axis is to a kernel; "other" for biases and scales.
    """

    path: str
    axis: int
    index: np.ndarray
    copies: tuple[tuple[int, np.ndarray], ...]
    role: Role


class Reason(NamedTuple):
    """The reason for a flag of a group.

    Attributes:
      flag: one of `Group.flags`.
      detail: what happens to the axis.
      source: the line of the model, where it is one equation.
    """

    flag: str
    detail: str
    source: str

    def __str__(self) -> str:
        at = f" at {self.source}" if self.source else ""
        return f"{self.flag}: {self.detail}{at}"


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Channels that are kept or removed together in all members of a group.

    Attributes:
      name: the path and axis of the first kernel that has it as an output axis, or of
        its first member, as `"block_0/conv/kernel[3]"`. Where several groups share that
        axis it ends in the group's place, as `"attn/query/kernel[1.0]"`.
      size: the number of its channels.
      members: the axes of parameters that have its channels.
      batched_by: the groups (heads, experts, layers of a scan, groups of a convolution)
        of which each channel has a copy of this group, which may lose its own channels.
      copies: the sizes of these groups.
      flags: "input", "output": an axis of the model's inputs or outputs. "gathered": it
        is looked up by index. "sorted": data determines its order. "position": its
        positions are used as numbers. "layer": a scan runs along it. "frozen": a
        primitive fixes the size, or the trace cannot follow it. "fixed": a foreign
        kernel (see `js.trace(..., rules=)`) has its size; it can be masked and not
        narrowed. "zeros": masked channels still act (a softmax, a maximum).
        "nonfinite": masked channels make NaN or Inf (0 / 0, log 0), in the result or in
        gradients. "unread": the traced function reads none of its parameters. Most
        groups have none.
      reasons: for each flag its cause and the line of the model.
      allowed: the flags that the caller has allowed.
      key: equal for isomorphic groups, which have the same number of axes of the same
        kinds of parameters.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    batched_by: tuple[str, ...]
    copies: tuple[int, ...]
    flags: frozenset[str]
    reasons: tuple[Reason, ...]
    allowed: frozenset[str]
    key: Any

    @property
    def zero_invariant(self) -> bool:
        """Whether masked channels do not change the result."""
        return not self.flags & {"zeros", "nonfinite"}

    @property
    def prunable(self) -> bool:
        """Whether its channels can be removed: no flag forbids it."""
        return not self.flags - self.allowed


FLAGS = frozenset({
    "input",
    "output",
    "gathered",
    "sorted",
    "position",
    "layer",
    "frozen",
    "fixed",
    "unread",
    "zeros",
    "nonfinite",
})
NEVER = frozenset({"frozen", "gathered"})  # no one can take the responsibility


class Groups(Mapping[str, Group]):
    """Groups by name, in the order of the parameters; printed as a table."""

    def __init__(self, groups: Mapping[str, Group]):
        self._groups = dict(groups)

    def __getitem__(self, name: str) -> Group:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def prunable(self) -> "Groups":
        """The groups that may lose channels."""
        return Groups({name: g for name, g in self.items() if g.prunable})

    def __repr__(self) -> str:
        return f"<{len(self)} groups, {len(self.prunable)} prunable>"

    def __str__(self) -> str:
        width = max([len(name) for name in self] + [5])
        rows = [f"{'group':{width}}  {'size':>6} {'axes':>5}  copies      why not"]
        for name, g in self.items():
            copies = "x".join(map(str, g.copies))
            why = "" if g.prunable else "; ".join(map(str, g.reasons))
            row = f"{name:{width}}  {g.size:6} {len(g.members):5}  {copies:10}  {why}"
            rows.append(row.rstrip())
        return "\n".join(rows)


def groups(trace: Trace, *, allow: Collection[str] = ()) -> Groups:
    """Find which axes of which parameters must lose the same channels.

    Two axes are coupled if some operation of the model matches them: it adds or
    multiplies their arrays entry by entry, contracts them with each other, reshapes or
    joins them. Each leaf of the axes of the trace is a group. Heads, the width of a
    head, experts, channels of grouped convolutions and layers of a scan are groups of
    their own, whichever way the model writes them.

    Complexity: linear in the number of equations and their rank, whatever the widths.

    Differs from Torch-Pruning (Fang et al. 2023, arXiv:2301.12900), which follows index
    lists through the autograd graph of modules that it knows, and assumes that others
    are elementwise. Here unknown operations freeze an axis, and `Group.reasons` say
    where.

    Args:
      trace: of `js.trace`.
      allow: flags of `Group` that do not forbid removal: `{"position"}` for the width
        of heads with rotary embeddings, `{"layer"}` for the layers of a scan,
        `{"zeros"}` for groups whose masked channels still act, `{"nonfinite"}` for
        those that make NaN where they are masked but can be narrowed. "frozen" and
        "gathered" axes can never be narrowed.

    Returns:
      All groups of more than one channel, prunable or not.

    Raises:
      ValueError: an unknown flag.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> trace = js.trace(apply_fn, params, jnp.ones((2, 4)))
      >>> found = js.coupling.groups(trace)
      >>> list(found), list(found.prunable)
      (['up[1]', 'down[1]', 'up[0]'], ['up[1]'])
      >>> [(m.path, m.axis, m.role) for m in found["up[1]"].members]
      [('down', 0, 'input'), ('up', 1, 'output')]
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    allowed = frozenset(allow)
    if allowed - FLAGS or allowed & NEVER:
        raise ValueError(
            f"allow={sorted(allowed)}: expected some of {sorted(FLAGS - NEVER)}."
        )
    return Groups({
        name: dataclasses.replace(group, allowed=allowed) if allowed else group
        for name, (group, _) in trace.once(found_in).items()
    })


def check_groups(groups: Any) -> None:
    """Raises a TypeError unless `groups` are groups by name."""
    _checks.check_mapping(Group, "js.coupling.groups(trace)", groups=groups)


def check_by_channel(what: str, group: Group, x: Any) -> None:
    """Raises unless there is a floating-point number for each channel of a group."""
    _checks.check_floats(**{f"{what}[{group.name!r}]": x})
    if np.shape(x) != (*group.copies, group.size):
        raise ValueError(
            f"{group.name}: {what} of shape {np.shape(x)} for a group of "
            f"{(*group.copies, group.size)} (copies, size)."
        )


Found = dict[str, tuple[Group, algebra.Axis]]


def found_in(trace: Trace) -> Found:
    """All groups of a trace, each with its leaf."""
    places = _places(trace)
    covering, masked, read = batches(trace), trace.once(masked_in), _read(trace)
    names = {
        x: next((p for p in found if p.role == "output"), found[0]).name
        for x, found in places.items()
    }
    result: Found = {}
    for x, found in places.items():
        batched = tuple(b for b in covering.get(x, ()) if b in places)
        members = tuple(
            Member(p.path, p.axis, p.index, _copies(p, batched, places), p.role)
            for p in found
        )
        reasons = _reasons(x, masked, x in read)
        kinds = collections.Counter(
            (len(trace.dims[m.path]), m.axis, m.role) for m in members
        )
        result[names[x]] = (
            Group(
                names[x],
                x.size,
                members,
                tuple(names[b] for b in batched),
                tuple(b.size for b in batched),
                frozenset(r.flag for r in reasons),
                reasons,
                frozenset(),
                tuple(sorted(kinds.items())),
            ),
            x,
        )
    return result


def _read(trace: Trace) -> set[algebra.Axis]:
    """The leaves that some equation meets that does something itself, or a scan."""
    met = {tuple(trace.layers.values())}
    for found in trace.nodes.values():
        if not inner(found.visit):
            met.update(found.ins)
    axes = {algebra.find(axis) for dims in met for axis in dims}
    read = {x for node in axes for x in algebra.leaves(node)}
    # What comes out as it came in is flagged as a result.
    outs = (x for dims in trace.dims.values() for d in dims for x in algebra.leaves(d))
    return read | {x for x in outs if "output" in x.flags}


class _Place(NamedTuple):
    """One axis of one parameter that a leaf lies along; the part if there are more."""

    path: str
    axis: int
    part: int | None
    index: np.ndarray
    role: Role

    @property
    def name(self) -> str:
        part = "" if self.part is None else f".{self.part}"
        return f"{self.path}[{self.axis}{part}]"


_Places = dict[algebra.Axis, list[_Place]]


def _places(trace: Trace) -> _Places:
    """Where each leaf lies, in the order of the parameters."""
    places: _Places = {}
    cache: dict[algebra.Axis, list[tuple[algebra.Axis, np.ndarray]]] = {}
    for path, dims in trace.dims.items():
        roles = _roles(trace.kernels.get(path), len(dims))
        for axis, node in enumerate(map(algebra.find, dims)):
            if node not in cache:
                cache[node] = [
                    (x, index.astype(np.int32))
                    for x, index in algebra.coordinates(node)
                ]
            several = len(cache[node]) > 1
            for k, (x, index) in enumerate(cache[node]):
                if x.size > 1:
                    role = _part(*roles[axis], index)
                    place = _Place(path, axis, k if several else None, index, role)
                    places.setdefault(x, []).append(place)
    return places


def _copies(
    place: _Place, batched: tuple[algebra.Axis, ...], places: _Places
) -> tuple[tuple[int, np.ndarray], ...]:
    """Where in a parameter the indices lie of the groups that batch one of its axes."""
    found = []
    for b in batched:
        own = [(p.axis, p.index) for p in places[b] if p.path == place.path]
        # Within the same axis if it is there (heads times their width), or elsewhere.
        own.sort(key=lambda other: other[0] != place.axis)
        found.append(own[0])
    return tuple(found)


_FLAG_OF = {"iota": "position"}
_DETAIL = {
    "input": "it is an axis of the model's inputs",
    "output": "it is an axis of the model's result",
    "gathered": "it is looked up by index",
    "sorted": "its entries are sorted",
    "position": "its positions are used as numbers",
    "layer": "a scan runs along it",
    "unread": "the traced function reads none of its parameters",
}


def _reasons(x: algebra.Axis, masked: Masked, read: bool) -> tuple[Reason, ...]:
    found = [] if read else [Reason("unread", _DETAIL["unread"], "")]
    for note, visit in x.notes.items():
        head, _, detail = note.partition(": ")
        flag = _FLAG_OF.get(head, head)
        if flag in FLAGS:
            source = visit.source if visit is not None else ""
            found.append(Reason(flag, detail or _DETAIL[flag], source))
    acting, lost, steep = (
        which.get(x) for which in (masked.acting, masked.lost, masked.steep)
    )
    if acting is not None:
        detail = f"masked indices still act in {acting.primitive.name}"
        found.append(Reason("zeros", detail, acting.source))
    if lost is not None:
        detail = f"masked indices make NaN or Inf in {_primitive(lost)}"
        found.append(Reason("nonfinite", detail, lost.source))
    elif steep is not None:
        name = _primitive(steep)
        detail = f"masked indices make NaN in gradients, in that of {name}"
        found.append(Reason("nonfinite", detail, steep.source))
    return tuple(found)


def _primitive(visit: Any) -> str:
    """The name of an equation's primitive, or of its function with its own rule."""
    program = visit.params.get("call_jaxpr")
    info = getattr(getattr(program, "jaxpr", program), "debug_info", None)
    own = visit.primitive.name.startswith("custom_") and info is not None
    return info.func_src_info.split(" ")[0] if own else visit.primitive.name


def _roles(
    kernel: Kernel | None, ndim: int
) -> Sequence[tuple[list[Role], tuple[int, ...]]]:
    """What the parts of each axis of a parameter are, and their sizes."""
    if kernel is None:
        return [([], ())] * ndim
    view = kernel.view
    names: list[Role] = ["other"] * len(view.split)
    for role in ("input", "output", "batch"):
        for i in getattr(view.axes, role):
            names[i] = role
    return [
        ([names[a] for a in parts], tuple(view.split[a] for a in parts))
        for parts in view.parts
    ]


def _part(names: list[Role], sizes: tuple[int, ...], index: np.ndarray) -> Role:
    """The part of an axis that an index follows, the fastest that does."""
    if len(names) <= 1:
        return names[0] if names else "other"
    whole = index.reshape(sizes)
    for part in reversed(range(len(names))):
        if np.any(np.diff(whole, axis=part) != 0):
            return names[part]
    return "other"
