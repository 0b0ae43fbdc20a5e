"""Learned widths by loops in float64, their derivatives, and a training to a budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from penalties import group_models as gm

import jaxsparse as js
from jaxsparse import masking


def slowly(pi, numbers, size, scores, temperature):
    """The gates of one copy, by their words."""
    p = np.exp(pi / temperature - np.max(pi / temperature))
    p /= p.sum()
    order = sorted(range(size), key=lambda c: (-scores[c], c))
    width = next(n for n in numbers if n >= np.sum(p * numbers) - 1e-5 * size)
    soft, hard = np.zeros(size), np.zeros(size)
    for rank, c in enumerate(order):
        soft[c] = sum(q for q, n in zip(p, numbers, strict=True) if n > rank)
        hard[c] = rank < width
    return soft, hard


@pytest.mark.usefixtures("x64")
def test_gates_are_those_of_the_words():
    _, _, groups = gm.make("conv", dtype="float64")
    rng = np.random.default_rng(0)
    candidates = {n: sorted({1, 2, g.size}) for n, g in groups.items()}
    assert {len(x) for x in candidates.values()} == {2, 3}
    logits = {n: rng.standard_normal(len(x)) for n, x in candidates.items()}
    scores = {  # with ties
        n: rng.integers(0, 3, (*g.copies, g.size)).astype(np.float64)
        for n, g in groups.items()
    }
    run = jax.jit(
        lambda logits, scores: masking.width_gates(
            groups, logits, candidates=candidates, temperature=0.7, scores=scores
        )
    )
    soft, hard = run(logits, scores)
    for name, g in groups.items():
        for copy in np.ndindex(*g.copies):
            own = scores[name][copy]
            expected = slowly(logits[name], candidates[name], g.size, own, 0.7)
            np.testing.assert_allclose(soft[name][copy], expected[0], rtol=1e-12)
            np.testing.assert_array_equal(hard[name][copy], expected[1])


def test_a_number_that_is_certain_is_the_width():
    """Rounding of the probabilities neither adds a channel nor takes one away."""
    params = {"up": np.ones((2, 512), np.float32), "down": np.ones((512, 1))}
    params = jax.tree.map(jnp.float32, params)
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    x = jnp.ones((1, 2))
    groups = js.coupling.groups(js.trace(apply_fn, params, x))
    one = lambda pi: masking.width_gates(groups, {"up[1]": pi})
    rows = np.random.default_rng(0).permutation(512)[:64]
    soft, hard = jax.jit(jax.vmap(one))(30 * np.eye(512, dtype=np.float32)[rows])
    expected = np.arange(512)[None] <= rows[:, None]
    np.testing.assert_array_equal(hard["up[1]"], expected)
    np.testing.assert_allclose(soft["up[1]"], expected, atol=1e-6)


def test_first_logits_and_candidates():
    _, _, groups = gm.make("mlp")
    logits = masking.init_width_logits(groups, candidates=3, whole=0.75)
    for name, g in groups.items():
        numbers = sorted({*range(3, g.size, 3), g.size})
        p = jax.nn.softmax(logits[name])
        assert p.shape == (len(numbers),)
        np.testing.assert_allclose(p[-1], 0.75, rtol=1e-6)
    few = masking.init_width_logits(groups, candidates={next(iter(groups)): [2]})
    assert {n: x.shape for n, x in few.items()} == {next(iter(groups)): (1,)}


def test_hard_gates_have_the_derivative_of_the_soft_ones():
    _, _, groups = gm.make("mlp")
    name = next(n for n, g in groups.items() if g.size == 8)
    pi = np.random.default_rng(3).standard_normal(8).astype(np.float32)
    ct = np.random.default_rng(4).standard_normal(8).astype(np.float32)

    @jax.jit
    def both(pi):
        gates = masking.width_gates(groups, {name: pi})
        return jnp.sum(gates.soft[name] * ct), jnp.sum(gates.hard[name] * ct)

    of_soft, of_hard = jax.jacrev(both)(pi)
    np.testing.assert_array_equal(of_soft, of_hard)
    # By hand: d soft_r / d pi_j = p_j ([n_j > r] - soft_r).
    p = np.exp(np.float64(pi)) / np.sum(np.exp(np.float64(pi)))
    keep = np.arange(1, 9)[:, None] > np.arange(8)  # [number, rank]
    expected = p * (keep @ ct - (p @ keep) @ ct)
    np.testing.assert_allclose(of_soft, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_divergence_trains_the_hard_weights_and_all_gates():
    params, x, groups = gm.make("mlp", dtype="float64")
    rng = np.random.default_rng(5)
    logits = {n: jnp.asarray(rng.standard_normal(g.size)) for n, g in groups.items()}

    def gates_of(logits):
        return masking.width_gates(groups, logits)

    def divergence(params, logits):
        gates = gates_of(logits)
        out = masking.soft_to_hard(gm.mlp, groups, params, gates, x)
        return jnp.sum(out.divergence)

    def kl(soft_params, soft_logits, hard_params, hard_logits):
        run = lambda p, g: gm.mlp(js.channels.scale_channels(groups, p, g), x)
        p = jax.nn.softmax(run(soft_params, gates_of(soft_logits).soft))
        q = jax.nn.softmax(run(hard_params, gates_of(hard_logits).hard))
        return jnp.sum(p * (jnp.log(p) - jnp.log(q)))

    both = jax.jit(jax.value_and_grad(divergence, (0, 1)))
    value, (by_params, by_logits) = both(params, logits)
    expected, parts = jax.jit(jax.value_and_grad(kl, (1, 2, 3)))(
        params, logits, params, logits
    )
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12)
    jax.tree.map(close, by_params, parts[1])
    jax.tree.map(lambda got, a, b: close(got, a + b), by_logits, parts[0], parts[2])
    assert all(np.any(g != 0) for g in jax.tree.leaves(by_logits))


@pytest.mark.usefixtures("relaxed_promotion")
def test_training_meets_the_budget_and_narrows():
    """Four of sixteen hidden units carry all; the loss keeps those that it needs."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((128, 6)).astype(np.float32)
    labels = (np.abs(x[:, 0]) + np.abs(x[:, 1]) > 1.6).astype(np.int32)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2, jnp.float32)
    params = {"up": draw(6, 16), "bias": draw(16), "down": draw(16, 2)}

    def apply_fn(p, x):
        return jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"]

    trace = js.trace(apply_fn, params, x)
    groups = js.coupling.groups(trace).prunable
    traced = []

    def loss_fn(trained):
        traced.append(1)
        params, logits = trained
        gates = masking.width_gates(groups, logits, candidates=4)
        out = masking.soft_to_hard(apply_fn, groups, params, gates, x)
        task = optax.losses.softmax_cross_entropy_with_integer_labels(out.soft, labels)
        share = js.narrowing.flops_share(trace, gates.hard)
        cost = 10.0 * (share - 0.5) ** 2
        return jnp.mean(task) + jnp.mean(out.divergence) + cost, jnp.mean(
            jnp.argmax(out.hard, -1) == labels
        )

    tx = optax.adam(0.02)

    @jax.jit
    def train(trained, state):
        def step(carry, _):
            trained, state = carry
            (_, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(trained, updates), state), accuracy

        return jax.lax.scan(step, (trained, state), length=150)

    trained = params, masking.init_width_logits(groups, candidates=4)
    carry, _ = train(trained, tx.init(trained))
    once = len(traced)
    ((params, logits), _), accuracy = train(*carry)
    assert len(traced) == once
    gates = masking.width_gates(groups, logits, candidates=4)
    drop = js.channels.drop_closed(gates.hard)
    assert js.channels.dropped_fraction(drop) == 0.5
    assert accuracy[-1] > 0.85
    small = js.narrowing.narrow(trace, params, drop)
    hard = apply_fn(js.channels.scale_channels(groups, params, gates.hard), x)
    np.testing.assert_allclose(small.apply_fn(small.params, x), hard, atol=1e-5)


