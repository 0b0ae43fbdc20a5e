"""What eight workers exchange, step by step against NumPy, and what moves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import exchange

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

WORKERS = 8
PARAMS = {"w": np.zeros((10, 12), np.float32), "bias": np.zeros(3, np.float32)}


@functools.cache
def mesh():
    return jax.make_mesh(
        (WORKERS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )


def gradients(step):
    rng = np.random.default_rng([0, step])
    draw = lambda w: rng.standard_normal((WORKERS, *w.shape)).astype(np.float32)
    return {k: draw(w) for k, w in PARAMS.items()}


def run(tx, steps):
    """Updates of some steps, and the state after each."""
    state = tx.init(PARAMS)
    split = exchange.specs(state, "data")
    own = lambda grads, state: tx.update(jax.tree.map(lambda g: g[0], grads), state)
    update = jax.jit(
        jax.shard_map(
            own, mesh=mesh(), in_specs=(P("data"), split), out_specs=(P(), split)
        )
    )
    for t in range(steps):
        updates, state = update(gradients(t), state)
        yield updates, state
    assert update._cache_size() <= 2  # the first settles where the state lies


def sent_of(v, count):
    """Each worker's largest entries, and zeros."""
    flat = v.reshape(len(v), -1)
    cut = np.sort(np.abs(flat), 1)[:, -count][:, None]
    return np.where(np.abs(flat) >= cut, flat, 0).reshape(v.shape)


@pytest.mark.parametrize("remembers", [True, False])
def test_top_k_sends_the_largest_and_remembers_the_rest(remembers):
    tx = exchange.top_k(
        0.1, axis_name="data", workers=WORKERS, error_feedback=remembers
    )
    unsent = np.zeros((WORKERS, 10, 12), np.float32)
    for t, (updates, state) in enumerate(run(tx, 3)):
        g = gradients(t)
        v = unsent + g["w"] if remembers else g["w"]
        sent = sent_of(v, 12)
        np.testing.assert_allclose(updates["w"], sent.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            updates["bias"], g["bias"].mean(0), rtol=1e-5, atol=1e-7
        )
        unsent = v - sent  # what was there is sent or remembered
        if remembers:
            np.testing.assert_allclose(state.unsent["w"], unsent, rtol=1e-6)
        assert float(state.bytes_moved) == (t + 1) * (12 * 8 + 3 * 4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_dgc_clears_momentum_where_it_has_sent(nesterov):
    tx = exchange.dgc(0.1, axis_name="data", workers=WORKERS, nesterov=nesterov)
    u = v = np.zeros((WORKERS, 10, 12), np.float32)
    u_bias = 0
    for t, (updates, state) in enumerate(run(tx, 4)):
        g = gradients(t)
        if nesterov:
            u = 0.9 * (u + g["w"])
            v = v + u + g["w"]
            u_bias = 0.9 * (u_bias + g["bias"])
            bias = u_bias + g["bias"]
        else:
            u = 0.9 * u + g["w"]
            v = v + u
            bias = u_bias = 0.9 * u_bias + g["bias"]
        sent = sent_of(v, 12)
        u, v = np.where(sent == 0, u, 0), v - sent
        np.testing.assert_allclose(updates["w"], sent.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(updates["bias"], bias.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.velocity["w"], u, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.unsent["w"], v, rtol=1e-4, atol=1e-6)


def test_the_warm_up_sends_more_at_first():
    tx = exchange.dgc(
        0.01, axis_name="data", workers=WORKERS, warmup_steps=4, warmups=1
    )
    moved = [float(state.bytes_moved) for _, state in run(tx, 6)]
    counts = np.diff(np.array([0, *moved])) / 8 - 3 * 4 / 8
    np.testing.assert_array_equal(counts, [12, 12, 12, 12, 2, 2])


def test_ef21_moves_estimates_by_what_is_new():
    tx = exchange.ef21(0.1, axis_name="data", workers=WORKERS)
    own = np.zeros((WORKERS, 10, 12), np.float32)
    for t, (updates, state) in enumerate(run(tx, 3)):
        own = own + sent_of(gradients(t)["w"] - own, 12)
        np.testing.assert_allclose(updates["w"], own.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.own["w"], own, rtol=1e-5, atol=1e-6)


def test_ef21_of_everything_is_the_mean_gradient():
    tx = exchange.ef21(1.0, axis_name="data", workers=WORKERS)
    for t, (updates, _) in enumerate(run(tx, 2)):
        mean = gradients(t)["w"].mean(0)
        np.testing.assert_allclose(updates["w"], mean, rtol=1e-4, atol=1e-6)


def test_ef21_by_weights():
    weights = np.arange(1, 9, dtype=np.float32) / 36
    shares = lambda: jnp.asarray(weights)[jax.lax.axis_index("data")]

    def update(grads, state):
        tx = exchange.ef21(0.1, axis_name="data", workers=8, weight=shares())
        return tx.update(jax.tree.map(lambda g: g[0], grads), state)

    state = exchange.ef21(0.1, axis_name="data", workers=8).init(PARAMS)
    split = exchange.specs(state, "data")
    update = jax.shard_map(
        update, mesh=mesh(), in_specs=(P("data"), split), out_specs=(P(), split)
    )
    updates, _ = jax.jit(update)(gradients(0), state)
    own = sent_of(gradients(0)["w"] / (8 * weights[:, None, None]), 12)
    expected = np.einsum("w,wij->ij", weights, own)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-6)


def test_ef21_reaches_the_minimum_of_quadratics():
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.5, 1.5, (WORKERS, 10, 12)).astype(np.float32)
    centers = rng.standard_normal((WORKERS, 10, 12)).astype(np.float32)
    tx = optax.chain(
        exchange.ef21(0.1, axis_name="data", workers=WORKERS), optax.sgd(0.04)
    )
    params = {"w": jnp.zeros((10, 12))}
    state = tx.init(params)
    split = exchange.specs(state, "data")

    def step(params, state, scale, center):
        grads = {"w": scale[0] * (params["w"] - center[0])}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.shard_map(
        step,
        mesh=mesh(),
        in_specs=(P(), split, P("data"), P("data")),
        out_specs=(P(), split),
    )
    body = lambda _, carry: step(*carry, scales, centers)
    params, _ = jax.jit(lambda c: jax.lax.fori_loop(0, 1000, body, c))((params, state))
    best = (scales * centers).sum(0) / scales.sum(0)
    np.testing.assert_allclose(params["w"], best, atol=1e-4)


