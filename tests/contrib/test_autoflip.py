"""AutoFLIP's guidance against NumPy, its masks by hand, and a small federation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse.contrib import guidance, guidance_masks

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def params():
    rng = np.random.default_rng(0)
    return {
        "dense": {
            "bias": jnp.zeros(4),
            "kernel": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32),
        }
    }


def clients(count=3):
    for c in range(count):  # as they come
        draw = np.random.default_rng([1, c]).standard_normal
        yield jax.tree.map(lambda w, draw=draw: w + draw(w.shape), params())


def test_guidance_is_the_mean_squared_deviation():
    got = guidance(params(), clients())
    for path, x in js.tree.leaves_with_paths(got):
        before = np.float64(dict(js.tree.leaves_with_paths(params()))[path])
        moved = [dict(js.tree.leaves_with_paths(c))[path] for c in clients()]
        expected = np.mean([(np.float64(w) - before) ** 2 for w in moved], axis=0)
        np.testing.assert_allclose(x, expected, rtol=1e-5)


def test_sixteen_bits_are_squared_in_32():
    w = {"kernel": jnp.full((2, 2), 1.0, jnp.bfloat16)}
    moved = {"kernel": jnp.full((2, 2), 1.0078125, jnp.bfloat16)}
    got = guidance(w, [moved])["kernel"]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.float32(2.0**-14))


def test_masks_are_cut_at_a_part_of_the_largest():
    scores = {"kernel": jnp.array([[4.0, 1.0, 0.0], [2.0, 0.5, 0.0]])}
    of = lambda **options: guidance_masks(scores, **options)["kernel"].tolist()
    assert of(threshold=0.5) == [[True, False, False], [True, False, False]]
    assert of(threshold=0.25) == [[True, True, False], [True, False, False]]
    assert of(threshold=0.0) == [[True] * 3] * 2
    assert of(threshold=1.0) == [[True, False, False], [False] * 3]
    # Sums of columns 6, 1.5, 0; of rows 5, 2.5.
    assert of(threshold=0.25, axis=-1) == [[True, True, False]]
    assert of(threshold=0.6, axis=0) == [[True], [False]]


def test_what_nobody_moved_and_what_takes_no_part_is_kept():
    scores = {"a": {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}}
    masks = guidance_masks(scores, threshold=0.9)
    assert masks["a"]["bias"].shape == ()
    assert bool(masks["a"]["kernel"].all())


def test_scores_are_scores_as_all_others():
    scores = guidance(params(), clients())
    masks = js.patterns.masks(scores, 0.5)
    assert int(masks["dense"]["kernel"].sum()) == 12


def test_masks_lie_as_scores_do_and_jit_changes_nothing():
    mesh = jax.make_mesh((8,), ("x",))
    scores = {"kernel": jnp.asarray(np.random.default_rng(3).random((16, 4)), "f4")}
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("x")))
    spread = jax.tree.map(put, scores)
    cut = lambda s: guidance_masks(s, threshold=0.5)
    one, many = cut(scores)["kernel"], jax.jit(cut)(spread)["kernel"]
    np.testing.assert_array_equal(one, many)
    assert many.sharding.is_equivalent_to(spread["kernel"].sharding, 2)


def test_a_federation_shares_a_mask_that_its_clients_found():
    """Clients see other inputs, and inputs that none of them sees are pruned."""
    rng = np.random.default_rng(5)
    start = {"kernel": jnp.asarray(rng.standard_normal((12, 3)), jnp.float32)}
    used = [np.arange(0, 4), np.arange(2, 8)]  # 8 to 11 are always 0
    truth = rng.standard_normal((12, 3))

    def data(c):
        x = np.zeros((32, 12), np.float32)
        x[:, used[c]] = np.random.default_rng([6, c]).standard_normal((
            32,
            len(used[c]),
        ))
        return jnp.asarray(x), jnp.float32(x @ truth)

    loss = lambda p, x, y: jnp.mean((x @ p["kernel"] - y) ** 2)

    def train(p, tx, c):
        state = tx.init(p)
        for _ in range(20):
            updates, state = tx.update(jax.grad(loss)(p, *data(c)), state, p)
            p = optax.apply_updates(p, updates)
        return p

    masks = guidance_masks(
        guidance(start, (train(start, optax.sgd(0.1), c) for c in (0, 1))),
        threshold=1e-4,
    )
    kept = np.asarray(masks["kernel"]).mean(1)
    assert np.all(kept[8:] == 0)
    assert kept[:8].mean() > 0.9
    begin = js.patterns.apply(start, masks)
    tx = optax.chain(optax.sgd(0.1), js.keep_sparse(masks))
    mean = jax.tree.map(lambda *w: sum(w) / 2, *(train(begin, tx, c) for c in (0, 1)))
    assert np.all(np.asarray(mean["kernel"])[~np.asarray(masks["kernel"])] == 0)
    for c in (0, 1):
        assert loss(mean, *data(c)) < 0.7 * loss(begin, *data(c))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "nobody has explored"),
        ([{"dense": {"bias": jnp.zeros(4)}}], ValueError, r"clients\[0\].*missing"),
        (None, TypeError, "clients must be an iterable"),
    ],
)
def test_clients_that_do_not_fit_are_named(given, error, message):
    with pytest.raises(error, match=message):
        guidance(params(), given)


def test_a_client_with_nan_is_named():
    bad = jax.tree.map(lambda w: w * jnp.nan, params())
    with pytest.raises(ValueError, match=r"dense/bias: 4 of .* clients\[1\]"):
        guidance(params(), [params(), bad])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, r"threshold must lie in \[0, 1\]"),
        ({"threshold": 0.5, "axis": 2}, ValueError, "kernel: there is no axis 2"),
        ({"threshold": 0.5, "axis": "out"}, TypeError, "axis must be an integer"),
    ],
)
def test_what_makes_no_mask_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        guidance_masks({"kernel": jnp.ones((2, 3))}, **options)
