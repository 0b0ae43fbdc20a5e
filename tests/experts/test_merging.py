import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

E, D, F = 4, 3, 5
HIDDEN = {"gate": 2, "up": 2, "bias": -1, "down": 1}


def unique_experts(seed=0, n=E, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return {
        "gate": draw(n, D, F),
        "up": draw(n, D, F),
        "bias": draw(n, F),
        "down": draw(n, F, D),
        "out": draw(n, D),
    }


def permuted(params, orders):
    """Each expert with its hidden units in another order."""
    take = lambda x, axis: np.stack([
        np.take(one, order, axis) for one, order in zip(x, orders, strict=True)
    ])
    axes = {"gate": 1, "up": 1, "bias": 0, "down": 0}
    return {k: take(x, axes[k]) if k in axes else x for k, x in params.items()}


def some_orders(seed=1, n=E):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(F) for _ in range(n)])


def expert_outputs(params, x):
    p = {name: np.asarray(w, np.float64) for name, w in params.items()}
    gate = np.einsum("nd,edf->nef", x, p["gate"])
    up = np.einsum("nd,edf->nef", x, p["up"]) + p["bias"][None]
    y = np.einsum("nef,efd->ned", gate / (1 + np.exp(-gate)) * up, p["down"])
    return y + p["out"][None]


def inputs(n=16):
    rng = np.random.default_rng(5)
    return rng.standard_normal((n, D)).astype(np.float32)


