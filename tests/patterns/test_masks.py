"""Masks of every pattern against sorting in numpy, with many ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import selection

import jaxsparse as js

stacked = js.Axes(input=(1,), output=(2,), batch=(0,))
query = js.Axes(input=(0,), output=(1, 2))  # (in, heads, head_dim)
heads_out = js.Axes(input=(0, 1), output=(2,))  # (heads, head_dim, out)
torch_linear = js.Axes(input=(1,), output=(0,))
scanned_query = js.Axes(input=(-3,), output=(-2, -1), batch=(0,))

CASES = {
    "layer, stacked": (js.Unstructured(), (3, 8, 6), stacked),
    "layer, one scan-stacked conv": (
        js.Unstructured(),
        (2, 3, 3, 4, 4),
        js.Axes(input=(1, 2, 3), output=(4,), batch=(0,)),
    ),
    "output of a convolution": (js.Unstructured("output"), (3, 3, 4, 5), None),
    "output of a query": (js.Unstructured("output"), (8, 2, 4), query),
    "output, heads contracted": (js.Unstructured("output"), (4, 6, 8), heads_out),
    "output, stacked": (js.Unstructured("output"), (3, 8, 6), stacked),
    "block": (js.Block((4, 2)), (12, 8), None),
    "block of a convolution": (js.Block((2, 2)), (3, 3, 4, 8), None),
    "block of a query": (js.Block((2, 4)), (8, 2, 4), query),
    "block, stacked": (js.Block((2, 2)), (3, 8, 6), stacked),
    "balanced": (js.Balanced((1, 4)), (12, 8), None),
    "balanced of a convolution": (js.Balanced((2, 4)), (3, 3, 4, 8), None),
    "balanced of a query": (js.Balanced((2, 2), reduce="max"), (8, 2, 4), query),
    "balanced, stacked": (js.Balanced((2, 3)), (3, 8, 6), stacked),
    "channel": (js.Channel(), (16, 8), None),
    "channel, largest": (js.Channel(reduce="max"), (12, 9), None),
    "head": (js.Channel(axis=1), (8, 6, 4), query),
    "channel, stacked": (js.Channel(), (3, 8, 6), stacked),
    "channel that is the stack": (js.Channel(axis=0), (8, 4, 4), stacked),
}
NM_CASES = {
    "dense": (js.NM(2, 4), (12, 5), None),
    "one of four": (js.NM(1, 4), (8, 5), None),
    "four of eight": (js.NM(4, 8), (16, 3), None),
    "convolution": (js.NM(2, 4), (3, 3, 4, 5), None),
    "query": (js.NM(2, 4), (8, 2, 3), query),
    "heads contracted": (js.NM(2, 4), (3, 4, 5), heads_out),
    "groups over the end of the last input axis": (js.NM(2, 4), (2, 6, 5), heads_out),
    "the same in a convolution": (js.NM(2, 4), (2, 3, 2, 5), None),
    "the same, stacked": (
        js.NM(2, 4),
        (2, 2, 6, 3),
        js.Axes(input=(1, 2), output=(3,), batch=(0,)),
    ),
    "torch's layout": (js.NM(2, 4), (5, 12), torch_linear),
    "stacked": (js.NM(2, 4), (3, 8, 5), stacked),
    "scanned query": (js.NM(2, 4), (2, 8, 3, 2), scanned_query),
}


def tied_scores(shape, seed=0):
    """Few distinct values, all of them exact in every float type and in their means."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("pattern", "axes"))
def jitted(scores, sparsity, pattern, axes):
    masks = js.patterns.masks(
        {"w": scores}, sparsity, pattern=pattern, axes=axes, where="w"
    )
    return masks["w"]


ALL = CASES | NM_CASES


@jax.jit
def all_masks(scores, sparsities):
    """One program for all cases, and for every sparsity."""
    return {
        name: jitted(scores[name], sparsities[name], pattern, axes)
        for name, (pattern, _, axes) in ALL.items()
    }


@functools.cache
def masks_at(sparsity):
    """Of all cases, or of those of N:M the pattern's own sparsity."""
    scores = {name: tied_scores(shape) for name, (_, shape, _) in ALL.items()}
    own = {name: pattern.sparsity for name, (pattern, _, _) in NM_CASES.items()}
    asked = dict.fromkeys(ALL, sparsity) | (own if sparsity > 0.3 else {})
    return all_masks(scores, {name: np.float32(s) for name, s in asked.items()})


def assert_those_of_a_sort(name, sparsity, asked):
    pattern, shape, axes = ALL[name]
    axes = axes and axes.normalised("w", len(shape))
    expected = selection.mask(tied_scores(shape), asked, pattern, axes)
    got = masks_at(sparsity)[name]
    np.testing.assert_array_equal(np.broadcast_to(got, shape), expected)


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_a_sort(name):
    for sparsity in (0.0, 0.2, 0.5, 0.7, 0.95):
        assert_those_of_a_sort(name, sparsity, sparsity)


