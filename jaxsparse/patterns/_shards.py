"""How arrays are split under `shard_map`, from what the caller says."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxsparse import _checks
from jaxsparse._sharded import manual_axes, varying_axes, varying_is_known
from jaxsparse._typing import Array, PyTree
from jaxsparse.patterns._spec import NM, Pattern
from jaxsparse.ranking.shards import Split, names_along
from jaxsparse.tree import leaves_with_paths

AxisName = str | tuple[str, ...] | PyTree
"""Names of mesh axes, or a tree of `PartitionSpec`; see `jaxsparse.patterns.masks`."""


def splits_of(
    scores: PyTree, chosen: Sequence[tuple[str, Array]], axis_name: Any, pattern: Any
) -> list[Split]:
    """How each selected array is split over the devices that run this together."""
    manual = manual_axes()
    whole: list[Split] = [((),) * x.ndim for _, x in chosen]
    if not manual:
        return whole
    if axis_name is None:
        if not isinstance(pattern, NM):
            for path, x in chosen:
                _check_not_split(path, x, pattern, manual)
        return whole
    if _are_names(axis_name):
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        _check_names("axis_name", names, manual)
        return [_by_first_axis(x, names) for _, x in chosen]
    specs = _specs(scores, axis_name)
    return [_by_spec(path, x, specs[path], manual) for path, x in chosen]


def _are_names(axis_name: Any) -> bool:
    if isinstance(axis_name, PartitionSpec):
        return False
    several = isinstance(axis_name, tuple | list)
    return isinstance(axis_name, str) or (
        several and all(isinstance(n, str) for n in axis_name)
    )


def _check_not_split(
    path: str, x: Array, pattern: Pattern, manual: tuple[str, ...]
) -> None:
    varies = varying_axes(x)
    if varies:
        said = f"its scores differ along the mesh axes {sorted(varies)}"
    elif not varying_is_known(manual[0]):
        said = "JAX does not say whether they are shards (check_vma=False, or pmap)"
    else:
        return
    raise ValueError(
        f"{path}: {pattern} is selected by under shard_map over {manual}, and {said}. "
        "Each device would rank its own weights alone. If the parameters are sharded, "
        "pass axis_name= (the name, or the tree of PartitionSpecs that shard_map has "
        "as in_specs) to js.patterns.masks or js.prune_schedule; if each device holds "
        "a model of its own or all of one, pass axis_name=(). Gradients of one model "
        "have to be averaged over the mesh axis first."
    )


def _check_names(where: str, names: Sequence[str], manual: tuple[str, ...]) -> None:
    unknown = [n for n in names if n not in manual]
    if unknown:
        raise ValueError(
            f"{where}: {unknown} are no axes of the mesh that shard_map runs over, "
            f"which has {manual}."
        )


def _by_first_axis(x: Array, names: tuple[str, ...]) -> Split:
    if x.ndim == 0:
        return ()
    if names and varying_is_known(names[0]):
        varies = varying_axes(x)
        names = tuple(n for n in names if n in varies)
    return (names, *((),) * (x.ndim - 1))


def _specs(scores: PyTree, specs: PyTree) -> dict[str, PartitionSpec]:
    is_spec = lambda s: s is None or isinstance(s, PartitionSpec)
    if is_spec(specs):
        return {path: specs or PartitionSpec() for path, _ in leaves_with_paths(scores)}
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    filled = jax.tree.map(lambda s: 0, specs, is_leaf=is_spec)
    _checks.same_structure(filled, scores, name="axis_name", of="scores")
    named = zip(leaves_with_paths(scores), leaves, strict=True)
    return {path: spec or PartitionSpec() for (path, _), spec in named}


def _by_spec(
    path: str, x: Array, spec: PartitionSpec, manual: tuple[str, ...]
) -> Split:
    parts = [
        () if part is None else (part,) if isinstance(part, str) else tuple(part)
        for part in spec
    ]
    if len(parts) > x.ndim:
        raise ValueError(f"{path}: {spec} has more axes than shape {x.shape}.")
    split = (*parts, *[()] * (x.ndim - len(parts)))
    _check_names(f"{path}: {spec}", names_along(split, None), manual)
    return split


# Arithmetic with shards. Where nothing is split, it is the plain one.
