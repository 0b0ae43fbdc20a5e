"""Which kernels of a trace take part, and which stay dense because nothing is known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._typing import PyTree, Where
from jaxsparse.tracing import Kernel, Trace
from jaxsparse.tree import default_where, leaves_with_paths, select


def selected_kernels(
    trace: Trace,
    params: PyTree,
    where: Where = None,
    check: Callable[[dict[str, Kernel]], dict[str, str]] | None = None,
) -> tuple[dict[str, Kernel], dict[str, str]]:
    """The kernels of a trace that take part."""
    named = leaves_with_paths(params)
    if where is None:
        wanted = {path for path, leaf in named if _by_default(trace, path, leaf)}
    else:
        chosen = jax.tree.leaves(select(params, where))
        wanted = {path for path, take in zip(trace.paths, chosen, strict=True) if take}
    lost = {u: unread.reason for unread in trace.unfollowed for u in unread.paths}
    reasons: dict[str, str] = {}
    for path, leaf in named:
        if path not in wanted or path in trace.kernels:
            continue
        if path in lost:
            reasons[path] = f"{lost[path]} Or leave it out with `where`."
        elif default_where(path, leaf):  # by its looks it could be a kernel
            lines = trace.lookups.get(path)
            how = f": it is looked up at {lines[0]}" if lines else ""
            end = f"no data is contracted with it{how}."
            said = f"{path} is selected, but {end} Leave it out with `where`."
            reasons[path] = f"{path}: {end}" if where is None else said
    kernels = {p: kernel for p, kernel in trace.kernels.items() if p in wanted}
    reasons |= _without_real_rows(trace, kernels)
    if check is not None:
        rest = {p: kernel for p, kernel in kernels.items() if p not in reasons}
        reasons |= check(rest)
    if reasons and where is not None:
        raise ValueError(next(iter(reasons.values())))
    kernels = {p: kernel for p, kernel in kernels.items() if p not in reasons}
    if not kernels:
        why = "".join(f" {reason}" for reason in list(reasons.values())[:1])
        raise ValueError(
            f"None of the selected parameters is a kernel: {sorted(wanted)[:8]}. The "
            f"model's kernels are {list(trace.kernels)[:8]}.{why}"
        )
    return kernels, reasons


def _by_default(trace: Trace, path: str, leaf: Any) -> bool:
    """By use; what was not followed by its name, so that it is not passed over."""
    if path in trace.kernels or path in trace.lookups:
        return trace.where(path, leaf)
    return default_where(path, leaf)


def _without_real_rows(trace: Trace, kernels: dict[str, Kernel]) -> dict[str, str]:
    found = {}
    for path, kernel in kernels.items():
        for site in (reading.site for reading in kernel.readings):
            met = trace.nodes[site.address].visit.invars[site.other].aval.dtype
            if jnp.issubdtype(met, np.complexfloating):
                found[path] = (
                    f"{path}: it meets complex numbers at {site.source}, and "
                    "statistics are of real ones. Leave it out with `where`."
                )
    return found
