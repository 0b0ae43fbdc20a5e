"""PASER's clusters, shares, order and conflicts."""

import jax
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.contrib._paser import _shares
from jaxsparse.contrib._spectral import spectral_labels

KEY = jax.random.key(0)


def bundles(clusters, n, d, seed=0):
    """Directions of unit length around some of them, as sentence embeddings lie."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((clusters, d))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    x = np.repeat(centers, n, 0) + 0.6 * rng.standard_normal((clusters * n, d)) / d**0.5
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def agrees(labels, truth):
    """Whether two ways to number clusters are the same clusters."""
    pairs = set(zip(labels.tolist(), truth.tolist(), strict=True))
    return len(pairs) == len(set(labels.tolist())) == len(set(truth.tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_bundles_of_directions_are_found(seed):
    labels = spectral_labels(bundles(8, 40, 64, seed), 8, seed)
    assert agrees(labels, np.repeat(np.arange(8), 40))


def test_more_samples_than_landmarks():
    sizes = np.repeat(np.arange(6), 400)
    labels = spectral_labels(bundles(6, 400, 32), 6, 0)
    assert agrees(labels, sizes)


def test_the_largest_cluster_comes_first_and_equals_are_one():
    near = 0.1 * np.random.default_rng(0).standard_normal((14, 3))
    x = near + np.repeat([0.0, 3.0], [5, 9])[:, None]
    labels = spectral_labels(x, 2, 0)
    assert labels.tolist() == [1] * 5 + [0] * 9
    assert set(spectral_labels(np.ones((7, 3)), 3, 0).tolist()) == {0}


def run(divergences, labels, *, budget, costs=None, concepts=None):
    """With embeddings of which the clusters are known."""
    labels = np.asarray(labels)
    x = 10.0 * labels[:, None] + 0.01 * np.arange(len(labels))[:, None]
    costs = np.full(len(labels), np.e) if costs is None else costs
    return js.contrib.paser(
        *(x, divergences, costs),
        budget=budget,
        clusters=len(set(labels.tolist())),
        key=KEY,
        concepts=concepts,
    )


def test_the_damaged_get_more_and_the_worst_come_first():
    #             cluster of 4: mean 0.1       cluster of 5: mean 0.3
    damage = np.array([0.1, 0.25, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
    found = run(damage, [1] * 4 + [0] * 5, budget=4)
    np.testing.assert_allclose(found.degradations, [0.3, 0.1])
    assert found.budgets.tolist() == [3, 1]
    assert found.indices.tolist() == [8, 7, 6, 1]
    assert found.rejected.size == 0


def test_what_costs_more_comes_later():
    damage = np.array([0.3, 0.2, 0.4])
    costs = np.exp([1.0, 0.5, 4.0])  # worth 0.3, 0.4, 0.1
    assert run(damage, [0, 0, 0], budget=3, costs=costs).indices.tolist() == [1, 0, 2]


def test_pairs_of_known_concepts_that_never_met_conflict():
    concepts = [{"a", "b"}, {"c"}, {"a", "c"}, {"a", "b", "d"}, {"c", "e"}, {"b", "c"}]
    damage = np.arange(6.0)[::-1] + 1  # in this order
    found = run(damage, [0] * 6, budget=6, concepts=concepts)
    assert found.rejected.tolist() == [2, 5]  # a-c, b-c; d and e were new
    assert found.indices.tolist() == [0, 1, 3, 4]
    # The next one takes its place.
    found = run(damage, [0] * 6, budget=3, concepts=concepts)
    assert (found.indices.tolist(), found.rejected.tolist()) == ([0, 1, 3], [2])
    # A conflict holds over clusters: here the first three are another one.
    found = run(damage, [0] * 2 + [1] * 4, budget=6, concepts=concepts)
    assert set(found.rejected.tolist()) == {2, 5}


@pytest.mark.parametrize(
    ("budget", "worth", "most", "expected"),
    [
        (10, [1, 1], [9, 9], [5, 5]),
        (10, [3, 1], [9, 9], [8, 2]),  # 7.5 and 2.5: equal remainders, the first
        (10, [3, 1], [4, 9], [4, 6]),  # what is full gives to others
        (9, [1, 1, 1, 97], [9, 9, 9, 1], [3, 3, 2, 1]),
        (6, [1, 0, 0], [2, 3, 9], [2, 1, 3]),  # then by size
        (12, [5, 1], [9, 3], [9, 3]),
    ],
)
def test_shares_add_up(budget, worth, most, expected):
    found = _shares(budget, np.float64(worth), np.array(most))
    assert found.sum() == budget
    assert found.tolist() == expected


@pytest.mark.parametrize("seed", range(30))
def test_shares_of_any_numbers_add_up(seed):
    rng = np.random.default_rng(seed)
    most = rng.integers(1, 40, 7)
    budget = int(rng.integers(1, most.sum() + 1))
    worth = rng.random(7) * (rng.random(7) > 0.3)
    found = _shares(budget, worth, most)
    assert found.sum() == budget
    assert np.all((found >= 0) & (found <= most))
    free = (found < most) & (worth > 0)
    if free.sum() > 1 and found[free].sum() > 1:  # in proportion, to a whole number
        part = worth[free] / worth[free].sum() * found[free].sum()
        assert np.all(abs(found[free] - part) <= free.sum())


def test_the_same_key_gives_the_same_choice():
    x, rng = bundles(3, 20, 16), np.random.default_rng(1)
    given = x, rng.random(60), rng.integers(9, 99, 60)
    options = {"budget": 12, "clusters": 3}
    one, two = (js.contrib.paser(*given, **options, key=KEY) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(set(one.indices.tolist())) == 12 == one.budgets.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergences": np.zeros(3)}, "nothing to recover"),
        ({"divergences": [0.1, np.nan, 0.2]}, "1 entries are NaN"),
        ({"divergences": [0.1, -0.1, 0.2]}, "0 or more, got -0.1"),
        ({"divergences": [0.1, 0.2]}, "2 samples, and there are 3 embeddings"),
        ({"costs": [3.0, 1.0, 2.0]}, "costs must be above 1"),
        ({"budget": 4}, "budget is 4, and there are 3 samples"),
        ({"clusters": 4}, "clusters is 4, and there are 3 samples"),
        ({"concepts": [{"a"}]}, "1 sets of them, and there are 3"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {
        "embeddings": np.eye(3),
        "divergences": [0.1, 0.2, 0.3],
        "costs": [9.0] * 3,
        "budget": 2,
        "clusters": 2,
        "key": KEY,
    } | change
    positional = [given.pop(k) for k in ("embeddings", "divergences", "costs")]
    with pytest.raises(ValueError, match=message):
        js.contrib.paser(*positional, **given)
