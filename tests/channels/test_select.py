import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels.test_score import built, hand_made
from zoo.models import ZOO

import jaxsparse as js

NONE = frozenset()


def group(name, size, copies=(), key=None, flags=NONE):
    batched = tuple(f"{name}b{i}" for i in range(len(copies)))
    reasons = tuple(
        js.coupling.Reason(f, "it is an axis of the result", "") for f in flags
    )
    return js.coupling.Group(
        name, size, (), batched, copies, frozenset(flags), reasons, NONE, key
    )


def named(*groups):
    return {g.name: g for g in groups}


def as_lists(drop):
    return {name: gone.tolist() for name, gone in drop.indices.items()}


def brute_local(x, k):
    """The k lowest of a vector; of equal ones the higher index goes first."""
    order = sorted(range(len(x)), key=lambda i: (x[i], -i))
    return sorted(order[:k])


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.7, 0.99])
def test_each_group_and_copy_loses_its_lowest_by_the_count_rule(sparsity):
    rng = np.random.default_rng(0)
    groups = named(group("a", 10), group("b", 7, (2, 3)))
    scores = {"b": rng.integers(0, 4, (2, 3, 7)) / 1.0, "a": rng.integers(0, 4, 10) / 1}
    drop = js.channels.drop_lowest(groups, scores, sparsity)
    assert list(drop.indices) == ["a", "b"]
    assert drop.sizes == {"a": 10, "b": 7}
    for name, gone in drop.indices.items():
        n = groups[name].size
        k = min(math.floor(sparsity * n + 0.5), n - 1)
        assert gone.dtype == np.int64
        assert gone.shape == (*groups[name].copies, k)
        for copy in np.ndindex(*groups[name].copies):
            assert gone[copy].tolist() == brute_local(scores[name][copy], k)


def test_one_choice_for_all_copies_is_that_of_their_mean():
    groups = named(group("heads", 3, (2,)))
    scores = {"heads": np.array([[1.0, 2.0, 9.0], [8.0, 2.0, 0.0]])}  # mean 4.5 2 4.5
    own = js.channels.drop_lowest(groups, scores, 0.34)
    assert as_lists(own) == {"heads": [[0], [2]]}
    same = js.channels.drop_lowest(groups, scores, 0.34, per_copy=False)
    assert as_lists(same) == {"heads": [[1], [1]]}
    same = js.channels.drop_lowest(groups, scores, 0.67, per_copy=False)
    assert as_lists(same) == {"heads": [[1, 2], [1, 2]]}


def test_all_compete_globally_and_ties_go_to_the_earlier_group():
    groups = named(group("a", 4), group("b", 4))
    scores = {"a": np.array([5.0, 1, 7, 2]), "b": np.array([1.0, 6, 1, 9])}
    for k, wanted in enumerate([
        {"a": [], "b": []},
        {"a": [], "b": [2]},
        {"a": [], "b": [0, 2]},
        {"a": [1], "b": [0, 2]},
        {"a": [1, 3], "b": [0, 2]},
        {"a": [0, 1, 3], "b": [0, 2]},
        {"a": [0, 1, 3], "b": [0, 1, 2]},
        {"a": [0, 1, 3], "b": [0, 1, 2]},  # each keeps one
    ]):
        assert (
            as_lists(js.channels.drop_lowest(groups, scores, k / 8, scope="global"))
            == wanted
        )


def brute_scope(chains, total, copies):
    """Takes the lowest next unit of all that still fits, one after the other."""
    counts, closed = [0] * len(chains), set()
    while True:
        heads = [
            (chains[g][c], -g)
            for g, c in enumerate(counts)
            if g not in closed and c < len(chains[g]) - 1
        ]
        if not heads:
            return counts
        g = -min(heads)[1]
        if copies[g] > total:
            closed.add(g)
        else:
            counts[g], total = counts[g] + 1, total - copies[g]