@pytest.mark.parametrize(("kind", "of"), [("Auto", "model"), ("Explicit", "data")])
def test_two_devices_give_the_gradients_of_one(kind, of):
    params, x, groups = gm.make("mlp")
    trace = js.trace(gm.mlp, params, x)
    logits = masking.init_width_logits(groups)

    def loss(params, logits, x):
        scores = js.channels.channel_scores(groups, js.scores.magnitude(params))
        gates = masking.width_gates(groups, logits, scores=scores)
        out = masking.soft_to_hard(gm.mlp, groups, params, gates, x)
        cost = (js.narrowing.flops_share(trace, gates.hard) - 0.5) ** 2
        return jnp.mean(out.soft**2) + jnp.mean(out.divergence) + cost

    run = jax.jit(jax.grad(loss, (0, 1)))
    expected = run(params, logits, x)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(getattr(AxisType, kind),))
    put = lambda x, spec: jax.device_put(np.asarray(x), NamedSharding(mesh, spec))
    specs = {"a": P(None, "x"), "b": P("x")} if of == "model" else {}
    spread = {path: put(w, specs.get(path, P())) for path, w in params.items()}
    whole = {name: put(pi, P()) for name, pi in logits.items()}
    got = run(spread, whole, put(x, P("x") if of == "data" else P()))
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(np.asarray(g), e, atol=1e-6),
        got,
        expected,
    )
    for path in specs or params:  # the compiler spreads others as it likes
        assert got[0][path].sharding.is_equivalent_to(spread[path].sharding, 2)


def test_errors():
    params, x, groups = gm.make("mlp")
    name = next(n for n, g in groups.items() if g.size == 8)
    logits = masking.init_width_logits(groups)
    with pytest.raises(ValueError, match=r"a\[9\] is no prunable group"):
        masking.init_width_logits(groups, candidates={"a[9]": [1]})
    with pytest.raises(ValueError, match="must ascend from 1 at least to 8"):
        masking.init_width_logits(groups, candidates={name: [2, 2]})
    with pytest.raises(TypeError, match="must be a list of integers"):
        masking.init_width_logits(groups, candidates={name: [0.5]})
    with pytest.raises(ValueError, match="whole must"):
        masking.init_width_logits(groups, whole=1.0)
    with pytest.raises(ValueError, match="has logits of shape"):
        masking.width_gates(groups, logits, candidates=2)
    with pytest.raises(ValueError, match="temperature must be positive"):
        masking.width_gates(groups, logits, temperature=0.0)
    with pytest.raises(ValueError, match=r"scores of shape \(3,\)"):
        masking.width_gates(
            groups, {name: logits[name]}, scores={name: np.ones(3, np.float32)}
        )
    with pytest.raises(ValueError, match="has logits and no scores"):
        masking.width_gates(groups, logits, scores={name: np.ones(8, np.float32)})
    gates = masking.width_gates(groups, logits)
    with pytest.raises(TypeError, match="gates must be what"):
        masking.soft_to_hard(gm.mlp, groups, params, gates.soft, x)
