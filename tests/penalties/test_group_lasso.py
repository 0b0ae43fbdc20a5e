"""Penalties on the slices of groups, against sums over explicit masks in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from penalties import group_models as gm

import jaxsparse as js
from jaxsparse import penalties
from jaxsparse.channels.scaling import factors_of, scaled_updates
from jaxsparse.channels.slices import slices_of
from jaxsparse.channels.sums import entry_counts, squared_norms


def zeros(params):
    return gm.with_values(params, lambda p, w: 0 * w)


def ones(params):
    return gm.with_values(params, lambda p, w: np.ones_like(w))


def one_step(tx, params, updates=None):
    updates = zeros(params) if updates is None else updates
    return jax.jit(lambda u, p: tx.update(u, tx.init(p), p))(updates, params)


def applied(params, updates):
    return {p: np.asarray(w) + np.asarray(updates[p]) for p, w in params.items()}


@pytest.mark.parametrize("roles", [gm.PRODUCERS, gm.ALL])
@pytest.mark.parametrize("model", gm.MODELS)
def test_sums_counts_and_scaling_are_those_of_explicit_masks(model, roles):
    params, _, groups = gm.make(model)
    slices = slices_of(groups, roles=roles)
    expected = gm.slices(groups, params, roles=roles)
    squared = jax.jit(lambda params: squared_norms(slices, params))(params)
    counts = entry_counts(slices, params)
    for (name, copy, index), x in expected.items():
        assert counts[name][(*copy, index)] == x.size
        got = np.asarray(squared[name])[(*copy, index)]
        np.testing.assert_allclose(got, x @ x, rtol=1e-5)
    rng = np.random.default_rng(1)
    vectors = {n: rng.uniform(0.5, 2, s.shape) for n, s in slices.items()}
    for name in list(groups)[:1]:
        vectors[name][..., 0] = 0.0
    vectors32 = {n: v.astype(np.float32) for n, v in vectors.items()}

    @jax.jit
    def scale(params, vectors):
        factors = factors_of(slices, vectors, params)
        return scaled_updates(jax.tree.map(jnp.zeros_like, params), params, factors)

    got = applied(params, scale(params, vectors32))
    factor = {key: vectors[key[0]][(*key[1], key[2])] for key in expected}
    for path, w in gm.scaled(groups, params, factor, roles=roles).items():
        np.testing.assert_allclose(got[path], w, rtol=1e-5)


def test_batched_groups_are_there():
    assert sorted(g.copies for g in gm.make("attention")[2].values()) == [
        (),
        (),
        (2,),
        (2,),
    ]
    assert any(g.copies for g in gm.make("conv")[2].values())


@pytest.mark.parametrize("roles", [gm.PRODUCERS, gm.ALL])
@pytest.mark.parametrize("model", gm.MODELS)
def test_group_lasso_is_the_gradient_of_the_penalty(model, roles):
    params, _, groups = gm.make(model)
    tx = penalties.group_lasso(
        groups, strength=lambda step: jnp.where(step == 0, 0.1, 9.0), roles=roles
    )
    grads, state = one_step(tx, params)
    expected = {p: np.zeros(w.shape) for p, w in params.items()}
    shapes = {p: w.shape for p, w in params.items()}
    for (name, copy, index), x in gm.slices(groups, params, roles=roles).items():
        found = gm.entries(groups[name], copy, index, shapes, roles=roles)
        for p, mask in found.items():
            per = 0.1 * np.sqrt(x.size) / np.linalg.norm(x)
            expected[p] += per * mask * np.asarray(params[p], np.float64)
    for p, g in grads.items():
        np.testing.assert_allclose(np.asarray(g), expected[p], rtol=2e-5, atol=1e-7)
    assert int(state.step) == 1


def test_a_zero_index_has_no_gradient_and_other_leaves_keep_their_bits():
    params, _, groups = gm.make("mlp")
    third = lambda w: np.arange(w.shape[-1]) == 2
    params = gm.with_values(params, lambda p, w: np.where(third(w), 0, w))
    updates = gm.with_values(params, lambda p, w: -np.zeros_like(w))
    params["int"] = updates["int"] = jax.device_put(np.arange(3))
    chosen = {n: g for n, g in groups.items() if any(m.path == "a" for m in g.members)}
    chosen = {n: g for n, g in chosen.items() if g.size == 8}
    for tx in (
        penalties.group_lasso(chosen, strength=1.0),
        penalties.growing_regularization(chosen, increment=1.0, every=1),
        penalties.prox_group_lasso(chosen, strength=0.1),
    ):
        got, _ = one_step(tx, params, updates)
        for p in ("b", "b_bias", "c", "int"):
            gm.assert_bits_equal(got[p], updates[p])
        for p in ("a", "a_bias"):
            assert np.all(np.isfinite(np.asarray(got[p])))
            np.testing.assert_array_equal(np.asarray(got[p])[..., 2], 0.0)
            assert np.count_nonzero(np.asarray(got[p]))


def weakness(groups, params):
    norms = {k: np.linalg.norm(x) for k, x in gm.slices(groups, params).items()}
    result = {}
    for name, copy, index in norms:
        own = [norms[name, copy, i] for i in range(groups[name].size)]
        spread = max(own) - min(own)
        result[name, copy, index] = (max(own) - norms[name, copy, index]) / spread
    return result


def add_decay(groups, params, strength):
    expected = {p: np.zeros(w.shape) for p, w in params.items()}
    shapes = {p: w.shape for p, w in params.items()}
    for (name, copy, index), s in strength.items():
        for p, mask in gm.entries(groups[name], copy, index, shapes).items():
            expected[p] += s * mask * np.asarray(params[p], np.float64)
    return expected


@pytest.mark.parametrize("model", ["mlp", "attention"])
def test_group_norm_decay_is_strongest_for_the_weakest(model):
    params, _, groups = gm.make(model)
    grads, _ = one_step(
        penalties.group_norm_decay(groups, strength=0.5, ratio=8.0), params
    )
    strength = {k: 0.5 * 8.0**w for k, w in weakness(groups, params).items()}
    for p, w in add_decay(groups, params, strength).items():
        np.testing.assert_allclose(np.asarray(grads[p]), w, rtol=2e-5, atol=1e-7)


def test_equal_norms_decay_alike_and_stay_finite():
    params, _, groups = gm.make("mlp")
    params = ones(params)
    grads, _ = one_step(penalties.group_norm_decay(groups, strength=0.5), params)
    np.testing.assert_allclose(np.asarray(grads["a"]), 0.5)
    tx = penalties.growing_regularization(groups, increment=1.0, every=1, init=0.25)
    grads, _ = one_step(tx, params)
    np.testing.assert_allclose(np.asarray(grads["a"]), 0.25)


def test_penalties_grow_on_their_cadence_up_to_the_limit():
    params, _, groups = gm.make("attention")
    tx = penalties.growing_regularization(
        groups, increment=0.1, every=js.schedules.every(3), init=0.05, limit=0.2
    )
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(4):  # grows in steps 0 and 3
        grads, state = update(zeros(params), state, params)
    weak = weakness(groups, params)
    strength = {k: min(0.05 + 0.2 * w, 0.2) for k, w in weak.items()}
    assert len({s < 0.2 for s in strength.values()}) == 2
    for (name, copy, index), s in strength.items():
        got = np.asarray(state.strengths[name])[(*copy, index)]
        np.testing.assert_allclose(got, s, rtol=1e-4)
    for p, w in add_decay(groups, params, strength).items():
        np.testing.assert_allclose(np.asarray(grads[p]), w, rtol=2e-4, atol=1e-6)


def disjoint(groups):
    return {n: g for n, g in groups.items() if not g.copies}


@pytest.mark.parametrize("model", ["mlp", "attention"])
def test_prox_is_the_block_soft_threshold(model):
    params, _, groups = gm.make(model)
    groups = disjoint(groups)
    updates = gm.with_values(params, lambda p, w: -0.3 * w)
    norms = [
        np.linalg.norm(0.7 * x) / np.sqrt(x.size)
        for x in gm.slices(groups, params).values()
    ]
    strength = float(np.median(norms))
    got, _ = one_step(
        penalties.prox_group_lasso(groups, strength=strength), params, updates
    )
    moved = {p: 0.7 * np.asarray(w, np.float64) for p, w in params.items()}
    factor = {
        k: max(0.0, 1 - strength * np.sqrt(x.size) / np.linalg.norm(x))
        for k, x in gm.slices(groups, moved).items()
    }
    assert 0 < sum(f == 0 for f in factor.values()) < len(factor)
    new = applied(params, got)
    expected = gm.scaled(groups, moved, factor)
    for p, w in expected.items():
        np.testing.assert_allclose(np.asarray(new[p]), w, rtol=1e-4, atol=1e-6)
    for (name, copy, index), f in factor.items():
        if f == 0:
            x = gm.slices({name: groups[name]}, new)[name, copy, index]
            np.testing.assert_array_equal(x, 0.0)


@pytest.mark.usefixtures("x64")
def test_the_prox_of_nested_groups_is_the_least_of_both_penalties():
    params, _, groups = gm.make("attention", dtype="float64")
    small = np.ones((2, 4))
    small[0, 1] = 0.1
    params = gm.with_values(params, lambda p, w: w * small if p in "qkv" else w)
    strength = 0.3
    got, _ = one_step(penalties.prox_group_lasso(groups, strength=strength), params)
    new = applied(params, got)
    params = {p: np.asarray(w) for p, w in params.items()}

    def objective(x):
        near = sum(np.sum((x[p] - w) ** 2) for p, w in params.items())
        norms = [
            np.sqrt(s.size) * np.linalg.norm(s) for s in gm.slices(groups, x).values()
        ]
        return near / 2 + strength * sum(norms)

    least = objective(new)
    assert any(np.all(s == 0) for s in gm.slices(groups, new).values())
    assert not all(np.all(s == 0) for s in gm.slices(groups, new).values())
    # It is convex, so a minimum nearby is the minimum.
    rng = np.random.default_rng(0)
    keys = list(gm.slices(groups, new))
    for turn in range(150):
        scale = 10.0 ** rng.uniform(-5, -1)
        if turn % 2:
            other = {
                p: w + scale * rng.standard_normal(w.shape) for p, w in new.items()
            }
        else:  # along what is shared by the slices of an index
            key = keys[rng.integers(len(keys))]
            ones = dict.fromkeys(keys, 1.0)
            away = gm.scaled(groups, params, ones | {key: 1 + scale})
            sign = 1 if turn % 4 else -1
            other = {p: w + sign * (away[p] - params[p]) for p, w in new.items()}
        assert objective(other) > least


def test_slices_that_cross_are_an_error():
    params, _, groups = gm.make("mlp")
    tx = penalties.prox_group_lasso(groups, strength=0.1, roles=gm.ALL)
    with pytest.raises(ValueError, match="have entries of b in common"):
        tx.init(params)


@pytest.mark.usefixtures("relaxed_promotion")  # optax's Adam
@pytest.mark.parametrize(
    "optimizer",
    [
        "adam",
        # The step knows nothing of the optimizer before it.
        pytest.param("momentum", marks=pytest.mark.exhaustive),
        pytest.param("lion", marks=pytest.mark.exhaustive),
    ],
)
def test_training_ends_with_exact_zeros(optimizer):
    params, x, groups = gm.make("mlp")
    tx = {
        "momentum": lambda: optax.sgd(0.02, momentum=0.9),
        "adam": lambda: optax.adam(1e-2),
        "lion": lambda: optax.lion(3e-3),
    }[optimizer]()
    tx = optax.chain(tx, penalties.prox_group_lasso(groups, strength=8e-3))
    y = np.asarray(jax.jit(gm.mlp)(params, x))[:, :1]
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        loss = lambda p: jnp.mean((gm.mlp(p, x)[:, :1] - y) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(300):
        params, state = step(params, state)
    assert len(traces) == 1
    drop = js.channels.zero_indices(params, groups)
    assert sum(len(x) for x in drop.indices.values()) >= 2
    for name, gone in drop.indices.items():
        for index in gone:
            x = gm.slices({name: groups[name]}, params)[name, (), int(index)]
            np.testing.assert_array_equal(x, 0.0)


def test_zero_indices_are_as_many_in_every_copy_and_never_all():
    params, _, groups = gm.make("attention")
    (values,) = [
        g for g in groups.values() if g.copies and any(m.path == "v" for m in g.members)
    ]
    kept = np.ones((2, 4), bool)
    kept[[0, 0, 1], [1, 3, 2]] = False
    params = gm.with_values(
        params, lambda p, w: np.where(kept, w, 0) if p in {"v", "v_bias"} else w
    )
    drop = js.channels.zero_indices(params, groups)
    assert list(drop.indices) == [values.name]
    assert drop.indices[values.name].tolist() == [[1], [2]]
    assert drop.sizes == {values.name: 4}
    params = zeros(params)
    drop = js.channels.zero_indices(params, groups)
    for name, group in groups.items():
        assert drop.indices[name].shape == (*group.copies, group.size - 1)


def test_bfloat16_parameters_keep_their_type_and_exact_zeros():
    params, _, groups = gm.make("mlp", dtype="bfloat16")
    grads = gm.with_values(params, lambda p, w: w / 8)
    tx = optax.chain(
        penalties.group_lasso(groups, strength=1e-3),
        penalties.group_norm_decay(groups, strength=1e-3),
        penalties.growing_regularization(groups, increment=1e-3, every=1),
        optax.sgd(0.1),
        penalties.prox_group_lasso(groups, strength=1.1),
    )
    updates, _ = one_step(tx, params, grads)
    new = jax.jit(optax.apply_updates)(params, updates)
    norms = [np.linalg.norm(x) for x in gm.slices(groups, new).values()]
    assert 0 < sum(n == 0 for n in norms) < len(norms)
    for p, w in new.items():
        assert w.dtype == jnp.bfloat16
        assert updates[p].dtype == jnp.bfloat16


def test_masked_leaves_may_be_missing_but_not_a_whole_group():
    params, _, groups = gm.make("mlp")
    mask = {p: "bias" not in p for p in params}
    tx = optax.masked(penalties.group_lasso(groups, strength=0.1), mask)
    grads, _ = one_step(tx, params)
    np.testing.assert_array_equal(np.asarray(grads["a_bias"]), 0.0)
    assert np.all(np.asarray(grads["a"]) != 0)
    mask = {p: p not in {"b", "b_bias"} for p in params}
    tx = optax.masked(penalties.group_lasso(groups, strength=0.1), mask)
    with pytest.raises(ValueError, match="are hidden from this transformation"):
        tx.init(params)


@pytest.mark.parametrize("kind", ["lasso", "growing", "prox"])
def test_sharded_parameters(kind):
    make = {
        "lasso": lambda groups: penalties.group_lasso(groups, strength=0.1),
        "growing": lambda groups: penalties.growing_regularization(
            groups, increment=0.1, every=1
        ),
        "prox": lambda groups: penalties.prox_group_lasso(groups, strength=0.5),
    }[kind]
    gm.assert_sharded_alike(make, "conv")


def test_bad_input_is_named():
    params, x, groups = gm.make("mlp")
    every = js.coupling.groups(js.trace(gm.mlp, params, x))
    with pytest.raises(ValueError, match=r"is not prunable.*input"):
        penalties.group_lasso(every, strength=0.1)
    with pytest.raises(ValueError, match=r"strength must be at least 0, got -0\.1"):
        penalties.group_lasso(groups, strength=-0.1)
    with pytest.raises(TypeError, match="strength: a number or a schedule"):
        penalties.prox_group_lasso(groups, strength="much")
    with pytest.raises(ValueError, match="roles='output'"):
        penalties.group_lasso(groups, strength=0.1, roles="output")
    with pytest.raises(ValueError, match="there are none"):
        penalties.group_lasso({}, strength=0.1)
    with pytest.raises(ValueError, match="has no member with a role"):
        penalties.group_lasso(groups, strength=0.1, roles=("batch",))
    with pytest.raises(ValueError, match=r"ratio=0\.5"):
        penalties.group_norm_decay(groups, strength=0.1, ratio=0.5)
    with pytest.raises(ValueError, match="is below init"):
        penalties.growing_regularization(
            groups, increment=1.0, every=1, init=2.0, limit=1.0
        )
    tx = penalties.group_lasso(groups, strength=0.1)
    with pytest.raises(
        ValueError, match=r"lies in 'a', which the parameters.*params/a"
    ):
        tx.init({"params": params})
    with pytest.raises(ValueError, match=r"b: group .* expects sizes \(6,\)"):
        tx.init(params | {"b": jnp.ones((8, 7))})
    with pytest.raises(TypeError, match=r"b_bias: expected real .* for group 'b"):
        tx.init(params | {"b_bias": jnp.ones(6, int)})
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