@pytest.mark.parametrize("seed", range(4))
def test_a_unit_with_copies_has_their_mean_and_counts_as_many(seed):
    rng = np.random.default_rng(seed)
    copies = [(), (3,), (2, 2)]
    groups = named(*(group(f"g{i}", 6, c) for i, c in enumerate(copies)))
    scores = {n: rng.integers(0, 9, (*g.copies, 6)) / 1.0 for n, g in groups.items()}
    weights = [1, 3, 4]
    chains = [
        [np.mean(np.sort(x, -1)[..., r]) for r in range(6)] for x in scores.values()
    ]
    for sparsity in (0.1, 0.33, 0.5, 0.8):
        total = math.floor(sparsity * 48 + 0.5)
        counts = brute_scope(chains, total, weights)
        drop = js.channels.drop_lowest(groups, scores, sparsity, scope="global")
        assert [gone.shape[-1] for gone in drop.indices.values()] == counts
        for name, gone in drop.indices.items():
            for copy in np.ndindex(*groups[name].copies):
                wanted = brute_local(scores[name][copy], gone.shape[-1])
                assert gone[copy].tolist() == wanted
        removed = sum(g.size for g in drop.indices.values())
        # Short of it only where nothing that is left fits.
        fits = [w for w, k in zip(weights, counts, strict=True) if k < 5]
        assert 0 <= total - removed < min(fits)
        assert js.channels.dropped_fraction(drop) == removed / 48


def test_a_group_alone_in_its_scope_follows_the_count_rule_of_its_own():
    groups = named(group("a", 5, (2,)))
    scores = {"a": np.arange(10.0).reshape(2, 5)}
    for scope in ("group", "global", "isomorphic"):
        drop = js.channels.drop_lowest(groups, scores, 0.5, scope=scope)
        assert drop.indices["a"].shape == (2, 3)


def test_isomorphic_groups_and_those_of_a_function_compete():
    groups = named(
        group("a", 4, key="x"), group("b", 4, key="y"), group("c", 4, key="x")
    )
    scores = {"a": np.arange(4.0), "b": np.arange(4.0), "c": np.arange(10.0, 14.0)}
    drop = js.channels.drop_lowest(groups, scores, 0.25, scope="isomorphic")
    assert as_lists(drop) == {"a": [0, 1], "b": [0], "c": []}
    drop = js.channels.drop_lowest(groups, scores, 0.25, scope=lambda g: g.name == "a")
    assert as_lists(drop) == {"a": [0], "b": [0, 1], "c": []}


def test_a_mapping_has_a_sparsity_for_each_group_and_leaves_others_alone():
    groups = named(group("a", 4), group("b", 10), group("c", 4))
    scores = {"a": np.arange(4.0), "b": np.arange(10.0), "c": np.arange(4.0)}
    drop = js.channels.drop_lowest(groups, scores, {"b": 0.2, "a": 0.5})
    assert as_lists(drop) == {"a": [0, 1], "b": [0, 1]}
    drop = js.channels.drop_lowest(groups, scores, {"b": 0.2, "a": 0.5}, scope="global")
    assert as_lists(drop) == {"a": [0, 1], "b": [0, 1]}
    drop = js.channels.drop_lowest(groups, scores, 0.5, where="a|c")
    assert as_lists(drop) == {"a": [0, 1], "c": [0, 1]}
    drop = js.channels.drop_lowest(
        groups, scores, 0.5, where=lambda name, g: g.size > 4
    )
    assert as_lists(drop) == {"b": [0, 1, 2, 3, 4]}


def kept(drop):
    return {n: drop.sizes[n] - g.shape[-1] for n, g in drop.indices.items()}


