"""FRUGAL against NumPy, step by step; what its state holds, and where it stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import transforms

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

SHAPES = {
    "a": {"bias": (6,), "kernel": (8, 6)},
    "b": {"kernel": (6, 10)},
    "c": {"kernel": (8, 6)},
    "d": {"kernel": (8, 6)},
    "e": {"kernel": (8, 6)},
}
STEPS, EVERY = 5, 2


def of_shapes(make):
    return jax.tree.map(make, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def gradients(step):
    rng = np.random.default_rng([3, step])
    return of_shapes(lambda s: rng.standard_normal(s).astype(np.float32))


def method(optimizer=None, **options):
    given = {"density": 0.5, "every": EVERY, "key": jax.random.key(0), "unit": -1}
    given |= options
    optimizer = optax.scale_by_adam() if optimizer is None else optimizer
    return transforms.frugal(optimizer, optax.scale_by_sign(), **given)


def run(tx, params):
    """Updates and states of some jitted steps."""
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for t in range(STEPS):
        updates, state = update(gradients(t), state, params)
        yield updates, state
    assert update._cache_size() == 1


def drawn_masks(state, unit):
    """Where the optimizer has a coordinate, by path."""
    found = {"a/bias": np.ones(6, bool)}
    if unit == "leaves":  # the only one of its shape
        found["b/kernel"] = np.ones((6, 10), bool)
    for path, indices in state.indices.items():
        indices = np.asarray(indices)
        assert np.all(np.diff(indices) > 0)
        if unit == "leaves":
            assert path == "a/kernel"
            for i, name in enumerate("acde"):
                found[f"{name}/kernel"] = np.full((8, 6), i in indices)
            continue
        mask = np.zeros(SHAPES[path[0]]["kernel"], bool)
        if unit == "entries":
            mask.reshape(-1)[indices] = True
        else:
            np.moveaxis(mask, unit, 0)[indices] = True
        found[path] = mask
    return found


@pytest.mark.parametrize("unit", [-1, 0, "entries", "leaves"])
def test_adam_has_what_is_drawn_and_signs_the_rest(unit):
    params = of_shapes(lambda s: np.ones(s, np.float32))
    seen = []
    for t, (updates, state) in enumerate(run(method(unit=unit), params)):
        masks = drawn_masks(state, unit)
        if t % EVERY == 0:  # all moments begin anew
            m = {path: np.zeros(mask.shape) for path, mask in masks.items()}
            v = {path: np.zeros(mask.shape) for path, mask in masks.items()}
            n = 0
            seen.append(masks)
        n += 1
        assert all(np.array_equal(masks[k], seen[-1][k]) for k in masks)
        grads = dict(js.tree.leaves_with_paths(gradients(t)))
        for path, u in js.tree.leaves_with_paths(updates):
            g = np.float64(grads[path])
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g**2
            adam = m[path] / (1 - 0.9**n) / (np.sqrt(v[path] / (1 - 0.999**n)) + 1e-8)
            expected = np.where(masks[path], adam, np.sign(g))
            np.testing.assert_allclose(u, expected, rtol=2e-5, atol=1e-6)
    counts = {path: int(mask.sum()) for path, mask in seen[0].items()}
    half = {-1: (24, 30), 0: (24, 30), "entries": (24, 30)}.get(unit)
    if half:
        assert (counts["a/kernel"], counts["b/kernel"]) == half
    else:  # two of the four of one shape; the only one of its shape
        assert sum(counts[f"{x}/kernel"] for x in "acde") == 96
        assert counts["b/kernel"] == 60
    # Each draw is another one.
    assert any(not np.array_equal(seen[0][k], seen[1][k]) for k in seen[0])
    assert any(not np.array_equal(seen[1][k], seen[2][k]) for k in seen[0])


def test_a_whole_density_is_the_optimizer_begun_anew():
    params = of_shapes(lambda s: np.ones(s, np.float32))
    tx = optax.trace(0.9)
    held = tx.init(params)
    for t, (updates, _) in enumerate(run(method(tx, density=1.0), params)):
        held = tx.init(params) if t % EVERY == 0 else held
        expected, held = tx.update(gradients(t), held)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(same, updates, expected)


def test_the_first_update_of_momentum_is_the_gradient():
    params = of_shapes(lambda s: np.ones(s, np.float32))
    tx = method(optax.trace(0.9), where=r"b/kernel")
    updates, state = next(run(tx, params))
    chosen = drawn_masks(state, -1)["b/kernel"]
    g = gradients(0)["b"]["kernel"]
    np.testing.assert_array_equal(
        updates["b"]["kernel"], np.where(chosen, g, np.sign(g))
    )
    # What is not split has the optimizer whole.
    np.testing.assert_array_equal(updates["c"]["kernel"], gradients(0)["c"]["kernel"])


@pytest.mark.parametrize(
    ("unit", "moments", "indices"),
    [
        # A quarter of 256 x 128 and of 128 x 64, and the bias, twice (Adam).
        (-1, 2 * (256 * 32 + 128 * 16 + 128), 32 + 16),
        (0, 2 * (64 * 128 + 32 * 64 + 128), 64 + 32),
        ("entries", 2 * (8192 + 2048 + 128), 8192 + 2048),
    ],
)
def test_the_state_holds_moments_of_what_is_drawn_alone(unit, moments, indices):
    shapes = {"up": (256, 128), "down": (128, 64), "bias": (128,)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    state = jax.eval_shape(method(density=0.25, unit=unit).init, params)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(state.optimizer) == moments + 1  # and Adam's count
    assert size(state.indices) == indices
    assert size(state.rest) == 0


def test_leaves_of_one_shape_share_slots():
    params = {f"layer_{i}": {"kernel": jnp.ones((4, 3))} for i in range(8)}
    state = method(density=0.25, unit="leaves").init(params)
    shapes = {x.shape for x in jax.tree.leaves(state.optimizer) if x.ndim}
    assert shapes == {(2, 4, 3)}


def test_schedules_within_go_on_where_moments_begin_anew():
    rates = optax.piecewise_constant_schedule(1.0, {3: 0.5})
    inner = optax.chain(optax.trace(0.9), optax.scale_by_schedule(rates))
    params = of_shapes(lambda s: np.ones(s, np.float32))
    updates = [u["a"]["bias"] for u, _ in run(method(inner), params)]
    g = [gradients(t)["a"]["bias"] for t in range(STEPS)]
    np.testing.assert_allclose(updates[2], g[2], rtol=1e-6)
    np.testing.assert_allclose(updates[3], 0.5 * (g[3] + 0.9 * g[2]), rtol=1e-5)
    np.testing.assert_allclose(updates[4], 0.5 * g[4], rtol=1e-6)


def test_the_same_key_draws_the_same_and_another_does_not():
    params = of_shapes(lambda s: np.ones(s, np.float32))
    of = lambda seed: method(unit="entries", key=jax.random.key(seed)).init(params)
    equal = lambda a, b: all(
        np.array_equal(a.indices[k], b.indices[k]) for k in a.indices
    )
    assert equal(of(0), of(0))
    assert not equal(of(0), of(1))


def test_a_donated_state_leaves_the_key_as_it_is():
    """And the parameters' numbers, from which another state may be made."""
    params, tx = {"w": jnp.ones((4, 6))}, method()
    step = jax.jit(tx.update, donate_argnums=1)
    found = []
    for _ in range(2):
        state = step(params, tx.init(params), params)[1]
        state = step(params, state, params)[1]
        found.append(np.asarray(state.indices["w"]))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("unit", [-1, "entries"])
