import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js

SHAPES = {"a": (8, 4), "b": (8, 16), "c": (8, 4)}


def scores():
    rng = np.random.default_rng(0)
    scale = {"a": 1.0, "b": 0.1, "c": 3.0}
    return {
        k: jnp.asarray(rng.random(s) * scale[k], jnp.float32) for k, s in SHAPES.items()
    }


@pytest.mark.parametrize("sparsity", [0.37, 0.99])
@pytest.mark.parametrize(
    ("everywhere", "in_each"),
    [
        (js.Unstructured("global"), js.Unstructured()),
        (js.Block((2, 2), scope="global"), js.Block((2, 2))),
        (js.Channel(scope="global"), js.Channel()),
    ],
)
def test_layer_by_layer_it_gives_the_masks_of_the_global_scope(
    everywhere, in_each, sparsity
):
    found = js.allocations.from_global_scores(scores(), sparsity, pattern=everywhere)
    together = js.patterns.masks(scores(), sparsity, pattern=everywhere)
    one_by_one = js.patterns.masks(scores(), found, pattern=in_each)
    for name in SHAPES:
        np.testing.assert_array_equal(one_by_one[name], together[name])


def test_a_parameter_that_loses_everything_gets_a_number_below_one():
    ones = jnp.asarray(np.ones((8, 4), np.float32))
    nothing = jnp.asarray(np.zeros((8, 4), np.float32))
    found = js.allocations.from_global_scores(
        {"a": ones, "b": nothing}, 0.5, min_keep=0
    )
    assert found == {"a": 0.0, "b": math.nextafter(1.0, 0.0)}
    assert js.patterns.removed_count(found["b"], 10**6) == 10**6


def test_what_is_not_selected_keeps_everything():
    found = js.allocations.from_global_scores(scores() | {"bias": np.zeros(4)}, 0.5)
    assert found["bias"] == 0.0


@pytest.mark.parametrize("pattern", [js.Unstructured(), js.NM(2, 4), js.Channel()])
def test_a_pattern_of_another_scope_is_refused(pattern):
    with pytest.raises(ValueError, match="does not compete globally"):
        js.allocations.from_global_scores(scores(), 0.5, pattern=pattern)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 0.999)), min_size=1, max_size=6)
)
def test_rounded_counts_add_up_to_the_total(layers):
    params = {f"w{i}": np.ones((1, n)) for i, (n, _) in enumerate(layers)}
    asked = {f"w{i}": s for i, (_, s) in enumerate(layers)}
    rounded = js.allocations.round_to_weights(params, asked)
    counts = {
        k: js.patterns.removed_count(s, params[k].size) for k, s in rounded.items()
    }
    exact = {k: asked[k] * params[k].size for k in params}
    assert sum(counts.values()) == math.floor(sum(exact.values()) + 0.5)
    assert all(abs(counts[k] - exact[k]) < 1 for k in params)
    assert all(0 <= s < 1 for s in rounded.values())


def test_the_largest_remainders_are_rounded_up():
    params = {k: np.ones((1, 10)) for k in "abc"}
    rounded = js.allocations.round_to_weights(params, {"a": 0.14, "b": 0.16, "c": 0.15})
    assert rounded == {"a": 0.1, "b": 0.2, "c": 0.2}


def test_rounding_leaves_what_is_not_selected():
    params = {"w": np.ones((1, 10)), "bias": np.ones(10)}
    rounded = js.allocations.round_to_weights(params, {"w": 0.55, "bias": 0.123})
    assert rounded == {"w": 0.6, "bias": 0.123}


def test_a_layer_that_rounds_to_nothing_left_can_be_selected():
    params = {"w": jnp.asarray(np.ones((8, 4), np.float32))}
    rounded = js.allocations.round_to_weights(params, {"w": 0.99})
    assert not np.any(js.patterns.masks(params, rounded, min_keep=0)["w"])
    assert js.patterns.masks(params, rounded)["w"].sum() == 1


def test_sparsities_of_another_structure_are_refused():
    with pytest.raises(ValueError, match="sparsities must have exactly"):
        js.allocations.round_to_weights({"w": np.ones((2, 2))}, {"v": 0.5})


def test_a_sparsity_outside_its_range_names_the_path():
    with pytest.raises(ValueError, match=r"w: sparsity must lie in"):
        js.allocations.round_to_weights({"w": np.ones((2, 2))}, {"w": 1.5})
