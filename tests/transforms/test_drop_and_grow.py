"""Masks that move, step by step against NumPy, and what they keep."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import problems

import jaxsparse as js
from jaxsparse import transforms

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def moved(w, g, mask, fraction):
    """RigL's change of one layer's mask, by sorting."""
    w, g, mask = (np.asarray(x).ravel() for x in (w, g, mask))
    kept = int(mask.sum())
    stay = kept - math.floor(fraction * kept)
    sizes = np.where(mask, np.abs(w), -1)
    new = np.zeros_like(mask)
    new[np.argsort(-sizes, kind="stable")[:stay]] = True
    rest = np.where(new, -1, np.abs(g))
    new[np.argsort(-rest, kind="stable")[: kept - stay]] = True
    return new


def changes(method, steps, shape=(24, 20), optimizer=None):
    """Trains on random gradients: the mask, weights and gradients around each step."""
    tx = method.wrap(optimizer or optax.sgd(0.1), skip_updates=True)
    params, state = js.init_sparse(tx, {"w": jnp.asarray(numbers(0, *shape))})
    update = jax.jit(tx.update)
    seen = []
    for t in range(steps):
        grads = {"w": jnp.asarray(numbers([1, t], *shape))}
        before = params["w"], grads["w"], js.masks_of(state)["w"]
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((*before, params["w"], js.masks_of(state)["w"]))
    return seen


def test_rigl_drops_the_smallest_and_grows_by_the_gradient():
    fraction = optax.cosine_decay_schedule(0.3, 12)
    method = transforms.rigl(0.9, every=3, key=KEY, drop_fraction=fraction)
    for t, (w, g, old, after, new) in enumerate(changes(method, 9)):
        if t % 3:
            np.testing.assert_array_equal(new, old)
            np.testing.assert_allclose(after, np.where(old, w - 0.1 * g, 0), rtol=1e-6)
            continue
        expected = moved(w, g, old, float(fraction(t)))
        np.testing.assert_array_equal(np.ravel(new), expected)
        assert not np.array_equal(new, old)
        # The optimizer rests: what stays is what it was, what has grown is 0.
        np.testing.assert_array_equal(after, np.where(new & old, w, 0))


def test_without_rest_kept_weights_learn_in_every_step():
    method = transforms.rigl(0.5, every=2, key=KEY)
    tx = method.wrap(optax.sgd(0.1))
    params, state = js.init_sparse(tx, {"w": jnp.asarray(numbers(0, 6, 8))})
    grads = {"w": jnp.asarray(numbers(1, 6, 8))}
    updates, state = tx.update(grads, state, params)
    mask = js.masks_of(state)["w"]
    expected = np.where(mask, params["w"] - 0.1 * grads["w"], 0)
    got = optax.apply_updates(params, updates)["w"]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_set_grows_at_random_and_anew_each_time():
    found = changes(transforms.set_(0.8, every=1, key=KEY), 4)
    grown = []
    for w, _, old, _, new in found:
        kept = int(old.sum())
        stay = kept - math.floor(0.3 * kept)
        sizes = np.where(old, np.abs(w), -1).ravel()
        smallest_kept = np.sort(sizes)[-stay]
        stays = (sizes >= smallest_kept).reshape(old.shape)
        assert int(new.sum()) == kept
        assert np.all(new | ~stays)
        grown.append(new & ~stays)
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(grown))


def test_snfs_grows_by_the_mean_gradient():
    method = transforms.snfs(0.8, every=3, key=KEY, decay=0.5)
    mean = 0
    for t, (w, g, old, _, new) in enumerate(changes(method, 7)):
        mean = 0.5 * mean + 0.5 * np.asarray(g, np.float64)
        if t % 3 == 0:
            np.testing.assert_array_equal(np.ravel(new), moved(w, mean, old, 0.3))


def test_static_masks_are_random_and_stay():
    found = changes(transforms.static(0.75, key=KEY), 3)
    other = changes(transforms.static(0.75, key=jax.random.key(1)), 1)
    masks = [new for *_, new in found]
    assert int(masks[0].sum()) == 120
    np.testing.assert_array_equal(masks[0], masks[-1])
    assert not np.array_equal(masks[0], other[0][-1])


@pytest.mark.parametrize(
    ("pattern", "units"),
    [
        (js.NM(2, 4), lambda m: m.reshape(6, 4, 20).sum(1) == 2),
        (js.Block((4, 4)), lambda m: m.reshape(6, 4, 5, 4).any((1, 3)).sum() == 15),
        (js.Balanced((2, 5)), lambda m: m[::2, ::5].sum(0) == 6),
        (js.Channel(axis=1), lambda m: m.any(0).sum() == 10),
        (js.Unstructured("output"), lambda m: m.sum(0) == 12),
        (js.Unstructured("global"), lambda m: m.sum() == 240),
    ],
    ids=["2:4", "tiles", "balanced", "channels", "outputs", "global"],
)
def test_patterns_keep_their_structure_while_masks_move(pattern, units):
    method = transforms.rigl(0.5, every=1, key=KEY, pattern=pattern, track=True)
    old = None
    for w, *_, new in changes(method, 3):
        full = np.broadcast_to(new, (24, 20))
        assert np.all(units(full))
        js.patterns.verify({"w": new}, {"w": w}, pattern=pattern)
        assert old is None or not np.array_equal(full, old)
        old = full


def test_of_two_of_four_the_largest_of_the_layer_stay():
    method = transforms.rigl(0.5, every=1, key=KEY, pattern=js.NM(2, 4))
    ((w, g, old, _, new),) = changes(method, 1)
    sizes = np.where(old, np.abs(w), -1)
    stays = sizes >= np.sort(sizes.ravel())[-(240 - 72)]
    assert np.all(new | ~stays)
    places = np.where(stays, np.inf, np.abs(g)).reshape(6, 4, 20)
    ranks = np.argsort(np.argsort(-places, axis=1), axis=1)
    np.testing.assert_array_equal(new, (ranks < 2).reshape(24, 20))


def test_a_rising_sparsity_drops_more_than_it_grows():
    sparsity = js.schedules.polynomial(init=0.5, final=0.75, begin=0, end=4)
    every = js.schedules.every(2, end=4)
    method = transforms.rigl(sparsity, every=every, key=KEY)
    counts = [int(new.sum()) for *_, new in changes(method, 5)]
    assert counts == [240, 240, 480 - 345, 480 - 345, 120]


def test_weights_that_grow_have_no_memory():
    method = transforms.rigl(0.5, every=2, key=KEY)
    tx = method.wrap(optax.adam(0.1), skip_updates=True)
    params, state = js.init_sparse(tx, {"w": jnp.asarray(numbers(0, 6, 8))})
    for t in range(3):
        old = js.masks_of(state)["w"]
        grads = {"w": jnp.asarray(numbers([2, t], 6, 8))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    new = js.masks_of(state)["w"]
    (moments,) = (
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(x, "mu")
    )
    assert np.any(new & ~old)
    np.testing.assert_array_equal(moments.mu["w"] == 0, ~(new & old))
    assert int(moments.count) == 3  # the counter goes on


def test_a_sparse_model_keeps_its_weights():
    params, masks = js.prune({"w": jnp.asarray(numbers(0, 8, 8))}, 0.75)
    tx = transforms.rigl(0.75, every=js.schedules.at(5), key=KEY).wrap(optax.sgd(1.0))
    kept = js.masks_of(tx.init(params))["w"]
    np.testing.assert_array_equal(kept, masks["w"])
    denser = transforms.rigl(0.5, every=4, key=KEY).wrap(optax.sgd(1.0))
    with pytest.warns(UserWarning, match="weights will come back"):
        kept = js.masks_of(denser.init(params))
    assert int(kept["w"].sum()) == 32
    assert np.all(kept["w"] | ~masks["w"])


def test_what_was_ever_active_is_counted():
    method = transforms.set_(0.8, every=1, key=KEY, track=True)
    tx = method.wrap(optax.sgd(0.1))
    params, state = js.init_sparse(tx, problems.params())
    ever = np.zeros((16, 12), bool)
    for t in range(4):
        ever |= np.asarray(js.masks_of(state)["dense_0"]["kernel"])
        grads = jax.grad(problems.loss)(params, problems.batch(t))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    ever |= np.asarray(js.masks_of(state)["dense_0"]["kernel"])
    found = transforms.explored(state)
    assert found["dense_0"]["bias"] == 1
    np.testing.assert_allclose(found["dense_0"]["kernel"], ever.mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="track=True"):
        transforms.explored(transforms.set_(0.8, every=1, key=KEY).init(params))


def test_masks_are_those_of_one_device():
    mesh = jax.make_mesh((8,), ("x",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    method = transforms.rigl(js.schedules.constant(0.9), every=1, key=KEY)
    w, g = numbers(0, 16, 12), numbers(1, 16, 12)

    def masks(put):
        params, grads = {"w": put(w)}, {"w": put(g)}
        state = jax.jit(method.init)(params)
        return js.masks_of(jax.jit(method.update)(grads, state, params)[1])["w"]

    many = masks(lambda x: jax.device_put(x, spread))
    np.testing.assert_array_equal(many, masks(jnp.asarray))
    assert many.sharding.is_equivalent_to(spread, 2)


def test_errors_say_what_to_do():
    params = {"w": jnp.asarray(numbers(0, 4, 4))}
    with pytest.raises(ValueError, match="of at most 4 kept weights"):
        transforms.rigl(0.75, every=1, key=KEY, drop_fraction=0.1).init(params)
    with pytest.raises(ValueError, match="drop_fraction"):
        transforms.rigl(0.75, every=1, key=KEY, drop_fraction=1.5)
    late = js.schedules.every(1, begin=2)
    gone = optax.linear_schedule(0.3, 0.0, 2)
    with pytest.raises(ValueError, match="drop_fraction is 0 in step 2"):
        transforms.rigl(0.75, every=late, key=KEY, drop_fraction=gone).init(params)
    with pytest.raises(TypeError, match="key"):
        transforms.rigl(0.75, every=1, key=0)
    hidden = js.enforce(
        optax.chain(optax.adam(0.1), transforms.rigl(0.5, every=1, key=KEY))
    )
    with pytest.raises(ValueError, match="ScaleByAdamState stands before"):
        hidden.init(params)
    last = optax.chain(
        optax.sgd(0.1), js.keep_sparse(transforms.rigl(0.5, every=1, key=KEY))
    )
    with pytest.raises(ValueError, match="needs raw gradients"):
        last.init(params)
