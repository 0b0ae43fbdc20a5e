"""Gates, the knapsack against all subsets, and learnable N:M depth."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo.models import ZOO, array, loosely

import jaxsparse as js


@pytest.mark.usefixtures("x64")
def test_gates_of_one_and_zero_are_the_model_and_the_one_without():
    apply_fn, params, inputs = ZOO["rope_interleaved"]()
    trace = js.trace(apply_fn, params, *inputs)
    with_gates = jax.jit(js.depth.gated(trace))
    names = list(js.depth.residual_blocks(trace))
    gone = names[1:3]
    whole = jax.jit(apply_fn)(params, *inputs)
    ones = dict.fromkeys(names, 1.0)
    np.testing.assert_allclose(with_gates(params, ones, *inputs), whole, rtol=1e-12)
    small = js.depth.remove_blocks(trace, params, gone)
    got = with_gates(params, {**ones, **dict.fromkeys(gone, 0.0)}, *inputs)
    expected = jax.jit(small.apply_fn)(small.params, *inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_trained_gates_close_what_is_not_needed():
    """Of three branches the middle one does almost nothing to the outputs."""
    rng = np.random.default_rng(0)
    draw = lambda scale: {
        "up": rng.normal(size=(4, 8)).astype(np.float32),
        "down": (scale * rng.normal(size=(8, 4))).astype(np.float32),
    }
    params = [draw(1.0), draw(0.01), draw(1.0)]

    def apply_fn(params, x):
        for p in params:
            x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        return x

    x = rng.normal(size=(64, 4)).astype(np.float32)
    trace = js.trace(apply_fn, params, x)
    sizes = {
        name: block.parameters
        for name, block in js.depth.residual_blocks(trace).items()
    }
    with_gates, y = js.depth.gated(trace), jax.jit(apply_fn)(params, x)

    def loss(logits, weight):
        gates = jax.tree.map(jax.nn.sigmoid, logits)
        penalty = js.contrib.gate_penalty(gates, sizes, budget=2 / 3)
        error = jnp.mean((with_gates(params, gates, x) - y) ** 2)
        return error + 10 * penalty.excess + weight * penalty.polarization

    tx = optax.adam(0.1)
    logits = dict.fromkeys(sizes, np.float32(1))

    @jax.jit
    @loosely
    def step(logits, state, weight):
        updates, state = tx.update(jax.grad(loss)(logits, weight), state)
        return optax.apply_updates(logits, updates), state

    state = jax.jit(tx.init)(logits)
    for i in range(200):
        logits, state = step(logits, state, i / 200)
    gates = {name: 1 / (1 + np.exp(-float(x))) for name, x in logits.items()}
    assert [name for name, gate in gates.items() if gate < 0.1] == ["1"]
    assert gates["0"] > 0.9
    assert gates["2"] > 0.9
    small = js.depth.remove_blocks(trace, params, ["1"])
    without = jax.jit(apply_fn)([params[0], params[2]], x)
    got = jax.jit(small.apply_fn)(small.params, x)
    np.testing.assert_allclose(got, without, atol=1e-5)
    # What goes added 0.01 times eight products, of which the last branch made more.
    np.testing.assert_allclose(got, y, atol=0.2)


def test_errors_of_gate_penalties():
    with pytest.raises(ValueError, match=r"same blocks: \['b'\]"):
        js.contrib.gate_penalty({"a": 1.0}, {"a": 1, "b": 2}, budget=0.5)
    with pytest.raises(ValueError, match=r"budget=2: expected a fraction"):
        js.contrib.gate_penalty({"a": 1.0}, {"a": 1}, budget=2)
    with pytest.raises(ValueError, match=r"costs must be at least 0"):
        js.contrib.gate_penalty({"a": 1.0}, {"a": 0}, budget=0.5)
    with pytest.raises(ValueError, match=r"a: a gate is a scalar, got .*\(2,\)"):
        js.contrib.gate_penalty(
            {"a": np.ones(2, np.float32), "b": 1.0}, {"a": 1, "b": 1}, budget=0.5
        )


def checkpointed(params, x):
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, p):
        x = x + jnp.tanh(x @ p["a"])
        return jnp.sin(x @ p["b"]) + x

    outer = lambda x, p: (jax.lax.scan(lambda x, p: (layer(x, p), 0), x, p)[0], x)
    x, xs = jax.lax.scan(outer, x, params, reverse=True)
    return x + xs.sum(0) @ params["b"][0, 0]


@pytest.mark.usefixtures("x64")
def test_gates_in_scans_with_checkpoints():
    params = {k: np.asarray(array(2, 3, 4, 4, seed=i)) for i, k in enumerate("ab")}
    x = array(2, 4, seed=2)
    trace = js.trace(checkpointed, params, x)
    names = list(js.depth.residual_blocks(trace))
    assert names[:3] == ["a[1,0]", "b[1,0]", "a[1,1]"]
    with_gates = js.depth.gated(trace)
    program = jax.make_jaxpr(with_gates)(params, {"a[0,2]": 1.0}, x)
    assert [e.primitive.name for e in program.jaxpr.eqns].count("scan") == 1
    assert "remat" in str(program) or "checkpoint" in str(program)
    gates = dict.fromkeys(("a[1,0]", "b[0,1]", "b[1,2]"), 0.0)
    small = js.depth.remove_blocks(trace, params, gates)
    loss = lambda f: lambda *args: jnp.sum(jnp.cos(f(*args)))
    value = jax.jit(jax.value_and_grad(loss(with_gates), (1, 2)))
    got, (slopes, of_x) = value(params, gates, x)
    less = jax.jit(jax.value_and_grad(loss(small.apply_fn), 1))
    expected, slope = less(small.params, x)
    np.testing.assert_allclose(got, expected, rtol=1e-11)
    np.testing.assert_allclose(of_x, slope, rtol=1e-11)
    for name in gates:
        at = lambda g, name=name: value(params, {**gates, name: g}, x)[0]
        by_hand = (at(1e-6) - at(-1e-6)) / 2e-6
        np.testing.assert_allclose(slopes[name], by_hand, rtol=1e-6, atol=1e-8)


def two(params, x):
    for p in params:
        x = x + jnp.tanh(x @ p["w"])
        x = x + x @ p["v"]
    return x


@pytest.mark.usefixtures("x64")
def test_gates_multiply_branches_and_have_derivatives():
    params = [{k: np.asarray(array(3, 3, seed=i)) for k in "vw"} for i in range(2)]
    x = array(2, 3, seed=7)
    trace = js.trace(two, params, x)
    assert list(js.depth.residual_blocks(trace)) == ["0/w", "0/v", "1/w", "1/v"]

    def by_hand(g, x):
        for p, (a, b) in zip(params, g, strict=True):
            x = x + a * np.tanh(x @ p["w"])
            x = x + b * (x @ p["v"])
        return x

    with_gates = js.depth.gated(trace)
    gates = {"0/w": 0.5, "1/v": -2.0}  # none for the others
    expected = by_hand([(0.5, 1), (1, -2.0)], np.asarray(x))
    np.testing.assert_allclose(with_gates(params, gates, x), expected, rtol=1e-12)
    other = array(5, 3, seed=8)
    expected = by_hand([(0.5, 1), (1, -2.0)], np.asarray(other))
    joined = js.depth.gated(trace, join=lambda b: b.name[0])

    @jax.jit
    def run(gates, gate):
        grads = jax.grad(lambda g: with_gates(params, g, x).sum())(gates)
        return with_gates(params, gates, other), grads, joined(params, {"1": gate}, x)

    got, grads, quarter = run(gates, 0.25)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    eps = 1e-6
    for name, change in (("0/w", [(eps, 0), (0, 0)]), ("1/v", [(0, 0), (0, eps)])):
        at = lambda sign, change=change: by_hand(
            np.array([(0.5, 1), (1, -2.0)]) + sign * np.array(change), np.asarray(x)
        ).sum()
        slope = (at(1) - at(-1)) / (2 * eps)
        np.testing.assert_allclose(grads[name], slope, rtol=1e-7)
    expected = by_hand([(1, 1), (0.25, 0.25)], np.asarray(x))
    np.testing.assert_allclose(quarter, expected, rtol=1e-12)


def test_errors_of_gates():
    ones = lambda *shape: np.ones(shape, np.float32)
    params, x = [{"w": ones(3, 3), "v": ones(3, 3)}], ones(2, 3)
    with_gates = js.depth.gated(js.trace(two, params, x))
    with pytest.raises(ValueError, match="0/x: not a block of this model"):
        with_gates(params, {"0/x": 1.0}, x)
    with pytest.raises(ValueError, match=r"gates\['0/w'\] must be a scalar.*\(2,\)"):
        with_gates(params, {"0/w": ones(2)}, x)


def cheapest(losses, sizes, at_least):
    """The least loss over all subsets."""
    names = list(losses)
    return min(
        sum(losses[n] for n in subset)
        for k in range(len(names) + 1)
        for subset in itertools.combinations(names, k)
        if sum(sizes[n] for n in subset) >= at_least
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_the_best_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    names = [f"b{i}" for i in range(9)]
    factor = int(rng.integers(1, 1000))
    losses = dict(zip(names, rng.exponential(size=9).tolist(), strict=True))
    sizes = dict(zip(names, (factor * rng.integers(1, 20, 9)).tolist(), strict=True))
    for at_least in rng.integers(0, sum(sizes.values()) + 1, 5).tolist():
        gone = js.depth.knapsack(losses, sizes, at_least=at_least)
        assert sum(sizes[n] for n in gone) >= at_least
        best = cheapest(losses, sizes, at_least)
        np.testing.assert_allclose(sum(losses[n] for n in gone), best, rtol=1e-12)
        assert list(gone) == [n for n in names if n in gone]


def test_the_knapsack_in_coarse_units_still_removes_enough(monkeypatch):
    rng = np.random.default_rng(3)
    names = [f"b{i}" for i in range(10)]
    losses = dict(zip(names, rng.exponential(size=10).tolist(), strict=True))
    sizes = dict(zip(names, rng.integers(900, 5000, 10).tolist(), strict=True))
    by_hand = js.depth.knapsack(losses, sizes, at_least=9000, unit=250)
    assert sum(sizes[n] for n in by_hand) >= 9000
    exact = js.depth.knapsack(losses, sizes, at_least=9000)
    total = lambda gone: sum(losses[n] for n in gone)
    assert total(exact) <= total(by_hand)
    # A table of few cells is made coarser by itself.
    monkeypatch.setattr("jaxsparse.depth._depth.CELLS", 1000)
    for at_least in (1, 9000, 20_000, sum(sizes.values())):
        gone = js.depth.knapsack(losses, sizes, at_least=at_least)
        assert sum(sizes[n] for n in gone) >= at_least


def test_a_block_that_costs_nothing_stays_if_it_may():
    losses, sizes = {"a": 0.0, "b": 1.0}, {"a": 5, "b": 5}
    assert js.depth.knapsack(losses, sizes, at_least=0) == ()
    assert js.depth.knapsack(losses, sizes, at_least=3) == ("a",)
    assert js.depth.knapsack({"a": -1.0, "b": 1.0}, sizes, at_least=0) == ("a",)


def test_errors_of_the_knapsack():
    with pytest.raises(ValueError, match="have 3 altogether"):
        js.depth.knapsack({"a": 1.0}, {"a": 3}, at_least=4)
    with pytest.raises(ValueError, match="same blocks"):
        js.depth.knapsack({"a": 1.0}, {"b": 3}, at_least=1)
    with pytest.raises(ValueError, match=r"losses\['a'\] must be a finite number"):
        js.depth.knapsack({"a": float("nan")}, {"a": 3}, at_least=1)
    with pytest.raises(TypeError, match="integer"):
        js.depth.knapsack({"a": 1.0}, {"a": 3.5}, at_least=1)


OPTIONS = [(1, 1, 0), (1, 0, 1), (0, 1, 1)]


def test_options():
    np.testing.assert_array_equal(js.depth.nm_options(2, 3), OPTIONS)
    assert js.depth.nm_options(2, 5).shape == (10, 5)
    assert set(js.depth.nm_options(2, 5).sum(1).tolist()) == {2}
    with pytest.raises(ValueError, match="at least 3"):
        js.depth.nm_options(3, 2)


@pytest.mark.usefixtures("x64")
def test_gates_are_those_of_a_gumbel_softmax(getkey):
    key, logits = getkey(), np.asarray(array(4, 3)) / 50
    noise = np.asarray(jax.random.gumbel(key, (4, 3), jnp.float64))
    z = (100 * logits + noise) / 0.5
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    settings = {"key": key, "keep": 2, "of": 3, "temperature": 0.5}
    weight = np.asarray(array(12, seed=3))

    @jax.jit
    def run(logits):
        slope = lambda hard: jax.grad(
            lambda x: jnp.dot(weight, js.depth.nm_gates(x, **settings, hard=hard))
        )(logits)
        return (
            js.depth.nm_gates(logits, **settings, hard=False),
            slope(True),
            slope(False),
        )

    soft, of_hard, of_soft = run(logits)
    np.testing.assert_allclose(soft, (p @ np.array(OPTIONS)).ravel(), rtol=1e-12)
    hard = js.depth.nm_gates(logits, **settings)
    expected = np.array(OPTIONS)[p.argmax(1)].ravel()
    np.testing.assert_array_equal(hard, expected)
    # The hard gates have the derivative of the soft ones.
    np.testing.assert_allclose(of_hard, of_soft, rtol=1e-12)
    assert np.abs(of_hard).max() > 0


def test_training_finds_the_layers_that_are_needed(getkey):
    """Of four layers in two groups the second and the third do something useful."""

    def apply_fn(params, x):
        for w in params:
            x = x + x @ w
        return x

    bad = np.eye(3, dtype=np.float32)
    good = bad[[1, 2, 0]]
    params = [bad, good, good, bad]
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    trace = js.trace(apply_fn, params, x)
    names, with_gates = list(js.depth.residual_blocks(trace)), js.depth.gated(trace)
    target = apply_fn([good, good], x)
    settings = {"keep": 1, "of": 2, "temperature": 1.0, "scale": 10.0}

    @jax.jit
    def step(logits, key):
        def loss(logits):
            gates = js.depth.nm_gates(logits, key=key, **settings)
            gates = dict(zip(names, gates, strict=True))
            return jnp.mean((with_gates(params, gates, x) - target) ** 2)

        return logits - 0.02 * jax.grad(loss)(logits)

    logits = np.full((2, 2), 0.02, np.float32)
    for _ in range(60):
        logits = step(logits, getkey())
    kept = js.depth.nm_options(1, 2)[np.argmax(logits, axis=1)].ravel()
    assert kept.tolist() == [False, True, True, False]


def test_errors_of_learnable_depth(getkey):
    settings = {"key": getkey(), "keep": 1, "of": 3}
    zeros = lambda *shape: np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"expected the shape \[groups, 3\]"):
        js.depth.nm_gates(zeros(2, 2), temperature=1.0, **settings)
    with pytest.raises(TypeError, match="logits"):
        js.depth.nm_gates(np.zeros((2, 3), np.int32), temperature=1.0, **settings)
    with pytest.raises(ValueError, match="temperature must be positive"):
        js.depth.nm_gates(zeros(2, 3), temperature=0.0, **settings)