def assert_same(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_permutations_of_one_expert_merge_to_exactly_that_expert(dtype):
    one = jax.tree.map(lambda x: x[:1], unique_experts(dtype=dtype))
    same = jax.tree.map(lambda x: np.tile(x, (E, *[1] * (x.ndim - 1))), one)
    params = permuted(same, some_orders())
    leader = 2
    aligned = js.experts.align_experts(params, np.full(E, leader), hidden=HIDDEN)
    usage = np.array([0.1, 0.3, 0.7, 0.1], np.float32)
    merge = jax.jit(
        lambda p: js.experts.merge_experts(p, np.zeros(E, int), usage=usage)
    )
    merged = merge(aligned)
    assert_same(merged, jax.tree.map(lambda x: x[leader : leader + 1], params))
    # Without the alignment the mean is another function.
    gap = np.asarray(merge(params)["up"]) - np.asarray(merged["up"])
    assert np.max(np.abs(gap)) > 0.1


def test_alignment_changes_no_expert_and_finds_the_nearest_permutation():
    params, rows = unique_experts(), inputs()
    to = np.array([0, 0, 3, 3])
    aligned = js.experts.align_experts(params, to, hidden=HIDDEN)
    np.testing.assert_allclose(
        expert_outputs(aligned, rows), expert_outputs(params, rows), atol=1e-5
    )

    def apart(params, e, order):
        other = permuted(
            jax.tree.map(lambda x: x[e : e + 1], params), [np.array(order)]
        )
        off = jax.tree.map(lambda a, b: np.sum((a[0] - b[to[e]]) ** 2), other, params)
        return float(sum(off[k] for k in HIDDEN))

    straight = tuple(range(F))
    for e in (0, 3):
        for k, x in params.items():
            np.testing.assert_array_equal(np.asarray(aligned[k])[e], x[e])
    for e in (1, 2):
        reached = sum(
            np.sum((np.asarray(aligned[k])[e] - params[k][to[e]]) ** 2) for k in HIDDEN
        )
        best = min(apart(params, e, o) for o in itertools.permutations(range(F)))
        assert reached == pytest.approx(best, rel=1e-5)
        assert best < apart(params, e, straight) - 0.1


def test_means_are_weighted_by_usage():
    params, labels = unique_experts(), np.array([1, 0, 1, 1])
    usage = np.array([3.0, 7.0, 1.0, 6.0])
    merged = js.experts.merge_experts(params, labels, usage=usage.astype(np.float32))
    plain = jax.jit(lambda p: js.experts.merge_experts(p, labels))(params)
    merged, plain = jax.device_get((merged, plain))
    for k, x in params.items():
        w = np.asarray(x, np.float64)
        expected = (3 * w[0] + w[2] + 6 * w[3]) / 10
        np.testing.assert_allclose(merged[k][1], expected, atol=1e-6)
        np.testing.assert_array_equal(merged[k][0], x[1])
        np.testing.assert_allclose(plain[k][1], w[[0, 2, 3]].mean(0), atol=1e-6)


def test_a_group_without_tokens_keeps_its_first_member():
    params = unique_experts()
    usage = np.array([0, 5, 0, 0], np.float32)
    merged = js.experts.merge_experts(params, np.array([0, 1, 0, 0]), usage=usage)
    assert_same(merged, jax.tree.map(lambda x: x[:2], params))


def test_experts_join_the_dominant_one_that_is_most_similar():
    usage = {"a": np.array([50, 10, 800, 140]), "b": np.array([30, 25, 25, 20])}
    rng = np.random.default_rng(2)
    logits = {k: rng.standard_normal((30, 4)) for k in usage}
    cosine = {}
    for k, x in logits.items():
        norm = np.linalg.norm(x, axis=0)
        cosine[k] = x.T @ x / (norm[:, None] * norm[None])
        got = js.experts.router_similarity(x.astype(np.float32))
        np.testing.assert_allclose(got, cosine[k], atol=1e-6)
    found = js.experts.group_experts(usage, cosine, groups=4)
    # By share: 0.8 of a, then 0.3, 0.25 and 0.25 of b.
    assert found["a"].dominant.tolist() == [2]
    assert found["b"].dominant.tolist() == [0, 1, 2]
    assert found["a"].labels.tolist() == [0] * 4
    nearest = int(np.argmax(cosine["b"][3, :3]))
    assert found["b"].labels.tolist() == [0, 1, 2, nearest]
    for total, counts in [(2, [1, 1]), (3, [1, 2]), (6, [2, 4]), (8, [4, 4])]:
        found = js.experts.group_experts(usage, cosine, groups=total)
        assert [len(g.dominant) for g in found.values()] == counts
        for grouping in found.values():
            leaders = grouping.dominant[grouping.labels]
            np.testing.assert_array_equal(leaders[grouping.dominant], grouping.dominant)
    found = js.experts.group_experts(usage, cosine, groups=5, at_least=2)
    assert found["a"].dominant.tolist() == [2, 3]
    assert found["b"].dominant.tolist() == [0, 1, 2]


def test_ties_and_layers_without_tokens_still_give_the_total():
    same = np.ones((3, 3))
    found = js.experts.group_experts([np.ones(3), np.zeros(3)], [same, same], groups=3)
    assert [g.dominant.tolist() for g in found] == [[0, 1], [0]]
    assert found[0].labels.tolist() == [0, 1, 0]


def test_logits_that_are_all_zero_are_like_no_others():
    logits = np.array([[1, 0], [2, 0]], np.float32)
    got = np.asarray(jax.jit(js.experts.router_similarity)(logits))
    np.testing.assert_array_equal(got.round(5), [[1.0, 0.0], [0.0, 0.0]])
    half = jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)
    assert jax.eval_shape(js.experts.router_similarity, half).dtype == jnp.float32


