"""What functions on the experts of an MoE check and share."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._host import on_host
from jaxsparse._typing import PyTree
from jaxsparse.tree import leaves_with_paths


def count_experts(experts: PyTree) -> int:
    """The size of the leading axis that all leaves have in common."""
    sizes = {path: jnp.shape(x)[:1] for path, x in leaves_with_paths(experts)}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(
            f"Every array needs the experts on its first axis, got first axes of "
            f"{ {path: s[0] if s else None for path, s in sizes.items()} }. Move them "
            "there (a router kernel `[d, E]` is transposed), and leave out what has "
            "no experts."
        )
    return next(iter(sizes.values()))[0]


def check_labels(labels: Any, n: int) -> tuple[np.ndarray, int]:
    """The labels as numpy integers, and how many groups they have."""
    if not _checks.is_concrete(labels):
        raise ValueError(
            "labels decide shapes, so they cannot be traced. Call this outside of jit, "
            "or close over the labels."
        )
    labels = on_host(labels)
    integer = labels.dtype.kind in "iu"
    groups = int(labels.max()) + 1 if integer and labels.size else 0
    if not integer or labels.shape != (n,) or {*labels.tolist()} != {*range(groups)}:
        raise ValueError(
            f"labels must be {n} integers, the group of each expert, and use every "
            f"number from 0 to the highest; got {labels}. "
            "np.unique(labels, return_inverse=True)[1] renumbers groups."
        )
    return labels, groups


def check_total(name: str, total: Any, sizes: list[int], at_least: Any) -> None:
    """Raises unless so many experts can remain in layers of these sizes."""
    _checks.check_positive_int(total, name=name)
    _checks.check_positive_int(at_least, name="at_least")
    if not sizes:
        raise ValueError(
            "There are no layers: expected a tree with an array for each layer, got "
            "one without leaves."
        )
    if at_least > min(sizes):
        raise ValueError(
            f"at_least is {at_least}, but a layer has {min(sizes)} experts."
        )
    if not at_least * len(sizes) <= total <= sum(sizes):
        raise ValueError(
            f"{name} is {total}, expected from {at_least * len(sizes)} (at_least="
            f"{at_least} in each of {len(sizes)} layers) to {sum(sizes)} (all experts)."
        )


def at(path: str) -> str:
    """Which leaf an error is about; nothing for a tree of one."""
    return f"[{path!r}]" if path else ""
