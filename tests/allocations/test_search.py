import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.conftest import compilations as compilations
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js

SIZES = {"a": {"kernel": 100, "other": 60}, "b": 40, "c": 200}
TOTAL = 400
evolve = functools.partial(
    js.allocations.evolve,
    sizes=SIZES,
    sparsity=0.5,
    batches=[1.0, 2.0, 3.0],
    key=jax.random.key(0),
    levels=4,
    step=5,
    generations=40,
    offspring=16,
    stages=((4, 1), (1, 2)),
)


def towards(best):
    """The squared distance to known levels, in the order of the leaves."""

    def fitness(levels, batch):
        apart = zip(jax.tree.leaves(levels), best, strict=True)
        return batch * sum((l - b) ** 2 for l, b in apart)

    return fitness


def removed(sparsities, sizes):
    pairs = zip(jax.tree.leaves(sparsities), jax.tree.leaves(sizes), strict=True)
    return [js.patterns.removed_count(s, n) for s, n in pairs]


def test_it_finds_the_best_levels():
    best = (3, -4, 2, -1)
    found = evolve(towards(best))
    assert jax.tree.structure(found) == jax.tree.structure(SIZES)
    even = removed(jax.tree.map(lambda _: 0.5, SIZES), SIZES)
    expected = [n + 5 * l for n, l in zip(even, best, strict=True)]
    assert removed(found, SIZES) == expected


def test_it_is_as_good_as_trying_everything():
    """Levels that must add up to 0 cannot be those that are best one by one."""
    fitness = towards((4, 1, 2, 0))
    levels = itertools.product(range(-4, 5), repeat=4)
    least = min(fitness(l, 1.0) for l in levels if sum(l) == 0)
    seen = []
    evolve(fitness, batches=[1.0], watch=lambda *args: seen.append(args))
    assert seen[-1][2] == least
    assert [generation for generation, _, _ in seen] == list(range(40))


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 80), min_size=3, max_size=6),
    st.floats(0.1, 0.9),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_every_candidate_has_the_total_and_stays_in_its_range(
    sizes, sparsity, step, seed
):
    sizes = {f"w{i}": n for i, n in enumerate([30, 30, *sizes])}
    table = js.allocations.level_sparsities(sizes, sparsity, levels=3, step=step)
    total = js.patterns.removed_count(sparsity, sum(sizes.values()))
    tried = []

    def fitness(levels, batch):
        tried.append(levels)
        return sum(k * l for k, l in enumerate(levels.values()))

    found = js.allocations.evolve(
        fitness,
        sizes,
        sparsity,
        batches=[0],
        key=jax.random.key(seed),
        levels=3,
        step=step,
        generations=4,
        offspring=8,
        stages=((2, 1), (1, 1)),
    )
    for levels in tried:
        assert sum(levels.values()) == 0
        at = {k: table[k][level + 3] for k, level in levels.items()}
        assert all(0 <= s < 1 for s in at.values())
        counts = {k: js.patterns.removed_count(s, sizes[k]) for k, s in at.items()}
        assert sum(counts.values()) == total
        for k, level in levels.items():
            even = js.patterns.removed_count(table[k][3], sizes[k])
            assert counts[k] == even + step * level
            assert counts[k] < sizes[k] or level <= 0  # none is emptied
    assert sum(removed(found, sizes)) == total
    assert found in [{k: table[k][l + 3] for k, l in t.items()} for t in tried]


def test_a_stage_judges_what_the_one_before_left_and_the_last_one_the_parent_too():
    calls = []

    def fitness(levels, batch):
        calls.append((tuple(jax.tree.leaves(levels)), batch))
        return sum(abs(l) for l in jax.tree.leaves(levels))

    stages = ((4, 1), (2, 2), (1, 3))
    evolve(fitness, generations=1, stages=stages)
    assert len(calls) == 16 * 1 + 4 * 2 + (2 + 1) * 3
    first = [genes for genes, _ in calls[:16]]
    assert len(set(first)) == 16
    assert (0, 0, 0, 0) not in first
    second = {genes for genes, _ in calls[16:24]}
    size = lambda genes: sum(map(abs, genes))
    assert sorted(map(size, second)) == sorted(map(size, first))[:4]
    assert {genes for genes, _ in calls[24:]} - second == {(0, 0, 0, 0)}
    assert {batch for _, batch in calls[24:]} == {1.0, 2.0, 3.0}


def test_the_parent_stays_until_something_is_better():
    level = lambda levels, batch: 1.0
    found = evolve(level)
    assert removed(found, SIZES) == [50, 30, 20, 100]
    seen = []
    evolve(towards((3, -4, 2, -1)), watch=lambda i, l, f: seen.append(f), batches=[1.0])
    assert all(after <= before for before, after in itertools.pairwise(seen))


def test_a_nan_is_the_worst():
    def fitness(levels, batch):
        level = levels["b"]
        return math.nan if level != 0 else -levels["c"]

    found = evolve(fitness)
    assert removed(found, SIZES)[2:] == [20, 120]


def test_it_depends_on_the_key_and_on_nothing_else():
    fitness = towards((3, -4, 2, -1))
    few = functools.partial(evolve, fitness, generations=2)
    assert few() == few()
    others = [few(key=jax.random.key(seed)) for seed in range(1, 5)]
    assert any(other != few() for other in others)


def test_a_jitted_fitness_compiles_once(compilations):
    rng = np.random.default_rng(0)
    scores = {k: jnp.asarray(rng.random((1, 40)), jnp.float32) for k in "ab"}
    sizes = dict.fromkeys("ab", 40)
    table = js.allocations.level_sparsities(sizes, 0.5, levels=4, step=2)
    table = jax.tree.map(jnp.asarray, table)

    @jax.jit
    def judged(levels, scores):
        sparsities = jax.tree.map(lambda t, l: t[l + 4], table, levels)
        masks = js.patterns.masks(scores, sparsities)
        return jnp.sum(masks["a"]) - jnp.sum(masks["b"])

    with compilations() as seen:
        found = js.allocations.evolve(
            lambda levels, batch: judged(levels, scores),
            sizes,
            0.5,
            batches=[0],
            key=jax.random.key(0),
            levels=4,
            step=2,
            generations=6,
            offspring=4,
            stages=((1, 1),),
        )
    assert seen.of("judged") == 1
    assert found == {"a": 0.7, "b": 0.3}


# Bad input.


@pytest.mark.parametrize(
    "stages",
    [(), ((8, 1),), ((2, 1), (4, 1), (1, 1)), ((32, 1), (1, 1))],
    ids=["none", "not one at the end", "growing", "more than children"],
)
def test_stages_that_do_not_narrow_down_are_refused(stages):
    with pytest.raises(ValueError, match="stages are"):
        evolve(towards((0,) * 4), stages=stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "no batches"),
        ({"step": 0}, "step must be at least 1"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"generations": 0}, "generations must be at least 1"),
        ({"stages": ((1, 0),)}, "batches of a stage must be at least 1"),
        ({"sparsity": 1.0}, "sparsity must lie in"),
        ({"sparsity": 0.0}, "no two of the 4 parameters"),
        ({"step": 150}, "Choose a smaller step"),
        ({"sizes": {"a": 10}}, "no two of the 1 parameters"),
        ({"sizes": {"a": {"b": 0}, "c": 9}}, "sizes: a/b must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evolve(towards((0,) * 4), **options)


def test_sizes_that_are_arrays_are_refused():
    with pytest.raises(TypeError, match="sizes: w must be an integer"):
        js.allocations.level_sparsities({"w": jnp.ones(3)}, 0.5, levels=1, step=1)