@pytest.mark.parametrize("name", NM_CASES)
def test_nm_masks_are_those_of_a_sort(name):
    pattern, shape, _ = NM_CASES[name]
    for sparsity in (0.0, 0.2, 0.5):
        assert masks_at(sparsity)[name].shape == shape
        assert_those_of_a_sort(
            name, sparsity, pattern.sparsity if sparsity > 0.3 else sparsity
        )


@pytest.mark.parametrize("name", ["layer, stacked", "block", "channel, largest"])
def test_eager_and_jitted_masks_are_equal(name):
    pattern, shape, axes = CASES[name]
    scores = tied_scores(shape)
    eager = js.patterns.masks({"w": scores}, 0.7, pattern=pattern, axes=axes, where="w")
    np.testing.assert_array_equal(eager["w"], masks_at(0.7)[name])


def test_a_channel_mask_is_as_small_as_its_decision():
    scores = {"conv": np.ones((3, 3, 4, 8), np.float32)}
    masks = js.patterns.masks(scores, 0.5, pattern=js.Channel())
    assert masks["conv"].shape == (1, 1, 1, 8)


def test_stacked_layers_choose_their_channels_on_their_own():
    scores = {"w": np.arange(48, dtype=np.float32).reshape(3, 4, 4)}
    masks = js.patterns.masks(scores, 0.5, pattern=js.Channel(), axes=stacked)
    assert masks["w"].shape == (3, 1, 4)
    assert np.asarray(masks["w"]).sum((1, 2)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [(0.0, 4), (0.1, 4), (0.125, 3), (0.3, 3), (0.374, 3), (0.375, 2), (0.5, 2)],
)
def test_a_schedule_passes_through_4_and_3_and_2_of_four(sparsity, kept):
    scores = tied_scores((12, 5))
    for s in (sparsity, jnp.float32(sparsity)):
        mask = js.patterns.masks({"w": scores}, s, pattern=js.NM(2, 4))["w"]
        assert (np.asarray(mask).reshape(3, 4, 5).sum(1) == kept).all()


def test_nm_has_a_sparsity_of_its_own():
    mask = js.patterns.masks({"w": tied_scores((12, 5))}, pattern=js.NM(1, 4))["w"]
    assert (np.asarray(mask).reshape(3, 4, 5).sum(1) == 1).all()


def test_a_traced_sparsity_above_the_pattern_is_cut():
    mask = jitted(tied_scores((12, 5)), jnp.float32(0.9), js.NM(2, 4), None)
    assert (np.asarray(mask).reshape(3, 4, 5).sum(1) == 2).all()


def test_one_compilation_serves_every_sparsity():
    traces = []

    @jax.jit
    def masks(scores, sparsity):
        traces.append(1)
        return js.patterns.masks(scores, sparsity)

    scores = {"w": tied_scores((12, 9))}
    kept = [int(np.sum(masks(scores, s)["w"])) for s in (0.0, 0.25, 0.5, 0.75)]
    assert kept == [108, 81, 54, 27]
    assert len(traces) == 1


def test_vmap_over_scores_and_over_sparsity():
    scores = np.stack([tied_scores((12, 9), seed) for seed in range(3)])
    sparsities = np.array([0.2, 0.5, 0.9], np.float32)
    one = lambda x, s: js.patterns.masks({"w": x}, s)["w"]
    got = np.asarray(jax.jit(jax.vmap(one))(scores, sparsities))
    for mask, x, s in zip(got, scores, (0.2, 0.5, 0.9), strict=True):
        np.testing.assert_array_equal(mask, selection.mask(x, s, js.Unstructured()))


def test_vmap_over_the_scores_of_nm():
    scores = np.stack([tied_scores((12, 5), seed) for seed in range(3)])
    got = jax.vmap(lambda x: js.patterns.masks({"w": x}, pattern=js.NM())["w"])(scores)
    for mask, x in zip(np.asarray(got), scores, strict=True):
        np.testing.assert_array_equal(mask, selection.mask(x, 0.5, js.NM()))


def test_a_tree_of_sparsities_gives_each_parameter_its_own():
    scores = {"a": tied_scores((12, 9)), "b": tied_scores((12, 9), 1)}
    masks = js.patterns.masks(scores, {"a": 0.5, "b": 0.75})
    for name, s in (("a", 0.5), ("b", 0.75)):
        expected = selection.mask(scores[name], s, js.Unstructured())
        np.testing.assert_array_equal(masks[name], expected)


def test_what_is_not_selected_gets_a_scalar_true():
    scores = {"bias": np.ones(3), "steps": np.array(7), "w": tied_scores((12, 9))}
    masks = js.patterns.masks(scores, 0.5)
    assert masks["bias"].shape == masks["steps"].shape == ()
    assert bool(masks["bias"])
    assert bool(masks["steps"])
    assert np.asarray(masks["w"]).sum() == 54
