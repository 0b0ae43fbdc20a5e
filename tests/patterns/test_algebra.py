"""Masks as sets, against NumPy's sets of flat indices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

# Each parameter's shape, and those of the masks that are drawn for it.
SHAPES = {
    "attn": {"w": ((4, 6), (4, 6))},
    "bias": ((6,), ()),
    "conv": ((2, 3, 5), (1, 3, 1)),
    "empty": ((0, 3), (0, 3)),
}
is_pair = lambda x: isinstance(x, tuple) and all(isinstance(s, tuple) for s in x)
of_shapes = lambda f: jax.tree.map(f, SHAPES, is_leaf=is_pair)


def params():
    return of_shapes(lambda s: np.ones(s[0], np.float32))


def drawn(seed):
    rng = np.random.default_rng(seed)
    return of_shapes(lambda s: jnp.asarray(rng.random(s[1]) < 0.6))


def sets(masks):
    """The flat indices that are kept, by path."""
    full = jax.tree.map(lambda w, m: np.broadcast_to(m, w.shape), params(), masks)
    return {p: {*np.flatnonzero(x)} for p, x in js.tree.leaves_with_paths(full)}


@pytest.mark.parametrize("seed", range(3))
def test_they_are_those_of_sets(seed):
    a, b, c = (drawn([seed, i]) for i in range(3))
    of = [sets(m) for m in (a, b, c)]
    united, met = js.patterns.union(a, b, c), js.patterns.intersection(a, b, c)
    for path, x in of[0].items():
        assert sets(united)[path] == x | of[1][path] | of[2][path]
        assert sets(met)[path] == x & of[1][path] & of[2][path]
    count = dict(js.tree.leaves_with_paths(js.patterns.count(a, params())))
    assert count == {path: len(x) for path, x in of[0].items()}
    listed = dict(js.tree.leaves_with_paths(js.patterns.indices(a, params())))
    assert {path: [*x] for path, x in listed.items()} == {
        path: sorted(x) for path, x in of[0].items()
    }
    found = js.patterns.overlap(a, b, params())
    sizes = {p: w.size for p, w in js.tree.leaves_with_paths(params())}
    both = {p: len(x & of[1][p]) for p, x in of[0].items()}
    either = {p: len(x | of[1][p]) for p, x in of[0].items()}
    counted = [p for p in both if both[p] < sizes[p]]
    assert found.total == sum(both[p] for p in counted) / sum(
        either[p] for p in counted
    )
    assert dict(js.tree.leaves_with_paths(found.parameters)) == {
        p: both[p] / either[p] if either[p] else 1.0 for p in both
    }


def test_masks_of_channels_and_of_weights_meet():
    weights = {"w": jnp.array([[True, False, True], [False, True, True]])}
    channels, all_of_it = (
        {"w": jnp.array([[True, True, False]])},
        {"w": jnp.array(True)},
    )
    met = js.patterns.intersection(weights, channels, all_of_it)["w"]
    np.testing.assert_array_equal(met, weights["w"] & channels["w"])
    assert js.patterns.union(channels, channels)["w"].shape == (1, 3)


def test_what_neither_prunes_does_not_count_in_the_overlap():
    params = {"embedding": np.ones(1000), "w": np.ones(4)}
    mask = lambda *kept: {"embedding": jnp.array(True), "w": jnp.array(kept)}
    found = js.patterns.overlap(
        mask(True, True, False, False), mask(True, False, True, False), params
    )
    assert found.total == 1 / 3
    dense = mask(True, True, True, True)
    assert js.patterns.overlap(dense, dense, params).total == 1.0


def test_random_masks_overlap_as_the_docs_say():
    params = {"w": np.ones((200, 200), np.float32)}
    a, b = (
        js.patterns.masks(
            js.scores.random(params, key=jax.random.key(i)), 0.8, where="w"
        )
        for i in range(2)
    )
    assert abs(js.patterns.overlap(a, b, params).total - 0.2 / 1.8) < 0.01


def test_masks_of_a_linen_tree_meet_those_of_an_nnx_state():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    masks = js.prune(nnx.as_pure(state), 0.5, where="kernel").masks
    moved = js.patterns.transfer(masks, state)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    met = js.patterns.intersection(moved, masks)
    assert js.patterns.overlap(met, masks, state).total == 1.0


def test_they_stay_sharded():
    mesh = jax.make_mesh((2,), ("d",))
    where = NamedSharding(mesh, P("d"))
    a = {"w": jax.device_put(np.arange(8) % 2 == 0, where)}
    b = {"w": jax.device_put(np.arange(8) % 3 == 0, where)}
    for found in (
        js.patterns.union(a, b),
        js.patterns.intersection(a, b),
        js.patterns.transfer(a, {"w": np.ones(8)}),
    ):
        assert found["w"].sharding.is_equivalent_to(where, 1)
    assert js.patterns.indices(a, a)["w"].tolist() == [0, 2, 4, 6]


def test_masks_move_to_a_checkpoint_with_other_names():
    masks = {"l0": {"kernel": jnp.array([True, False])}, "head": jnp.array([False])}
    params = {"encoder/l0": {"kernel": np.ones(2)}, "task": np.ones(3)}
    moved = js.patterns.transfer(
        masks, params, rename=lambda path: path.removeprefix("encoder/"), strict=False
    )
    assert moved["encoder/l0"]["kernel"] is masks["l0"]["kernel"]
    assert moved["task"].shape == ()
    assert bool(moved["task"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"l0": np.ones(2), "l1": np.ones(2)}}, r"l1: there is no mask at"),
        (
            {"masks": {k: jnp.ones(2, bool) for k in ("l0", "l1")}},
            r"l1: no parameter takes this mask \(1 of 2",
        ),
        ({"params": {"x": np.ones(2)}, "strict": False}, r"x: there is no mask at 'x'"),
        ({"params": {"l0": np.ones(3)}}, r"l0: a mask of shape \(2,\) does not broadc"),
        ({"rename": {"l7": "l0"}}, r"rename: 'l7' is no parameter\. .*l0"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"masks": {"l0": jnp.array([True, False])}, "params": {"l0": np.ones(2)}}
    given |= change
    with pytest.raises(ValueError, match=message):
        js.patterns.transfer(given.pop("masks"), given.pop("params"), **given)


def test_shapes_that_do_not_meet_are_named():
    a, b = {"w": jnp.ones((2, 3), bool)}, {"w": jnp.ones((3, 2), bool)}
    with pytest.raises(ValueError, match=r"w: masks of the shapes \(2, 3\), \(3, 2\)"):
        js.patterns.union(a, b)
    with pytest.raises(ValueError, match=r"takes at least one tree"):
        js.patterns.intersection()
    with pytest.raises(TypeError, match="w: "):
        js.patterns.union(a, {"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"masks"):
        js.patterns.union(a, {"v": jnp.ones((2, 3), bool)})