def test_only_values_and_indices_travel():
    tx = exchange.dgc(0.01, axis_name="data", workers=WORKERS)
    params = {"w": jnp.zeros((100, 120))}
    state = tx.init(params)
    split = exchange.specs(state, "data")
    update = jax.shard_map(
        lambda g, s: tx.update({"w": g["w"][0]}, s),
        mesh=mesh(),
        in_specs=(P("data"), split),
        out_specs=(P(), split),
    )
    grads = {"w": jnp.zeros((WORKERS, 100, 120))}
    text = jax.jit(update).lower(grads, state).compile().as_text()
    collectives = re.findall(
        r"= (\(?[^=]*?\)?) (all-gather|all-reduce|all-to-all|collective-permute|"
        r"reduce-scatter)(?:-start)?\(",
        text,
    )
    assert collectives
    sizes = re.findall(r"\w+\[([\d,]*)\]", " ".join(shape for shape, _ in collectives))
    entries = sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in sizes)
    assert entries <= 1.05 * WORKERS * 2 * 120


def test_largest_entries_first_and_among_equals_the_first():
    x = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
    x[::3, ::7] = 2.5
    for count in (1, 100, 1000):
        values, indices = jax.jit(exchange.largest, static_argnums=1)(x, count)
        order = np.argsort(-np.abs(x.ravel()), kind="stable")[:count]
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(values, x.ravel()[order])
    x[3, 4] = np.nan
    assert int(exchange.largest(x, 1)[1][0]) == 154


def test_errors_say_what_to_do():
    tx = exchange.top_k(0.1, axis_name="data", workers=WORKERS)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"within jax\.shard_map"):
        tx.update(PARAMS, state)
    whole = jax.shard_map(
        lambda g, s: tx.update(jax.tree.map(lambda g: g[0], g), s),
        mesh=mesh(),
        in_specs=(P("data"), P()),
        out_specs=(P(), P()),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"w: .*js.exchange.specs"):
        whole(gradients(0), state)
    more = exchange.top_k(0.1, axis_name="data", workers=16)
    with pytest.raises(ValueError, match="workers=16, but the mesh axis 'data' has 8"):
        list(run(more, 1))
    with pytest.raises(ValueError, match="fraction"):
        exchange.dgc(0.0, axis_name="data", workers=WORKERS)
    with pytest.raises(TypeError, match="axis_name"):
        exchange.dgc(0.1, axis_name=0, workers=WORKERS)
    with pytest.raises(ValueError, match="count is 3"):
        js.exchange.largest(jnp.ones(2), 3)