def test_under_enforce_pruned_weights_stay_zero(unit):

    tx = js.enforce(
        optax.chain(
            transforms.rigl(0.5, every=2, key=jax.random.key(1)),
            method(unit=unit),
            optax.scale_by_learning_rate(1e-2),
        )
    )
    rng = np.random.default_rng(0)
    params = of_shapes(lambda s: rng.standard_normal(s).astype(np.float32))
    params, state = jax.jit(functools.partial(js.init_sparse, tx))(params)
    update = jax.jit(tx.update)
    for t in range(STEPS):
        updates, state = update(gradients(t), state, params)
        params = optax.apply_updates(params, updates)
        for w, mask in zip(
            *map(jax.tree.leaves, (params, js.masks_of(state))), strict=True
        ):
            assert np.all(np.asarray(w)[~np.broadcast_to(mask, w.shape)] == 0)
    js.assert_sparse(state, params)
    assert update._cache_size() == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("unit", [-1, "entries"])
def test_updates_lie_as_parameters_do(unit, kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    put = lambda w: jax.device_put(w, NamedSharding(mesh, P("x", "y")))
    grads = {"w": put(np.random.default_rng(0).standard_normal((8, 12)).astype("f4"))}
    params = {"w": put(np.ones((8, 12), np.float32))}
    tx = method(unit=unit)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        updates, state = jax.jit(tx.update)(grads, state, params)
    plain = {"w": np.ones((8, 12), np.float32)}
    one = tx.update(jax.device_get(grads), tx.init(plain), plain)[0]
    np.testing.assert_allclose(updates["w"], one["w"], rtol=1e-5)
    assert updates["w"].sharding.is_equivalent_to(params["w"].sharding, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\]"),
        ({"density": 25}, ValueError, "density must lie"),
        ({"unit": "columns"}, ValueError, "unit must be one of"),
        ({"unit": 0.5}, TypeError, "unit must be an axis"),
        ({"every": 0.5}, TypeError, "every: a number of steps"),
        ({"key": 0}, TypeError, "key must be a random key"),
        ({"optimizer": optax.adam}, TypeError, "optimizer must be what"),
    ],
)
def test_what_makes_no_split_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        method(**options)


def test_an_axis_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"w: unit is the axis 2, .* has 2"):
        method(unit=2).init({"w": jnp.ones((2, 3))})


def test_it_needs_the_parameters():
    params = {"w": jnp.ones((2, 3))}
    tx = method()
    with pytest.raises(ValueError, match=r"tx\.update\(updates, state, params\)"):
        tx.update(params, tx.init(params))
