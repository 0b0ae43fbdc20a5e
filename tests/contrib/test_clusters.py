import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

import jaxsparse as js


def random_distances(seed, n=12, low=-1.0):
    """No two equal, of either sign, not those of points in any space."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(low, 1.0, (n, n)), 1)
    return upper + upper.T


def line(*places):
    places = np.asarray(places, np.float64)
    return abs(places[:, None] - places)


def partition(labels):
    labels = np.asarray(labels)
    return {frozenset(np.flatnonzero(labels == g).tolist()) for g in set(labels)}


def brute_force(d, clusters, threshold=np.inf):
    """Complete linkage from its definition: all pairs of clusters, all pairs within."""
    found = [(e,) for e in range(len(d))]
    while len(found) > clusters:
        far = {
            (a, b): max(d[i, j] for i in a for j in b)
            for a, b in itertools.combinations(found, 2)
        }
        a, b = min(far, key=far.__getitem__)
        if far[a, b] >= threshold:
            break
        found = [c for c in found if c not in (a, b)] + [a + b]
    return {frozenset(c) for c in found}


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_complete_linkage(seed):
    d = random_distances(seed)
    for clusters in range(1, 13):
        found = partition(js.contrib.cluster_experts(d, clusters=clusters))
        assert found == brute_force(d, clusters)
        shifted = hierarchy.linkage(
            squareform(d - d.min() * (1 - np.eye(12))), "complete"
        )
        scipys = hierarchy.fcluster(shifted, clusters, criterion="maxclust")
        assert found == partition(scipys)
    for threshold in (-0.5, 0.0, 0.4):
        found = js.contrib.cluster_experts(d, clusters=1, threshold=threshold)
        assert partition(found) == brute_force(d, 1, threshold)
        for cluster in partition(found):
            assert all(d[i, j] < threshold for i in cluster for j in cluster if i != j)


def test_experts_in_a_row_do_not_chain():
    # Each is nearer to the next than any two clusters are, yet the ends are far apart.
    d = line(0.0, 1.0, 1.9, 2.7, 3.4, 4.0)
    assert js.contrib.cluster_experts(d, clusters=2).tolist() == [0, 0, 1, 1, 1, 1]
    single = hierarchy.fcluster(hierarchy.linkage(squareform(d)), 2, "maxclust")
    assert partition(single) == {frozenset({0}), frozenset({1, 2, 3, 4, 5})}


def test_labels_are_numbered_by_their_lowest_expert_and_ties_go_to_it():
    assert js.contrib.cluster_experts(line(9, 0, 5, 0, 9), clusters=3).tolist() == [
        *(0, 1, 2, 1, 0)
    ]
    equal = np.ones((5, 5))
    assert js.contrib.cluster_experts(equal, clusters=4).tolist() == [0, 0, 1, 2, 3]


def test_the_total_over_layers_is_exact_and_one_threshold_holds_for_all():
    layers = {
        "a": random_distances(1),
        "b": 2 * random_distances(2, 7),
        "c": line(0, 9),
    }
    for total in range(3, 22):
        found = js.contrib.cluster_experts(layers, clusters=total)
        count = {name: len(set(labels)) for name, labels in found.items()}
        assert sum(count.values()) == total
        # What was merged last anywhere is nearer than what comes next anywhere else.
        heights = {
            name: hierarchy.linkage(
                squareform(d - d.min() * (1 - np.eye(len(d)))), "complete"
            )
            for name, d in layers.items()
        }
        heights = {name: h[:, 2] + layers[name].min() for name, h in heights.items()}
        merged = {n: h[: len(h) + 1 - count[n]] for n, h in heights.items()}
        waiting = {n: h[len(h) + 1 - count[n] :] for n, h in heights.items()}
        last = max((h.max() for h in merged.values() if h.size), default=-np.inf)
        following = min((h.min() for h in waiting.values() if h.size), default=np.inf)
        assert last < following + 1e-12
        for name, d in layers.items():
            assert partition(found[name]) == brute_force(d, count[name])


def test_every_layer_keeps_at_least_what_is_asked():
    layers = [0.01 * random_distances(1, low=0.1), random_distances(2, low=0.1)]
    found = js.contrib.cluster_experts(layers, clusters=14, at_least=4)
    assert [len(set(labels)) for labels in found] == [4, 10]
    found = js.contrib.cluster_experts(layers, clusters=8, at_least=4)
    assert [len(set(labels)) for labels in found] == [4, 4]
    found = js.contrib.cluster_experts(layers, clusters=24)
    assert [labels.tolist() for labels in found] == [[*range(12)]] * 2


def test_distances_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    router = rng.standard_normal((6, 9)).astype(np.float32)
    routed = (rng.random((50, 6)) < 0.4).astype(np.int32)
    together = routed.T @ routed
    r, a = router.astype(np.float64), together.astype(np.float64)
    np.fill_diagonal(a, 0)
    expected = 0.7 * np.linalg.norm(r[:, None] - r[None], axis=-1) - 1.5 * a / a.mean()
    got = js.contrib.expert_distances(
        router, together, router_weight=0.7, coactivation_weight=1.5
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, got.T, rtol=1e-6, atol=1e-6)
    alone = jax.jit(js.contrib.expert_distances)(router)
    expected = np.linalg.norm(r[:, None] - r[None], axis=-1) / np.linalg.norm(r)
    np.testing.assert_allclose(alone, expected, rtol=1e-5)
    # A router that picks one expert has nothing that acts together.
    top_1 = js.contrib.expert_distances(router, np.diag([5, 4, 3, 2, 1, 0]))
    np.testing.assert_allclose(top_1, np.linalg.norm(r[:, None] - r, axis=-1), 1e-5)
    half = jax.eval_shape(js.contrib.expert_distances, router.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


def experts(seed=0, n=6, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return {"up": draw(n, 3, 4), "down": {"kernel": draw(n, 4, 3), "bias": draw(n, 3)}}


def flat(tree):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def test_medoids_are_nearest_to_the_mean_over_all_weights():
    params, labels = experts(), np.array([0, 1, 0, 0, 1, 1])
    expected = []
    for g in (0, 1):
        members = np.flatnonzero(labels == g)
        w = flat(params)[members]
        expected.append(members[np.argmin(np.linalg.norm(w - w.mean(0), axis=1))])
    assert js.contrib.medoids(params, labels).tolist() == expected
    # The members of a pair are equally far; the lower index is taken, not what rounding
    # makes of it.
    for seed in range(8):
        pairs = np.array([0, 1, 2, 2, 1, 0])
        assert js.contrib.medoids(experts(seed), pairs).tolist() == [0, 1, 2]


def test_medoids_and_means_are_merged_as_one():
    params = experts()
    router = {"rows": np.eye(6, dtype=np.float32), "bias": np.arange(6, dtype="f4")}
    labels = np.array([0, 1, 0, 0, 1, 2])
    kept = js.contrib.medoids(params, labels)
    found = js.contrib.merge_clusters(params, router, labels, average_up_to=2)
    np.testing.assert_array_equal(flat(found.experts), flat(params)[kept])
    np.testing.assert_array_equal(flat(found.router), flat(router)[kept])
    found = jax.jit(
        lambda p, r: js.contrib.merge_clusters(p, r, labels, average_up_to=3)
    )(params, router)
    share = np.array([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]])
    share = share / share.sum(1, keepdims=True)
    np.testing.assert_allclose(flat(found.experts), share @ flat(params), atol=1e-6)
    np.testing.assert_allclose(flat(found.router), share @ flat(router), atol=1e-6)


@pytest.mark.parametrize("average_up_to", [0, 3])
def test_a_model_of_twins_computes_the_same(average_up_to):
    unique, twins = experts(n=3), np.array([0, 1, 2, 1, 0, 2])
    params = jax.tree.map(lambda x: x[twins], unique)
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((3, 3)).astype(np.float32)[twins]
    x = rng.standard_normal((20, 3))

    def model(params, rows):
        gates = np.exp(np.einsum("nd,ed->ne", x, rows))
        gates = gates / gates.sum(1, keepdims=True)
        h = np.maximum(np.einsum("nd,edf->nef", x, params["up"]), 0)
        y = np.einsum("nef,efd->ned", h, params["down"]["kernel"])
        return np.einsum("ne,ned->nd", gates, y + np.asarray(params["down"]["bias"]))

    labels = js.contrib.cluster_experts(js.contrib.expert_distances(rows), clusters=3)
    assert labels.tolist() == twins.tolist()
    found = js.contrib.merge_clusters(params, rows, labels, average_up_to=average_up_to)
    for got, wanted in zip(
        jax.tree.leaves(found.experts), jax.tree.leaves(unique), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_allclose(model(*found), model(params, rows), atol=1e-5)


def test_errors_say_what_is_expected():
    d = random_distances(0, 4)
    with pytest.raises(ValueError, match=r"distances has shape \(3, 4\)"):
        js.contrib.cluster_experts(d[:3], clusters=2)
    with pytest.raises(ValueError, match=r"distances\['b'\].*finite and symmetric"):
        js.contrib.cluster_experts({"a": d, "b": np.triu(d)}, clusters=2)
    with pytest.raises(ValueError, match="1 entries that are not finite"):
        js.contrib.cluster_experts(
            np.where(np.arange(16).reshape(4, 4) == 1, np.inf, d), clusters=2
        )
    with pytest.raises(ValueError, match=r"clusters is 3, expected from 4 .* to 8"):
        js.contrib.cluster_experts([d, d], clusters=3, at_least=2)
    with pytest.raises(ValueError, match="clusters is 5, expected from 1"):
        js.contrib.cluster_experts(d, clusters=5)
    with pytest.raises(ValueError, match="at_least is 5, but a layer has 4"):
        js.contrib.cluster_experts(d, clusters=4, at_least=5)
    with pytest.raises(ValueError, match="no layers"):
        js.contrib.cluster_experts([], clusters=4)
    with pytest.raises(ValueError, match="Is the router transposed"):
        js.contrib.expert_distances(np.ones((3, 4), np.float32), np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"expected \[experts, d\]"):
        js.contrib.expert_distances(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="router must be floating point"):
        js.contrib.expert_distances(np.ones((3, 4), np.int32))
    with pytest.raises(ValueError, match="The router has 3 rows for 6 experts"):
        js.contrib.merge_clusters(experts(), np.ones((3, 6), np.float32), np.arange(6))
    with pytest.raises(ValueError, match="labels must be 6 integers"):
        js.contrib.medoids(experts(), [0, 0, 2, 2, 2, 2])
