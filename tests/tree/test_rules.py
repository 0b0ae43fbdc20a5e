"""Sparsities by path or regular expression, wherever a sparsity is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js


def model():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.device_put(rng.standard_normal(shape).astype(np.float32))
    return {
        "l0": {"kernel": draw(8, 8), "bias": draw(8)},
        "attn": {"q": {"kernel": draw(8, 8)}, "k": {"kernel": draw(8, 8)}},
        "head": {"kernel": draw(8, 8)},
    }


RULES = {"l0/kernel": 0.5, r"attn/": 0.75}


def reached(masks):
    paths = dict(js.tree.leaves_with_paths(masks))
    return {p: 1 - float(jnp.mean(m)) for p, m in paths.items() if m.ndim}


EXPECTED = {"attn/k/kernel": 0.75, "attn/q/kernel": 0.75, "l0/kernel": 0.5}


def test_prune_takes_rules_and_leaves_the_rest_dense():
    params = model()
    pruned = js.prune(params, RULES)
    assert reached(pruned.masks) == EXPECTED
    np.testing.assert_array_equal(
        pruned.params["head"]["kernel"], params["head"]["kernel"]
    )


def test_so_do_the_others():
    params = model()
    scores = js.scores.magnitude(params)
    assert reached(js.patterns.masks(scores, RULES)) == EXPECTED
    assert reached(js.prune(params, RULES, steps=2).masks) == EXPECTED
    grads = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    fisher = js.curvature.diagonal_fisher(grads, damping=1e-3)
    for steps in (1, 2):
        found = js.solvers.obs(params, fisher, RULES, steps=steps)
        assert reached(found.masks) == EXPECTED
    sparse = js.straight_through(params, RULES)
    assert int(jnp.sum(sparse["attn"]["q"]["kernel"] != 0)) == 16
    counted = js.allocations.round_to_weights(params, RULES)
    assert counted["attn"]["k"]["kernel"] == 0.75
    assert counted["head"]["kernel"] == 0.0


@pytest.mark.parametrize("init", [0.0, 0.25])
def test_schedules_by_rule(init):
    linear = lambda final: js.schedules.polynomial(
        init=init, final=final, begin=0, end=2, power=1
    )
    rules = {"attn/q": linear(0.75), "attn": linear(0.5), "l0/kernel": 0.25}
    tx = js.prune_schedule(rules, every=js.schedules.every(1, end=2)).wrap(
        optax.sgd(0.1)
    )
    params = model()
    state = tx.init(params)
    step = jax.jit(tx.update)
    for now in (0, 0.5, 1):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
        found = reached(js.masks_of(state))
        expected = {
            "attn/q/kernel": init + now * (0.75 - init),
            "attn/k/kernel": init + now * (0.5 - init),
            "l0/kernel": 0.25,
        }
        for path, s in expected.items():
            removed = js.patterns.removed_count(jnp.float32(s), 64)
            assert found[path] * 64 == int(removed)
        assert set(found) == set(expected)


def test_a_target_that_a_schedule_by_rule_never_reaches_is_named():
    late = js.schedules.polynomial(final=0.5, begin=0, end=100)
    with pytest.raises(ValueError, match="attn: sparsity never reaches its target"):
        js.prune_schedule({"attn": late}, every=js.schedules.at(3))


def test_layerwise_leaves_what_no_rule_matches():
    params = {k: model()["attn"][k]["kernel"] for k in ("q", "k")}
    params["out"] = params["q"] * 2
    apply_fn = lambda p, x: jnp.tanh(x @ p["q"] + x @ p["k"]) @ p["out"]
    x = model()["l0"]["kernel"]
    for rules in ({"q": 0.5, "^k$": 0.75}, {"q": 0.5, "k": 0.75, "zz": 0.1}):
        if "zz" in rules:
            with pytest.raises(ValueError, match=r"'zz' matches none of the kernels"):
                js.oneshot.layerwise(apply_fn, params, [x], sparsity=rules)
            continue
        found = js.oneshot.layerwise(
            apply_fn, params, [x], sparsity=rules, solver=js.solvers.wanda
        )
        assert reached(found.masks) == {"q": 0.5, "k": 0.75}
        np.testing.assert_array_equal(found.params["out"], params["out"])
        assert list(found.info) == ["q", "k"]


# The rules.


def test_the_first_rule_that_matches_counts():
    params = model()
    values, where = js.tree.by_rules(params, {"attn/q": 0.1, "kernel": 0.2})
    assert values["attn"] == {"q": {"kernel": 0.1}, "k": {"kernel": 0.2}}
    assert values["l0"] == {"kernel": 0.2, "bias": 0.0}
    assert where["l0"] == {"kernel": True, "bias": False}


def test_a_rule_that_is_a_path_is_that_one_alone():
    params = {"w": jnp.ones((2, 2)), "ww": jnp.ones((2, 2)), "a[0]": jnp.ones((2, 2))}
    assert js.tree.by_rules(params, {"w": 0.5})[0] == {"w": 0.5, "ww": 0.0, "a[0]": 0.0}
    assert js.tree.by_rules(params, {"a[0]": 0.5})[0]["a[0]"] == 0.5


def test_a_tree_like_the_parameters_is_one():
    params = {"a": jnp.ones((2, 2)), "aa": jnp.ones((2, 2))}
    tree = {"a": 0.25, "aa": 0.5}
    assert js.tree.by_rules(params, tree) == (tree, None)
    assert reached(js.prune(params, tree).masks) == tree
    assert reached(js.prune([*params.values()], [0.25, 0.5]).masks) == {
        "0": 0.25,
        "1": 0.5,
    }


def test_a_tree_without_leaves_has_nothing_to_match():
    """Optax shows transformations such trees."""
    tx = js.prune_schedule({"w": 0.5}, every=1)
    optax.chain(tx, optax.sgd(0.1)).init({})
    assert js.tree.by_rules({}, {"w": 0.5}) == (0.0, None)


def test_a_mapping_with_all_paths_is_a_tree():
    """So is one for a list, or for the variables of an NNX state."""
    params = [jnp.ones((2, 2)), jnp.ones(2)]
    every = {"0": 0.5, "1": 0.0}  # the second takes no part
    assert js.tree.by_rules(params, every) == (every, None)
    assert reached(js.prune(params, every).masks) == {"0": 0.5}


@pytest.mark.parametrize("rule", ["l0/kernal", "attn/v", "bias"])
def test_a_rule_that_matches_nothing_is_an_error_with_the_nearest_paths(rule):
    """The bias does not take part."""
    with pytest.raises(ValueError, match=rf"'{rule}' matches none .*nearest.*/kernel"):
        js.prune(model(), {"attn": 0.5, rule: 0.5})


def test_other_mistakes_get_a_sentence():
    with pytest.raises(ValueError, match=r"'\(attn' is none of the paths and no reg"):
        js.prune(model(), {"(attn": 0.5})
    with pytest.raises(ValueError, match=r"head/kernel: sparsity must lie in"):
        js.prune(model(), {"head": 1.5})
    with pytest.raises(ValueError, match=r"global scope .* rules"):
        js.prune(model(), RULES, pattern=js.Unstructured("global"))
    nested = {"attn": {"q": 0.5}}
    with pytest.raises(ValueError, match="sparsity must have exactly the structure"):
        js.prune(model(), nested)