def test_what_is_kept_is_rounded_up_to_multiples():
    groups = named(group("a", 64), group("b", 20), group("c", 7), group("d", 8))
    scores = {n: np.arange(float(g.size)) for n, g in groups.items()}
    for sparsity, wanted in (
        (0.5, {"a": 32, "b": 16, "c": 7, "d": 8}),
        (0.3, {"a": 48, "b": 16, "c": 7, "d": 8}),
        (0.1, {"a": 64, "b": 20, "c": 7, "d": 8}),
        (0.99, {"a": 8, "b": 8, "c": 7, "d": 8}),
    ):
        assert (
            kept(js.channels.drop_lowest(groups, scores, sparsity, round_to=8))
            == wanted
        )
    found = js.channels.drop_lowest(groups, scores, 0.9, round_to=8, min_keep=17)
    assert kept(found) == {"a": 24, "b": 20, "c": 7, "d": 8}
    found = js.channels.drop_lowest(groups, scores, 0.9, max_sparsity=0.7)
    assert kept(found) == {"a": 20, "b": 6, "c": 3, "d": 3}
    found = js.channels.drop_lowest(groups, scores, 0.9, max_sparsity=0.7, round_to=8)
    assert kept(found) == {"a": 24, "b": 8, "c": 7, "d": 8}
    found = js.channels.drop_lowest(groups, scores, 0.9, min_keep=7)
    assert kept(found) == {"a": 7, "b": 7, "c": 7, "d": 7}


def test_a_global_count_is_met_in_spite_of_the_limits():
    rng = np.random.default_rng(0)
    groups = named(*(group(f"g{i}", 32) for i in range(4)))
    scores = {n: rng.random(32) * 10**i for i, n in enumerate(groups)}
    free = js.channels.drop_lowest(groups, scores, 0.5, scope="global")
    assert free.indices["g0"].size == 31
    least = js.channels.drop_lowest(groups, scores, 0.5, scope="global", min_keep=12)
    assert sum(map(np.size, least.indices.values())) == 64
    assert least.indices["g0"].size == 20
    most = js.channels.drop_lowest(
        groups, scores, 0.5, scope="global", max_sparsity=0.55
    )
    assert sum(map(np.size, most.indices.values())) == 64
    assert most.indices["g0"].size == 17
    rounded = js.channels.drop_lowest(groups, scores, 0.5, scope="global", round_to=8)
    assert sum(map(np.size, rounded.indices.values())) == 64
    assert all(k % 8 == 0 for k in kept(rounded).values())
    # No multiple of 8 is 51: the most that fits, and not more.
    rounded = js.channels.drop_lowest(groups, scores, 0.4, scope="global", round_to=8)
    assert sum(map(np.size, rounded.indices.values())) == 48
    assert js.channels.dropped_fraction(rounded) == 48 / 128


def test_blocks_compete_by_their_mean():
    groups = named(group("a", 4), group("b", 4))
    scores = {"a": np.array([0.0, 10, 11, 12]), "b": np.array([4.0, 4, 11, 12])}
    assert as_lists(js.channels.drop_lowest(groups, scores, 0.25, scope="global")) == {
        "a": [0],
        "b": [1],
    }
    # 5 and 4 are the means of the first two.
    rounded = js.channels.drop_lowest(groups, scores, 0.25, scope="global", round_to=2)
    assert as_lists(rounded) == {"a": [], "b": [0, 1]}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["attention_separate", "grouped"])
def test_what_is_selected_of_a_real_model_can_be_narrowed(name):
    groups, params, scores = built(name)
    apply_fn, _, inputs = ZOO[name]()
    trace = js.trace(apply_fn, params, *inputs)
    of_groups = jax.jit(functools.partial(js.channels.channel_scores, groups))(scores)
    drop = js.channels.drop_lowest(groups, of_groups, 0.5, scope="global")
    # Units of up to 8 indices, of 52.
    assert abs(js.channels.dropped_fraction(drop) - 0.5) < 8 / 52
    found = js.narrowing.narrow(trace, params, drop)
    left = sum(x.size for x in jax.tree.leaves(found.params))
    assert (
        left
        == weights_left(groups, params, drop)
        == js.narrowing.cost(trace, drop).parameters
    )
    assert left < sum(x.size for x in jax.tree.leaves(params))


def along(axis, index, ndim):
    return np.asarray(index).reshape([-1 if a == axis else 1 for a in range(ndim)])


