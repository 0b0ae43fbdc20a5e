"""The proximal step of the group sparse envelope, against a minimiser of its words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from penalties import group_models as gm

import jaxsparse as js
from jaxsparse import contrib


def step_of(tx, params, updates=None):
    if updates is None:
        updates = gm.with_values(params, lambda p, w: 0 * w)

    @jax.jit
    def step(params, updates):
        got, _ = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, got)

    return step(params, updates)


def disjoint(groups):
    return {n: g for n, g in groups.items() if not g.copies}


def minimised(norms, costs, k, lam):
    """`min_{u, v} lam * 1/2 sum v^2 / u + 1/2 sum (v - norm)^2` by a general solver.

    Over norms v >= 0 of indices and the u of the definition, jointly: none of the
    closed forms of the implementation.
    """
    n = len(norms)

    def objective(z):
        v, u = z[:n], z[n:]
        return lam / 2 * np.sum(v**2 / u) + 0.5 * np.sum((v - norms) ** 2)

    def gradient(z):
        v, u = z[:n], z[n:]
        return np.concatenate([lam * v / u + v - norms, -lam / 2 * v**2 / u**2])

    budget = scipy.optimize.LinearConstraint(
        np.r_[np.zeros(n), costs][None], -np.inf, k
    )
    start = np.r_[norms / 2, np.full(n, 0.9 * k / costs.sum())]
    least, most = np.r_[np.zeros(n), np.full(n, 1e-9)], np.r_[norms, np.ones(n)]
    bounds = scipy.optimize.Bounds(least, most)
    found = scipy.optimize.minimize(
        objective,
        start,
        jac=gradient,
        bounds=bounds,
        constraints=[budget],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 2000},
    )
    assert found.status in {0, 8}, found.message  # 8: no better point along the line
    return found.x[:n], found.fun


@functools.partial(jax.jit, static_argnames="costs")
def step_with(params, sparsity, strength, costs):
    """One program for all numbers: as schedules, which may be traced."""
    groups = gm.make("mlp", dtype="float64")[2]
    tx = contrib.wgsef_prox(
        groups,
        sparsity=lambda step: sparsity,
        strength=lambda step: strength,
        costs=None if costs is None else dict.fromkeys(groups, costs),
    )
    updates = jax.tree.map(jnp.zeros_like, params)
    got, _ = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, got)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("costs", [None, 1.0])
@pytest.mark.parametrize(
    ("sparsity", "strength"), [(0.5, 0.3), (0.8, 2.0), (0.3, 0.02), (0.0, 0.5)]
)
def test_the_step_minimises_the_envelope_and_the_distance(sparsity, strength, costs):
    params, _, groups = gm.make("mlp", dtype="float64")
    held = gm.slices(groups, params)
    norms = np.array([np.linalg.norm(x) for x in held.values()])
    d = np.array([x.size if costs is None else 1.0 for x in held.values()], float)
    new = gm.slices(groups, step_with(params, sparsity, strength, costs))
    got = np.array([np.linalg.norm(x) for x in new.values()])
    k = (1 - sparsity) * d.sum()
    expected, least = minimised(norms, d, k, strength)
    # By the envelope's own definition at the point that was found: u for this v.
    u = got * strength / np.where(got < norms, norms - got, 1)
    assert np.all(u <= 1 + 1e-9)
    assert d @ u <= k * (1 + 1e-9)
    safe = np.where(u > 0, u, 1)
    reached = strength / 2 * np.sum(got**2 / safe) + 0.5 * np.sum((got - norms) ** 2)
    assert reached <= least * (1 + 1e-7)
    np.testing.assert_allclose(got, expected, atol=2e-3 * norms.max())
    for key, x in new.items():  # direction kept
        v = held[key]
        np.testing.assert_allclose(x, v * (np.linalg.norm(x) / np.linalg.norm(v)))
    if sparsity == 0:
        np.testing.assert_allclose(got, norms / (1 + strength))


@pytest.mark.parametrize("model", ["attention", "conv"])
def test_float32_agrees_with_float64(model):
    params, _, groups = gm.make(model)
    groups = disjoint(groups)
    updates = gm.with_values(params, lambda p, w: -0.1 * w)
    tx = lambda: contrib.wgsef_prox(groups, sparsity=0.5, strength=1.0)
    low = step_of(tx(), params, updates)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, updates))
        high = step_of(tx(), *wide)
    for p, w in high.items():
        np.testing.assert_allclose(
            np.asarray(low[p]), np.asarray(w), rtol=1e-4, atol=1e-6
        )


def test_a_budget_of_whole_indices_leaves_exactly_those():
    params, _, groups = gm.make("mlp")
    ranked = sorted(gm.slices(groups, params).items(), key=lambda kv: -len(kv[1]))
    # Far apart norms, so that with a large strength the budget goes to whole indices.
    factor = {key: 10.0 ** (-i) for i, (key, _) in enumerate(ranked)}
    moved = gm.scaled(groups, params, factor)
    params = gm.with_values(params, lambda p, w: moved[p])
    tx = contrib.wgsef_prox(
        groups, sparsity=11 / 14, strength=1.0, costs=dict.fromkeys(groups, 1)
    )
    new = gm.slices(groups, step_of(tx, params))
    assert {k for k, x in new.items() if np.any(x)} <= {k for k, _ in ranked[:4]}
    assert sum(bool(np.any(x)) for x in new.values()) >= 3


def test_equal_indices_at_an_exact_budget():
    params, _, groups = gm.make("mlp")
    ones = {p: np.ones(w.shape) for p, w in params.items()}
    for p in ("a", "a_bias"):
        ones[p][..., 2:] = 1e-3
    params = gm.with_values(params, lambda p, w: ones[p])
    eight = {n: g for n, g in groups.items() if g.size == 8}
    tx = contrib.wgsef_prox(eight, sparsity=0.75, strength=1.0)  # two of eight fill it
    new = step_of(tx, params)
    np.testing.assert_allclose(np.asarray(new["a"][:, :2]), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(new["a"][:, 2:]), 0.0)
    np.testing.assert_array_equal(np.asarray(new["a_bias"][2:]), 0.0)
    gm.assert_bits_equal(new["b"], params["b"])


def test_degenerate_parameters_and_strengths():
    params, _, groups = gm.make("mlp")
    zero = gm.with_values(params, lambda p, w: 0 * w)
    for w in step_of(
        contrib.wgsef_prox(groups, sparsity=0.5, strength=1.0), zero
    ).values():
        np.testing.assert_array_equal(np.asarray(w), 0.0)
    updates = gm.with_values(params, lambda p, w: 0.25 * w)
    same = step_of(
        contrib.wgsef_prox(groups, sparsity=0.0, strength=0.0), params, updates
    )
    for p, w in optax.apply_updates(params, updates).items():
        np.testing.assert_allclose(same[p], w, rtol=1e-6)


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.exhaustive), "bfloat16"]
)
def test_training_ends_with_exact_zeros(dtype):
    params, x, groups = gm.make("mlp", dtype=dtype)
    tx = optax.chain(
        optax.adam(3e-3),
        contrib.wgsef_prox(
            groups,
            sparsity=js.schedules.polynomial(final=0.5, begin=0, end=100),
            strength=lambda step: 1e-2 * jnp.minimum(step / 100, 1.0),
        ),
    )
    y = jax.jit(gm.mlp)(params, x)[:, :1]
    loss = lambda p: jnp.mean((gm.mlp(p, x)[:, :1] - y) ** 2)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(500):
        params, state = step(params, state)
    assert len(traces) == 1
    drop = js.channels.zero_indices(params, groups)
    assert sum(len(x) for x in drop.indices.values()) >= 2
    for name, gone in drop.indices.items():
        held = gm.slices({name: groups[name]}, params)
        assert all(not np.any(held[name, (), int(index)]) for index in gone)
    assert params["a"].dtype == jnp.dtype(dtype)


def test_sharded_parameters():
    make = lambda groups: contrib.wgsef_prox(groups, sparsity=0.5, strength=0.5)
    gm.assert_sharded_alike(make, "conv")


def test_bad_input_is_named():
    params, _, groups = gm.make("attention")
    tx = contrib.wgsef_prox(groups, sparsity=0.5, strength=0.1)
    with pytest.raises(ValueError, match="cannot be attributed to one of them"):
        tx.init(params)
    groups = disjoint(groups)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        contrib.wgsef_prox(groups, sparsity=1.0, strength=0.1)
    with pytest.raises(ValueError, match="strength must be at least 0"):
        contrib.wgsef_prox(groups, sparsity=0.5, strength=float("nan"))
    with pytest.raises(ValueError, match="costs: expected a cost for each group"):
        contrib.wgsef_prox(groups, sparsity=0.5, strength=0.1, costs={"q": 1})
    costs = dict.fromkeys(groups, 0)
    with pytest.raises(ValueError, match="needs a positive number or an array"):
        contrib.wgsef_prox(groups, sparsity=0.5, strength=0.1, costs=costs)
    with pytest.raises(ValueError, match="needs the parameters"):
        contrib.wgsef_prox(groups, sparsity=0.5, strength=0.1).update(params, None)
