"""Allocations from shapes alone: uniform with exceptions, and Erdos-Renyi-Kernel."""

import math
from collections.abc import Callable, Mapping

import jax

from jaxsparse import _checks
from jaxsparse._typing import PyTree, Where
from jaxsparse.tree import (
    AxesRule,
    leaves_with_paths,
    matching,
    resolve_axes,
    select,
)

Exceptions = Mapping[str, float] | None
"""Sparsities by path or regular expression; the first that matches wins."""


def uniform(
    params: PyTree,
    sparsity: float,
    *,
    where: Where = None,
    exceptions: Exceptions = None,
) -> PyTree:
    """Give every selected parameter the same sparsity, apart from exceptions.

    Parameters named in `exceptions` get their own sparsity. The others share what
    remains, so `sum n_l s_l = s * sum n_l` holds over all selected parameters.

    Differs from JaxPruner and RigL, where an exception shifts the total: there 80 %
    with a dense first layer is less than 80 %.

    Args:
      params: the parameters; only their shapes are read.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      where: which parameters take part; see `jaxsparse.tree.select`.
      exceptions: sparsities by path or regular expression, as `{r"^conv_0/": 0.0}`.

    Returns:
      A tree of Python floats with the structure of `params`, 0.0 where not selected.

    Raises:
      ValueError: a sparsity outside [0, 1), a rule that matches nothing, or
        exceptions that leave the others an impossible sparsity.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 30))}
      >>> js.allocations.uniform(params, 0.6)
      {'a': 0.6, 'b': 0.6}
      >>> js.allocations.uniform(params, 0.6, exceptions={"a": 0.0})["b"]
      0.8
    """
    _checks.check_arrays(abstract=True, params=params)
    return _allocate(params, sparsity, where, exceptions, lambda path, leaf: None)


def erk(
    params: PyTree,
    sparsity: float,
    *,
    where: Where = None,
    exceptions: Exceptions = None,
    axes: AxesRule = None,
    power: float = 1.0,
) -> PyTree:
    """Allocate by Erdos-Renyi-Kernel: the wider a layer, the sparser.

    The density of a layer is `eps * (sum of dims / product of dims) ** power`, where
    `eps` meets the total. A layer whose density would exceed 1 stays dense, and `eps`
    is found again for the others. Evci et al. (2020, arXiv:1911.11134).

    Differs from the reference implementations, which round each layer's number of
    zeros down before `eps` is found: here the equation is solved as it stands.

    Args:
      params: the parameters; only their shapes are read.
      sparsity: the fraction to remove over all selected parameters, in [0, 1).
      where: which parameters take part; see `jaxsparse.tree.select`.
      exceptions: sparsities by path or regular expression; the others still meet the
        total.
      axes: states batch axes (stacked layers, experts), which are no dimension of a
        layer; see `jaxsparse.tree.Axes`.
      power: values below 1 come closer to uniform.

    Returns:
      A tree of Python floats with the structure of `params`, 0.0 where not selected.

    Raises:
      ValueError: as for `uniform`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"a": jnp.ones((10, 10)), "b": jnp.ones((100, 100))}
      >>> {k: round(s, 4) for k, s in js.allocations.erk(params, 0.9).items()}
      {'a': 0.0818, 'b': 0.9082}
    """
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_number(power=power)
    stated = resolve_axes(params, axes)

    def density(path: str, leaf) -> float:
        batch = stated[path].batch if path in stated else ()
        dims = [n for axis, n in enumerate(leaf.shape) if axis not in batch]
        return (sum(dims) / math.prod(dims)) ** power

    return _allocate(params, sparsity, where, exceptions, density)


def _allocate(
    params: PyTree,
    sparsity: float,
    where: Where,
    exceptions: Exceptions,
    relative_density: Callable,
) -> PyTree:
    """Sparsities that meet the total, with densities in given relations.

    A relative density of None means that all sparsities are equal.
    """
    _checks.check_sparsity(sparsity)
    sparsity = float(sparsity)
    named = leaves_with_paths(params)
    selected = jax.tree.leaves(select(params, where))
    leaves = {p: x for (p, x), take in zip(named, selected, strict=True) if take}
    fixed = _excepted(list(leaves), exceptions)
    size = {p: math.prod(x.shape) for p, x in leaves.items()}
    free = {p: x for p, x in leaves.items() if p not in fixed and size[p]}
    kept = (1 - sparsity) * sum(size.values())
    kept -= sum((1 - s) * size[p] for p, s in fixed.items())
    room = sum(size[p] for p in free)
    possible = 0 < kept <= room * (1 + 1e-12) if free else abs(kept) <= 0.5
    if not possible:
        raise ValueError(
            f"A total sparsity of {sparsity:g} cannot be met: with the exceptions "
            f"{dict(exceptions or {})} the other {len(free)} parameters, {room:,} "
            f"weights, would have to keep {kept:,.0f}."
        )
    if fixed == {} and all(relative_density(p, x) is None for p, x in free.items()):
        found = dict.fromkeys(free, float(sparsity))
    else:
        weights = {p: relative_density(p, x) for p, x in free.items()}
        weights = {p: 1.0 if w is None else w for p, w in weights.items()}
        found = {p: 1 - d for p, d in _densities(weights, size, kept).items()}
    found |= fixed
    return jax.tree.unflatten(
        jax.tree.structure(params), [found.get(p, 0.0) for p, _ in named]
    )


def _densities(
    weights: dict[str, float], size: dict[str, int], kept: float
) -> dict[str, float]:
    """`min(1, eps * weight)` with the one `eps` that keeps the right number."""
    dense: set[str] = set()
    while True:
        rest = [p for p in weights if p not in dense]
        if not rest:
            return dict.fromkeys(weights, 1.0)
        budget = kept - sum(size[p] for p in dense)
        eps = budget / sum(weights[p] * size[p] for p in rest)
        over = {p for p in rest if eps * weights[p] > 1}
        if not over:
            return {p: 1.0 if p in dense else eps * weights[p] for p in weights}
        dense |= over


def _excepted(paths: list[str], exceptions: Exceptions) -> dict[str, float]:
    exceptions = {} if exceptions is None else exceptions
    _checks.check_mapping(exceptions=exceptions)
    for rule, value in exceptions.items():
        _checks.check_sparsity(value, name=f"exceptions[{rule!r}]")
    none = "none of the parameters that take part"
    found = matching(exceptions, paths, name="exceptions", none=none)
    return {path: float(value) for path, value in found.items()}