def weights_left(groups, params, drop):
    """Entries that none of the dropped indices has, place by place in each axis."""
    total = 0
    for path, w in js.tree.leaves_with_paths(params):
        stays = np.ones(np.shape(w), bool)
        for name, gone in drop.indices.items():
            g = groups[name]
            keep = np.ones((*g.copies, g.size + 1), bool)  # the last for no index
            np.put_along_axis(keep, gone, False, axis=-1)
            for m in g.members:
                if m.path == path:
                    axes = [*m.copies, (m.axis, m.index)]
                    stays &= keep[tuple(along(*at, np.ndim(w)) for at in axes)]
        total += int(stays.sum())
    return total


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scope", ["group", "global", "isomorphic"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_a_budget_is_met_with_the_fewest_indices(scope, round_to):
    groups, params, raw = built("residual")
    scores = js.channels.channel_scores(groups, jax.tree.map(jnp.abs, raw))
    asked = []

    def cost(drop):
        asked.append(drop)
        return weights_left(groups, params, drop)

    options = {"scope": scope, "round_to": round_to, "min_keep": 2}
    whole = weights_left(groups, params, js.coupling.Drop({}, {}))
    for budget in (whole, whole - 1, 0.6 * whole, 0.4 * whole):
        asked.clear()
        drop, reached = js.channels.drop_to_budget(
            groups, scores, cost=cost, budget=budget, **options
        )
        assert reached == weights_left(groups, params, drop) <= budget
        assert len(asked) < 9
        assert all(k >= 2 for k in kept(drop).values())
        if budget == whole:
            assert js.channels.dropped_fraction(drop) == 0
        # Of those that were asked none is smaller and within the budget.
        for other in asked:
            if weights_left(groups, params, other) <= budget:
                assert js.channels.dropped_fraction(
                    other
                ) >= js.channels.dropped_fraction(drop)


def test_it_is_the_first_place_in_the_order_of_a_rising_sparsity():
    rng = np.random.default_rng(2)
    groups = named(*(group(f"g{i}", n) for i, n in enumerate([5, 8, 12])))
    scores = {n: rng.random(g.size) for n, g in groups.items()}
    price = {"g0": 7, "g1": 3, "g2": 1}
    cost = lambda drop: sum(price[n] * k for n, k in kept(drop).items())
    path = {
        scope: [
            js.channels.drop_lowest(groups, scores, k / 1000, scope=scope)
            for k in range(1000)
        ]
        for scope in ("global", "group")
    }
    for scope, budget in itertools.product(path, (70, 50, 33, 20)):
        found = js.channels.drop_to_budget(
            groups, scores, cost=cost, budget=budget, scope=scope
        )
        first = next(drop for drop in path[scope] if cost(drop) <= budget)
        # Within a step of the sparsity several groups may lose one each.
        assert found.reached == cost(found.drop) <= budget
        size = lambda drop: sum(map(np.size, drop.indices.values()))
        assert size(first) - 2 <= size(found.drop) <= size(first)
        if scope == "global":
            assert as_lists(found.drop) == as_lists(first)


def test_a_budget_out_of_reach_says_what_can_be_reached():
    groups = named(group("a", 10))
    scores = {"a": np.arange(10.0)}
    cost = lambda drop: 100 * kept(drop)["a"]
    with pytest.raises(ValueError, match=r"budget=99: .* 100 is left, of 1000"):
        js.channels.drop_to_budget(groups, scores, cost=cost, budget=99)
    with pytest.raises(ValueError, match=r"500 is left, of 1000"):
        js.channels.drop_to_budget(groups, scores, cost=cost, budget=499, min_keep=5)
    with pytest.raises(ValueError, match=r"cost\(drop\) is NaN"):
        js.channels.drop_to_budget(
            groups, scores, cost=lambda drop: math.nan, budget=499
        )
    with pytest.raises(TypeError, match=r"cost\(drop\) must be one number, got \(1, 2"):
        js.channels.drop_to_budget(groups, scores, cost=lambda drop: (1, 2), budget=499)
    with pytest.raises(TypeError, match="budget must be a number, got '5'"):
        js.channels.drop_to_budget(groups, scores, cost=cost, budget="5")
    found = js.channels.drop_to_budget(
        groups, scores, cost=lambda d: jnp.asarray(cost(d)), budget=250
    )
    assert (kept(found.drop)["a"], found.reached) == (2, 200)


