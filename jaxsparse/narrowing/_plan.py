"""From a drop specification to what is kept of each axis, checked."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxsparse import _checks
from jaxsparse.coupling.drop import Drop
from jaxsparse.coupling.grouping import NEVER, Group, found_in
from jaxsparse.narrowing._cut import Cut
from jaxsparse.narrowing._resize import Norms, Positions
from jaxsparse.primitives import axes as algebra
from jaxsparse.tracing import Trace


class Plan(NamedTuple):
    """A checked specification."""

    drop: Drop  # the specification, with sizes
    cut: Cut  # what is kept of each axis of the trace


def plan(
    trace: Trace,
    drop: Drop | Mapping[str, Any],
    *,
    allow: Collection[str] = (),
    norms: Norms = "masked",
    positions: Positions = "slice",
    masks: bool = False,
) -> Plan:
    """Checks a specification against a trace."""
    _checks.check_choice(("masked", "resized"), norms=norms)
    _checks.check_choice(("slice", "renumber"), positions=positions)
    if not isinstance(drop, Drop):
        _checks.check_mapping(made_by="or js.channels.drop_lowest(...)", drop=drop)
    found = trace.once(found_in)
    sizes = drop.sizes if isinstance(drop, Drop) else {}
    indices = drop.indices if isinstance(drop, Drop) else drop
    allowed = {*allow} - NEVER - {"fixed"}
    if norms == "resized":
        allowed |= {"zeros"}
    if masks:
        allowed |= {"zeros", "fixed"}
    kept, copies, whole, whole_sizes = {}, {}, {}, {}
    for name, gone in indices.items():
        if name not in found:
            raise ValueError(_unknown(name, found))
        group, leaf = found[name]
        if sizes.get(name, group.size) != group.size:
            raise ValueError(
                f"{name}: the drop was made for a group of {sizes[name]} indices, here "
                f"it has {group.size}: it is of another model."
            )
        gone = _indices(group, gone)
        if not gone.size:
            continue
        if group.flags - allowed:
            why = "\n  ".join(str(r) for r in group.reasons if r.flag not in allowed)
            lacks = group.flags - allowed
            hint = f"\nallow={sorted(lacks)} takes them anyway."
            raise ValueError(
                f"{name}: its indices may not be dropped:\n  {why}"
                + ("" if lacks & {*NEVER, "fixed"} else hint)
            )
        keep = np.ones((*group.copies, group.size), bool)
        np.put_along_axis(keep, gone, False, axis=-1)
        kept[leaf] = keep
        copies[leaf] = tuple(found[b][1] for b in group.batched_by)
        whole[name], whole_sizes[name] = np.sort(gone, axis=-1), group.size
    return Plan(Drop(whole, whole_sizes), Cut(kept, copies))


def like(first: Cut, trace: Trace, cut: Cut, at: Trace) -> Cut:
    """The cut of another trace of a model, with parameters of the same sizes.

    For inputs of another shape a model may leave out a parameter, or an operation that
    couples it with others: what it lost with them it has lost nonetheless.
    """
    kept, copies = dict(cut.kept), dict(cut.copies)
    for path, dims in trace.dims.items():
        for axis, new in enumerate(at.dims[path]):
            node, size = algebra.find(new), first.size(dims[axis])
            if cut.size(node) == size or node.parts:
                continue
            stays = first.positions(dims)[axis]
            if stays.size == size:  # the same in all copies
                kept[node] = np.isin(np.arange(node.size), stays)
                copies[node] = ()
    return Cut(kept, copies)


def _unknown(name: str, found: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, found, n=3, cutoff=0.3)
    return (
        f"{name}: not a group of this model. Similar: {', '.join(close) or 'none'}; "
        "js.coupling.groups(trace) lists them all."
    )


def _indices(group: Group, gone: Any) -> np.ndarray:
    """The indices `[*copies, k]`, each once and within the group."""
    name, gone = group.name, np.asarray(list(gone) if isinstance(gone, range) else gone)
    if not gone.size:
        return np.zeros((*group.copies, 0), np.int64)
    if not np.issubdtype(gone.dtype, np.integer):
        raise ValueError(
            f"{name}: expected integer indices, got {gone.dtype}. A mask becomes "
            "indices by np.flatnonzero(~mask)."
        )
    try:
        gone = np.broadcast_to(gone, (*group.copies, gone.shape[-1]))
    except (ValueError, IndexError):
        raise ValueError(
            f"{name}: expected indices of shape [k]"
            + (f" or {[*group.copies, 'k']}" if group.copies else "")
            + f", got {list(gone.shape)}."
        ) from None
    if gone.min() < 0 or gone.max() >= group.size:
        raise ValueError(
            f"{name}: has the indices 0 to {group.size - 1}, got {gone.min()} to "
            f"{gone.max()}."
        )
    gone = np.sort(gone, axis=-1)
    if (twice := gone[..., 1:][np.diff(gone, axis=-1) == 0]).size:
        raise ValueError(
            f"{name}: an index is given twice, {twice[0]} first. Name each once."
        )
    if gone.shape[-1] == group.size:
        raise ValueError(
            f"{name}: all {group.size} indices would be dropped; keep at least one. "
            "Whole blocks are removed by js.depth.remove_blocks."
        )
    return gone.astype(np.int64)
