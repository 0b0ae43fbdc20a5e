"""An evolution over allocations, judged by the model itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import Array, PyTree
from jaxsparse.allocations._global import _below_one, round_to_weights
from jaxsparse.patterns import removed_count
from jaxsparse.tree import leaves_with_paths

Fitness = Callable[[PyTree, Any], Any]
"""`fitness(levels, batch) -> number`, smaller is better."""

Genes = tuple[int, ...]
"""The levels of a candidate, in the order of the leaves."""


def evolve(
    fitness: Fitness,
    sizes: PyTree,
    sparsity: float,
    *,
    batches: Sequence[Any],
    key: Array,
    levels: int = 8,
    step: int,
    generations: int = 400,
    offspring: int = 64,
    stages: Sequence[tuple[int, int]] = ((8, 1), (2, 8), (1, 32)),
    watch: Callable[[int, PyTree, float], None] | None = None,
) -> PyTree:
    """Improve sparsities by mutation and selection (EvoPress).

    A candidate is an integer level for each parameter: level l removes `l * step`
    weights more than uniform. A child is its parent after one to three switches; each
    switch takes one parameter a level up and another one down, so the total never
    changes. Each stage keeps fewer of a generation's children and uses more data; in
    the last stage the parent competes, too, and wins a draw. Sieberling et al. (2024,
    arXiv:2410.14649) use the divergence from the dense model's outputs as fitness.

    This function copies no weights: `fitness` gets levels. It may look up masks that
    were made before for each level of `level_sparsities`, or make them, as in the
    example: a jitted function takes levels as scalars and compiles once.

    Differs from the reference implementation, which evaluates equal children again.
    Here no child is evaluated twice in a generation, and a parameter that a level would
    empty has fewer levels.

    Args:
      fitness: `fitness(levels, batch)`, with a tree of Python ints like `sizes`. A NaN
        is the worst.
      sizes: a tree of the numbers of weights, without parameters that take no part.
      sparsity: the fraction to remove over all of them, in [0, 1).
      batches: the data; each stage of a generation draws some of them anew.
      key: a typed key, `jax.random.key(seed)`.
      levels: how many levels there are above and below uniform.
      step: the number of weights between two levels.
      generations: the number of generations.
      offspring: the number of children in a generation.
      stages: `(survivors, batches)` one after the other; the last has one survivor. A
        stage takes all batches where there are fewer.
      watch: called as `watch(generation, levels, fitness)` with the parent after each
        generation, and its mean fitness over the last stage's batches.

    Returns:
      A tree of Python floats in [0, 1) like `sizes`, whole numbers of weights that add
      up to `floor(sparsity * n + 1/2)`.

    Raises:
      ValueError: sizes that are not positive, no batches, stages that do not get
        smaller or do not end with 1, a step with which no parameter has two levels.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> scores = {"a": jnp.arange(100.0)[None], "b": 3 * jnp.arange(100.0)[None]}
      >>> sizes = {"a": 100, "b": 100}
      >>> table = js.allocations.level_sparsities(sizes, 0.5, levels=4, step=10)
      >>> table = jax.tree.map(jnp.asarray, table)
      >>> @jax.jit
      ... def lost(scores, levels):
      ...     sparsities = jax.tree.map(lambda t, l: t[l + 4], table, levels)
      ...     masks = js.patterns.masks(scores, sparsities)
      ...     parts = jax.tree.map(lambda s, m: jnp.sum(s * ~m), scores, masks)
      ...     return parts["a"] + parts["b"]
      >>> fitness = lambda levels, batch: lost(scores, levels) / batch
      >>> js.allocations.evolve(
      ...     fitness, sizes, 0.5, batches=[1.0], key=jax.random.key(0),
      ...     levels=4, step=10, generations=5, offspring=4, stages=((1, 1),))
      {'a': 0.7, 'b': 0.3}
    """
    _checks.check_callable(2, fitness=fitness)
    _checks.check_key(key)
    _check_options(batches, generations, offspring, stages)
    low, high, start = _ladder(sizes, sparsity, levels, step)
    up = {i for i, level in enumerate(high) if level > 0}
    down = {i for i, level in enumerate(low) if level < 0}
    if not up or not down or len(up | down) < 2:
        raise ValueError(
            f"With step={step} no two of the {len(start)} parameters can trade a level "
            f"(weights: {jax.tree.leaves(sizes)[:8]}). Choose a smaller step."
        )
    treedef = jax.tree.structure(sizes)
    seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    rng = np.random.default_rng(seed)

    def judge(candidates: list[Genes], count: int) -> list[tuple[float, int]]:
        drawn = rng.permutation(len(batches))[:count]
        mean = lambda genes: (
            sum(float(fitness(treedef.unflatten(genes), batches[i])) for i in drawn)
            / len(drawn)
        )
        values = [mean(genes) for genes in candidates]
        rank = lambda v: math.inf if math.isnan(v) else v
        return sorted((rank(v), i) for i, v in enumerate(values))

    parent: Genes = (0,) * len(start)
    for generation in range(generations):
        found = _children(parent, low, high, offspring, rng)
        for survivors, count in stages[:-1]:
            found = [found[i] for _, i in judge(found, count)[:survivors]]
        found = [parent, *found]  # first, and so the winner of a draw
        value, best = judge(found, stages[-1][1])[0]
        parent = found[best]
        if watch is not None:
            watch(generation, treedef.unflatten(parent), value)
    named = leaves_with_paths(sizes)
    return treedef.unflatten([
        _below_one((base + step * level) / n)
        for base, level, (_, n) in zip(start, parent, named, strict=True)
    ])


def level_sparsities(
    sizes: PyTree, sparsity: float, *, levels: int, step: int
) -> PyTree:
    """Return the sparsity of each level that `evolve` may ask for.

    Args:
      sizes: a tree of the numbers of weights.
      sparsity: the total, in [0, 1): the sparsity of level 0, up to rounding.
      levels: how many levels there are above and below it.
      step: the number of weights between two levels.

    Returns:
      A tree like `sizes` of float64 numpy vectors of length `2 * levels + 1`; level l
      is at `l + levels`. Levels that a parameter does not have (it would remove less
      than nothing or all it has) repeat the nearest one that it has.

    Raises:
      ValueError: sizes, levels or a step that are not positive integers.

    Example:
      >>> import jaxsparse as js
      >>> js.allocations.level_sparsities({"a": 10, "b": 4}, 0.5, levels=1, step=2)
      {'a': array([0.3, 0.5, 0.7]), 'b': array([0. , 0.5, 0.5])}
    """
    low, high, start = _ladder(sizes, sparsity, levels, step)
    every = np.arange(-levels, levels + 1)
    table = [
        np.minimum((base + step * np.clip(every, least, most)) / n, _below_one(1.0))
        for least, most, base, n in zip(
            low, high, start, jax.tree.leaves(sizes), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(sizes), table)


def _ladder(
    sizes: PyTree, sparsity: float, levels: int, step: int
) -> tuple[Genes, Genes, Genes]:
    """The least and greatest level of each parameter, and what level 0 removes."""
    _checks.check_positive_int(levels, name="levels")
    _checks.check_positive_int(step, name="step")
    if not jax.tree.leaves(sizes):
        raise ValueError(f"sizes must be a tree of numbers of weights, got {sizes!r}.")
    for path, n in leaves_with_paths(sizes):
        _checks.check_positive_int(n, name=f"sizes: {path}")
    shapes = jax.tree.map(lambda n: jax.ShapeDtypeStruct((n,), jnp.float32), sizes)
    leaves = jax.tree.leaves(sizes)
    # From the whole number that is to be removed, so that the sum cannot round apart.
    total = int(removed_count(sparsity, sum(leaves))) / max(1, sum(leaves))
    even = jax.tree.map(lambda _: _below_one(total), sizes)
    even = round_to_weights(shapes, even, where=".")
    start = [round(s * n) for s, n in zip(jax.tree.leaves(even), leaves, strict=True)]
    low = tuple(-min(levels, base // step) for base in start)
    high = tuple(
        max(0, min(levels, (n - 1 - base) // step))
        for base, n in zip(start, leaves, strict=True)
    )
    return low, high, tuple(start)


def _children(
    parent: Genes, low: Genes, high: Genes, count: int, rng: np.random.Generator
) -> list[Genes]:
    """At most so many different children of one parent, none equal to it."""
    found: dict[Genes, None] = {}
    for _ in range(8 * count):  # a small space may not have that many
        child = list(parent)
        for _ in range(min(rng.integers(1, 4, size=2))):
            up = [i for i, level in enumerate(child) if level < high[i]]
            down = [i for i, level in enumerate(child) if level > low[i]]
            i = rng.choice(up)
            others = [j for j in down if j != i]
            if others:
                child[i] += 1
                child[rng.choice(others)] -= 1
        if tuple(child) != parent:
            found[tuple(child)] = None
        if len(found) == count:
            break
    return list(found)


def _check_options(batches, generations, offspring, stages) -> None:
    _checks.check_positive_int(generations, name="generations")
    _checks.check_positive_int(offspring, name="offspring")
    if not isinstance(batches, Sequence) or isinstance(batches, str):
        raise TypeError(f"batches must be a list, got {_checks.shown(batches)}.")
    if not batches:
        raise ValueError("batches: there are no batches to judge by.")
    if not isinstance(stages, Sequence):
        raise TypeError(f"stages must be pairs (survivors, batches), got {stages!r}.")
    for stage in stages:
        if not isinstance(stage, Sequence) or len(stage) != 2:
            raise TypeError(
                f"stages must be pairs (survivors, batches), got {stage!r} among them."
            )
        survivors, count = stage
        _checks.check_positive_int(survivors, name="survivors of a stage")
        _checks.check_positive_int(count, name="batches of a stage")
    survivors = [offspring, *(s for s, _ in stages)]
    if not stages or survivors != sorted(survivors, reverse=True) or survivors[-1] != 1:
        raise ValueError(
            "stages are (survivors, batches), each with no more survivors than the one "
            f"before or than offspring={offspring}, and 1 in the last; got {stages}."
        )
