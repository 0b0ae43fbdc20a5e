"""Mass targets by loops, predictors and their derivatives, and a training of one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import adaptive


def slowly(maps, mass):
    """The targets of one input, by their words."""
    largest = np.abs(maps).reshape(-1, maps.shape[-1]).max(0)
    kept, total = np.zeros(len(largest), bool), 0.0
    if largest.sum() == 0:
        return kept
    for f in sorted(range(len(largest)), key=lambda f: (-largest[f], f)):
        total += largest[f] / largest.sum()
        kept[f] = total <= mass + 1e-5 and largest[f] > 0
    return kept


@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
def test_targets_are_those_of_the_words(mass):
    rng = np.random.default_rng(0)
    maps = np.maximum(rng.standard_normal((6, 2, 3, 9)), 0).astype(np.float32)
    maps[0] = 0  # nothing at all
    maps[1, ..., 4] = 0
    maps[2, ..., 5] = maps[2, ..., 2]  # a tie
    got = jax.jit(lambda x: adaptive.mass_targets(x, mass=mass))(maps)
    expected = [slowly(np.float64(x), mass) for x in maps]
    np.testing.assert_array_equal(got, expected)
    assert not np.any(got[0])
    assert mass < 1 or np.sum(~got[1]) == np.sum(maps[1].max((0, 1)) == 0) > 0


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_batch_that_is_spread_over_devices_stays_so(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(AxisType, kind),))
    maps = np.random.default_rng(4).random((8, 4, 3)).astype(np.float32)
    made = adaptive.init_filter_predictor(3, 5, key=jax.random.key(0))

    @jax.jit
    def run(maps):
        gates = adaptive.filter_gates(adaptive.filter_logits(made, maps))
        return gates, adaptive.mass_targets(maps, mass=0.7)

    lie = NamedSharding(mesh, P("x"))
    for a, b in zip(run(jax.device_put(maps, lie)), run(maps), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
        assert a.sharding.is_equivalent_to(lie, a.ndim)


def test_which_derivatives_there_are():
    rng = np.random.default_rng(1)
    maps = jnp.asarray(rng.standard_normal((2, 4, 3)), jnp.float32)
    made = adaptive.init_filter_predictor(3, 5, key=jax.random.key(0))
    assert np.std(made.kernel) > 0

    def loss(maps, made, **options):
        logits = adaptive.filter_logits(made, maps, **options)
        targets = adaptive.mass_targets(logits, mass=0.5)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets))

    by_maps, by_made = jax.grad(loss, (0, 1))(maps, made)
    assert not np.any(by_maps)
    assert all(np.any(g) for g in by_made)
    assert np.any(jax.grad(lambda x: loss(x, made, decoupled=False))(maps))
    mean = adaptive.filter_logits(made, maps, pool="mean")
    expected = np.asarray(maps).mean(1) @ np.asarray(made.kernel)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)


def test_gates_are_exact_with_the_derivative_of_the_sigmoid():
    logits = jnp.asarray([[-30.0, -1e-6, 0.0, 1e-6, 2.0]])
    gates, pull = jax.vjp(adaptive.filter_gates, logits)
    assert gates.tolist() == [[0, 0, 0, 1, 1]]
    s = 1 / (1 + np.exp(-np.float64(logits)))
    np.testing.assert_allclose(pull(jnp.ones_like(logits))[0], s * (1 - s), rtol=1e-5)
    assert adaptive.filter_gates(logits.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.usefixtures("relaxed_promotion")
def test_predictors_learn_which_filters_an_input_needs():
    """Two kinds of inputs wake up two halves of the filters."""
    rng = np.random.default_rng(2)
    kind = rng.integers(0, 2, 64)
    x = rng.random((64, 4, 4, 2)).astype(np.float32) * np.eye(2)[kind][:, None, None]
    kernel = np.kron(np.eye(2), np.ones((1, 3))).astype(np.float32)  # 2 -> 6
    whole = jnp.asarray(x, jnp.float32) @ kernel
    targets = adaptive.mass_targets(whole, mass=1.0)
    np.testing.assert_array_equal(targets, (np.arange(6) // 3)[None] == kind[:, None])
    tx = optax.adam(0.1)

    def loss_fn(made):
        logits = adaptive.filter_logits(made, x.astype(np.float32))
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets))

    def step(carry, _):
        made, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(made), state)
        return (optax.apply_updates(made, updates), state), None

    start = adaptive.init_filter_predictor(2, 6, key=jax.random.key(3))
    run = jax.jit(lambda m: jax.lax.scan(step, (m, tx.init(m)), length=150)[0][0])
    logits = adaptive.filter_logits(run(start), x.astype(np.float32))
    gates = adaptive.filter_gates(logits)
    np.testing.assert_array_equal(gates, targets)
    assert jnp.mean(gates) == 0.5


def test_errors():
    maps = jnp.ones((2, 4, 3))
    made = adaptive.init_filter_predictor(3, 5, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"mass must lie in \(0, 1\]"):
        adaptive.mass_targets(maps, mass=0.0)
    with pytest.raises(ValueError, match=r"maps: expected \[batch"):
        adaptive.mass_targets(jnp.ones(3), mass=0.5)
    with pytest.raises(TypeError, match=r"maps.*int32"):
        adaptive.mass_targets(jnp.ones((2, 3), jnp.int32), mass=0.5)
    with pytest.raises(ValueError, match="pool must be one of"):
        adaptive.filter_logits(made, maps, pool="sum")
    with pytest.raises(ValueError, match=r"expected \[batch, \*spatial, 3\]"):
        adaptive.filter_logits(made, jnp.ones((2, 4)))
    with pytest.raises(TypeError, match="predictor must be what"):
        adaptive.filter_logits((1, 2), maps)
    with pytest.raises(ValueError, match="predictor: expected a kernel"):
        adaptive.filter_logits(made._replace(bias=jnp.ones(3)), maps)
    with pytest.raises(TypeError, match="floating"):
        adaptive.filter_gates(jnp.ones(3, bool))