def test_a_merged_model_of_duplicates_gives_the_outputs_of_the_original():
    """The whole way: usage, similarity, groups, alignment, mean, gates."""
    unique = unique_experts(n=2)
    twins = np.array([0, 1, 1, 0, 1])
    params = permuted(jax.tree.map(lambda x: x[twins], unique), some_orders(n=5))
    rng = np.random.default_rng(7)
    router = rng.standard_normal((D, 2)).astype(np.float32)[:, twins]
    x = inputs(64)
    # The first of each twins is used a little more.
    logits = x @ router + np.array([[0.05, 0.05, 0, 0, 0]], np.float32)
    gates = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    usage = np.bincount(np.argmax(logits, axis=1), minlength=5) + 0.1 * np.arange(1, 6)
    usage = usage.astype(np.float32)
    similarity = jax.jit(js.experts.router_similarity)(logits)
    grouping = js.experts.group_experts(usage, similarity, groups=2)
    together = lambda labels: np.asarray(labels)[:, None] == np.asarray(labels)
    np.testing.assert_array_equal(together(grouping.labels), together(twins))
    leaders = grouping.dominant[grouping.labels]
    aligned = js.experts.align_experts(params, leaders, hidden=HIDDEN)
    labels = grouping.labels
    merged = jax.jit(lambda p: js.experts.merge_experts(p, labels, usage=usage))(
        aligned
    )
    assert_same(merged, jax.tree.map(lambda x: x[grouping.dominant], params))
    narrow = js.experts.merge_gates(gates, grouping.labels)
    before = np.einsum("ne,ned->nd", gates, expert_outputs(params, x))
    after = np.einsum("ne,ned->nd", narrow, expert_outputs(merged, x))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_errors_say_what_is_expected():
    params, to = unique_experts(), np.zeros(E, int)
    with pytest.raises(ValueError, match=r"to must name an expert \(0 to 3\)"):
        js.experts.align_experts(params, np.full(E, 4), hidden=HIDDEN)
    with pytest.raises(
        ValueError, match=r"hidden must give .*'down'.*got \{'dwn': 1\}"
    ):
        js.experts.align_experts(params, to, hidden={"dwn": 1})
    with pytest.raises(ValueError, match=r"hidden\['up'\] is 0, which is no axis"):
        js.experts.align_experts(params, to, hidden={"up": 0})
    with pytest.raises(ValueError, match="must have one size, got"):
        js.experts.align_experts(params, to, hidden={"up": 1, "down": 1})
    broken = {**params, "up": params["up"].copy()}
    broken["up"][1] = np.nan
    with pytest.raises(ValueError, match="Experts 0 and 1 have no finite similarity"):
        js.experts.align_experts(broken, to, hidden=HIDDEN)
    with pytest.raises(ValueError, match="experts on its first axis"):
        js.experts.merge_experts({**params, "router": jnp.ones((D, E))}, to)
    with pytest.raises(ValueError, match="labels must be 4 integers"):
        js.experts.merge_experts(params, np.array([0, 0, 2, 2]))
    with pytest.raises(ValueError, match=r"usage has shape \(3,\), expected \(4,\)"):
        js.experts.merge_experts(params, to, usage=jnp.ones(3))
    with pytest.raises(ValueError, match="usage must be at least 0"):
        js.experts.merge_experts(params, to, usage=-jnp.ones(E))
    with pytest.raises(ValueError, match="labels must be 3 integers"):
        js.experts.merge_gates(jnp.ones((2, 3)), [0, 1])
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(js.experts.merge_gates)(jnp.ones((2, 2)), jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., tokens, experts\]"):
        js.experts.router_similarity(jnp.ones(3))
    with pytest.raises(TypeError, match="logits must be floating point"):
        js.experts.router_similarity(jnp.ones((3, 3), jnp.int32))
    cosine = np.eye(3)
    with pytest.raises(ValueError, match="usage must be one number of at least 0"):
        js.experts.group_experts(np.array([1, -1, 3]), cosine, groups=2)
    with pytest.raises(ValueError, match=r"similarity must be a matrix of 3 by 3"):
        js.experts.group_experts(np.ones(3), cosine[:2], groups=2)
    with pytest.raises(ValueError, match=r"groups is 4, expected from 1 .* to 3"):
        js.experts.group_experts(np.ones(3), cosine, groups=4)
    with pytest.raises(ValueError, match="similarity must have exactly the structure"):
        js.experts.group_experts([np.ones(3)], cosine, groups=2)