def test_errors_name_the_group():
    groups = named(
        group("a", 4), group("out", 3, flags={"output"}), group("h", 2, (2,))
    )
    a = np.arange(4.0)
    with pytest.raises(ValueError, match=r"b: scores names it.*nearest: \['a'"):
        js.channels.drop_lowest(groups, {"b": a}, 0.5)
    with pytest.raises(ValueError, match=r"out: .*not prunable: output: it is an axis"):
        js.channels.drop_lowest(groups, {"a": a, "out": np.ones(3)}, 0.5)
    with pytest.raises(
        ValueError, match=r"a: scores of shape \(3,\) for a group of \(4"
    ):
        js.channels.drop_lowest(groups, {"a": np.ones(3)}, 0.5)
    with pytest.raises(ValueError, match=r"h: scores of shape \(2,\) .* of \(2, 2\)"):
        js.channels.drop_lowest(groups, {"h": np.ones(2)}, 0.5)
    with pytest.raises(ValueError, match="a: 1 of 4 scores are NaN"):
        js.channels.drop_lowest(groups, {"a": np.array([1, math.nan, 2, 3])}, 0.5)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        js.channels.drop_lowest(groups, {"a": a}, 1.0)
    with pytest.raises(ValueError, match=r"a must lie in \[0, 1\)"):
        js.channels.drop_lowest(groups, {"a": a}, {"a": -0.5})
    with pytest.raises(ValueError, match="c: sparsity names it"):
        js.channels.drop_lowest(groups, {"a": a}, {"c": 0.5})
    with pytest.raises(ValueError, match="scope='layer': expected"):
        js.channels.drop_lowest(groups, {"a": a}, 0.5, scope="layer")
    with pytest.raises(ValueError, match="round_to must be at least 1"):
        js.channels.drop_lowest(groups, {"a": a}, 0.5, round_to=0)
    with pytest.raises(ValueError, match="min_keep must be at least 1"):
        js.channels.drop_lowest(groups, {"a": a}, 0.5, min_keep=0)
    with pytest.raises(ValueError, match=r"max_sparsity must lie in \[0, 1\]"):
        js.channels.drop_lowest(groups, {"a": a}, 0.5, max_sparsity=1.5)
    with pytest.raises(TypeError, match="max_sparsity must be a number"):
        js.channels.drop_lowest(groups, {"a": a}, 0.5, max_sparsity="half")
    with pytest.raises(ValueError, match="No group takes part"):
        js.channels.drop_lowest(groups, {"a": a}, 0.5, where="kernel")
    with pytest.raises(TypeError, match="`where` must be None, a regular expression"):
        js.channels.drop_lowest(groups, {"a": a}, 0.5, where=3)
    with pytest.raises(TypeError, match=r"a: .*call js.channels.drop_lowest outside"):
        jax.jit(lambda a: js.channels.drop_lowest(groups, {"a": a}, 0.5))(
            jnp.arange(4.0)
        )


def test_scores_of_sixteen_bits_and_without_end_are_ordered():
    groups = hand_made(("w", 0, range(3), (), "input"), size=3)
    scores = {"g": jnp.array([jnp.inf, 1, -jnp.inf], jnp.bfloat16)}
    assert as_lists(js.channels.drop_lowest(groups, scores, 0.34)) == {"g": [2]}
    assert as_lists(js.channels.drop_lowest(groups, scores, jnp.float32(0.67))) == {
        "g": [1, 2]
    }


def test_a_hundred_thousand_indices_are_chosen_in_no_time():
    rng = np.random.default_rng(0)
    groups = named(*(group(f"g{i}", 1000, (10,)) for i in range(20)))
    scores = {n: rng.random((10, 1000)) for n in groups}
    drop = js.channels.drop_lowest(groups, scores, 0.5, scope="global", round_to=8)
    assert abs(js.channels.dropped_fraction(drop) - 0.5) < 0.001
    found = js.channels.drop_to_budget(
        groups, scores, cost=lambda d: 1 - js.channels.dropped_fraction(d), budget=0.3
    )
    assert found.reached <= 0.3 < found.reached + 1 / 20_000
