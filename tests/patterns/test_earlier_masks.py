"""Pruning goes on from masks: what is gone stays gone, and counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.conftest import compilations as compilations
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

PATTERNS = {
    "layer": js.Unstructured(),
    "global": js.Unstructured("global"),
    "output": js.Unstructured("output"),
    "nm": js.NM(2, 4),
    "tile": js.Block((4, 2)),
    "balanced": js.Balanced((4, 2)),
    "tiles of all": js.Block((4, 2), reduce="max", scope="global"),
    "channel": js.Channel(),
    "channels of all": js.Channel(scope="global"),
}
SHAPES = {"a": (16, 8), "b": (8, 16)}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": jax.device_put(rng.standard_normal(shape).astype(np.float32)),
            "bias": jax.device_put(np.ones(shape[1:], np.float32)),
        }
        for name, shape in SHAPES.items()
    }


def full(masks):
    return {
        name: np.broadcast_to(masks[name]["kernel"], shape)
        for name, shape in SHAPES.items()
    }


# Scores that know nothing of what is gone: those of what is gone are the best of all.
def foolish(params, seed=1):
    scores = draw(seed)
    return jax.tree.map(lambda s, w: jnp.where(w == 0, 100, s), scores, params)


def removed(masks, pattern):
    units = slice(1) if isinstance(pattern, js.Channel) else slice(None)
    gone = {name: ~mask[units] for name, mask in full(masks).items()}
    sizes = {name: (mask.sum(), mask.size) for name, mask in gone.items()}
    if getattr(pattern, "scope", "") == "global":
        return [np.sum(list(sizes.values()), axis=0)]
    return list(sizes.values())


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_gone_stays_gone_and_counts(name):
    params, pattern = draw(0), PATTERNS[name]
    half = js.prune(params, 0.25, pattern=pattern)
    for steps in (1, 2):
        more = js.prune(
            half.params,
            0.5,
            pattern=pattern,
            score=foolish,
            masks=half.masks,
            steps=steps,
        )
        for gone, size in removed(more.masks, pattern):
            assert gone == js.patterns.removed_count(0.5, size)
        old, new = full(half.masks), full(more.masks)
        assert not any((new[k] & ~old[k]).any() for k in SHAPES)
        for k, mask in new.items():
            w = np.where(mask, params[k]["kernel"], 0)
            np.testing.assert_array_equal(more.params[k]["kernel"], w)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_rest_is_chosen_by_its_scores(name):
    """As if the scores of what is gone were the lowest."""
    pattern = PATTERNS[name]
    before = js.prune(draw(0), 0.25, pattern=pattern).masks
    scores = jax.tree.map(jnp.abs, draw(1))
    low = jax.tree.map(lambda s, m: jnp.where(m, s, -1.0), scores, before)
    got = js.patterns.masks(scores, 0.5, pattern=pattern, masks=before)
    jax.tree.map(
        np.testing.assert_array_equal,
        full(got),
        full(js.patterns.masks(low, 0.5, pattern=pattern)),
    )
    jitted = jax.jit(
        lambda scores, s, masks: js.patterns.masks(
            scores, s, pattern=pattern, masks=masks
        )
    )
    jax.tree.map(np.testing.assert_array_equal, jitted(scores, 0.5, before), got)


def test_infinite_and_nan_scores_of_what_is_gone_do_not_matter():
    scores = {"w": jnp.array([[jnp.inf, -jnp.inf, jnp.nan, 1.0, 2.0, 3.0]])}
    before = {"w": jnp.array([[False, True, False, True, True, True]])}
    got = js.patterns.masks(scores, 0.5, masks=before)["w"]
    assert got.tolist() == [[False, False, False, True, True, True]]


def test_two_of_four_of_a_sparser_layer_revives_nothing():
    """Groups that have lost more keep fewer, which the pattern allows."""
    params = draw(0)
    sparse = js.prune(params, 0.7)
    found = js.prune(
        sparse.params, pattern=js.NM(2, 4), score=foolish, masks=sparse.masks
    )
    js.patterns.verify(found.masks, params, pattern=js.NM(2, 4))
    for k, before in full(sparse.masks).items():
        new = full(found.masks)[k]
        assert not (new & ~before).any()
        groups = lambda m: m.reshape(-1, 4, m.shape[1]).sum(1)
        np.testing.assert_array_equal(groups(new), np.minimum(groups(before), 2))


@pytest.mark.parametrize("name", ["layer", "global", "nm", "tile", "channel"])
def test_masks_that_remove_more_than_asked_for_are_refused(name):
    pattern = PATTERNS[name]
    params, before = js.prune(draw(0), 0.5, pattern=pattern)
    seen = []
    for steps in (1, 2):
        with pytest.raises(ValueError, match=r"a/kernel: `masks` already remove more"):
            js.prune(
                params,
                0.25,
                pattern=pattern,
                masks=before,
                steps=steps,
                score=lambda p: seen.append(p) or p,
            )
    assert not seen  # before any work
    # Under jit nobody can say so, and it stays removed.
    call = jax.jit(lambda m, s: js.patterns.masks(draw(1), s, masks=m, pattern=pattern))
    jax.tree.map(np.testing.assert_array_equal, full(call(before, 0.25)), full(before))


def test_what_takes_no_part_keeps_its_mask():
    params = draw(0)
    before = js.prune(params, 0.5).masks
    found = js.prune(params, 0.75, where="a/kernel", masks=before)
    np.testing.assert_array_equal(found.masks["b"]["kernel"], before["b"]["kernel"])
    assert int(jnp.sum(found.params["b"]["kernel"] != 0)) == 64
    assert found.masks["a"]["bias"].shape == ()


def test_tiles_that_lost_some_weights_compete_without_them():
    params = draw(0)
    ones = lambda k: np.ones(SHAPES[k], bool)
    part = ones("a")
    part[0, 0] = False
    before = {k: {"kernel": jnp.asarray(ones(k)), "bias": True} for k in SHAPES}
    before = jax.tree.map(jnp.asarray, before)
    before["a"]["kernel"] = jnp.asarray(part)
    best = {k: jnp.zeros(s).at[:4, :2].set(1) for k, s in SHAPES.items()}
    score = lambda p: {k: {"kernel": best[k], "bias": p[k]["bias"]} for k in SHAPES}
    pattern = js.Block((4, 2))
    mask = js.prune(params, 0.5, score=score, pattern=pattern, masks=before).masks
    kept = np.asarray(mask["a"]["kernel"])
    assert kept[:4, :2].sum() == 7
    assert kept.sum() == 64 - 1


def test_each_cut_leaves_the_same_part_of_what_was_there():
    half = js.prune(draw(0), 0.5)
    left = []

    def counting(params, *, masks, step, sparsity):
        left.append((int(masks["a"]["kernel"].sum()), step, sparsity))
        return js.scores.magnitude(params)

    js.prune(half.params, 0.875, masks=half.masks, steps=2, score=counting)
    (first, second) = left
    assert first[:2] == (64, 0)
    assert second[:2] == (32, 1)
    assert first[2]["a"]["kernel"] == pytest.approx(0.75)
    assert second[2]["a"]["kernel"] == 0.875


def test_steps_of_two_of_four_go_by_its_own_sparsity():
    left = []

    def counting(params, *, masks):
        left.append(float(jnp.mean(masks["a"]["kernel"])))
        return js.scores.magnitude(params)

    js.prune(draw(0), pattern=js.NM(1, 4), steps=2, score=counting)
    assert left == [1, 0.5]


@pytest.mark.parametrize(
    "kind",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_many_devices_give_the_masks_of_one(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    spread = NamedSharding(mesh, P("x", "y"))
    scores = {k: w["kernel"] for k, w in draw(1).items()}
    where = jax.tree.map(lambda _: True, scores)
    put = functools.partial(jax.tree.map, lambda x: jax.device_put(x, spread))
    for pattern in (js.Unstructured("global"), js.Channel(), js.Block((4, 2))):
        choose = functools.partial(js.patterns.masks, pattern=pattern, where=where)
        before = jax.tree.map(
            lambda m, w: jnp.broadcast_to(m, w.shape), choose(scores, 0.25), scores
        )
        one = choose(scores, 0.5, masks=before)
        many = choose(put(scores), 0.5, masks=put(before))
        for k in one:
            np.testing.assert_array_equal(one[k], many[k])
            assert many[k].sharding.is_equivalent_to(spread, 2)


def test_the_second_call_compiles_nothing(compilations):
    half = js.prune(draw(0), 0.5)
    call = lambda seed, s: js.prune(
        draw(seed), s, masks=half.masks, steps=2, pattern=js.Block((4, 2))
    )
    call(1, 0.5)
    with compilations() as found:
        call(2, 0.75)
    assert found.names == []
