import jax.numpy as jnp
import pytest

import jaxsparse as js

params = {
    "conv": jnp.ones((3, 3, 4, 8)),
    "query": jnp.ones((8, 2, 4)),
    "dense": jnp.ones((8, 4)),
    "bias": jnp.ones(4),
}
query = js.Axes(input=(0,), output=(1, 2))


def test_the_default_is_the_layout_of_flax():
    conv = js.tree.default_axes("conv", params["conv"])
    assert conv == js.Axes(input=(0, 1, 2), output=(3,))
    dense = js.tree.default_axes("dense", params["dense"])
    assert dense == js.Axes(input=(0,), output=(1,))


def test_three_axes_have_to_be_stated():
    with pytest.raises(ValueError, match=r"query: .* \(8, 2, 4\).*State which"):
        js.tree.default_axes("query", params["query"])


def test_a_vector_has_no_two_sides():
    with pytest.raises(ValueError, match=r"bias: .* \(4,\) has no input and output"):
        js.tree.default_axes("bias", params["bias"])


def test_negative_axes_count_from_the_end():
    axes = js.Axes(input=(-3,), output=(-2, -1), batch=(0,)).normalised("w", 4)
    assert axes == js.Axes(input=(1,), output=(2, 3), batch=(0,))


@pytest.mark.parametrize(
    "axes",
    [
        js.Axes(input=(0,), output=(1,)),
        js.Axes(input=(0, 1), output=(1, 2)),
        js.Axes(input=(0,), output=(1, 3)),
        js.Axes(input=(0,), output=(1, -2)),
        js.Axes(input=(-4,), output=(1, 2)),
    ],
    ids=["missing", "twice", "out of range", "twice from the end", "before the first"],
)
def test_every_axis_is_named_exactly_once(axes):
    with pytest.raises(ValueError, match=r"w: Axes.* 3 axes exactly once"):
        axes.normalised("w", 3)


def test_nothing_stated_is_nothing():
    assert js.tree.resolve_axes(params, None) == {}


def test_one_statement_for_all_leaves_vectors_out():
    swapped = js.Axes(input=(1,), output=(0,))
    tree = {"dense": params["dense"], "bias": params["bias"]}
    assert js.tree.resolve_axes(tree, swapped) == {"dense": swapped}


def test_the_first_rule_that_matches_wins():
    swapped = js.Axes(input=(1,), output=(0,))
    stated = js.tree.resolve_axes(
        {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((2, 3))}},
        {"a/": swapped, "kernel$": js.Axes(input=(-2,), output=(-1,))},
    )
    assert stated == {"a/kernel": swapped, "b/kernel": js.Axes((0,), (1,))}


def test_a_rule_that_matches_nothing_lists_the_nearest_paths():
    with pytest.raises(ValueError, match=r"'querry' matches no parameter.*\['query'"):
        js.tree.resolve_axes(params, {"querry": query})


def test_axes_that_do_not_fit_name_the_parameter():
    with pytest.raises(ValueError, match=r"dense: Axes"):
        js.tree.resolve_axes(params, {"query|dense": query})


def test_what_is_stated_comes_before_the_default():
    stated = js.tree.resolve_axes(params, {"query": query})
    assert js.tree.kernel_axes("query", params["query"], stated) == query
    assert js.tree.kernel_axes("dense", params["dense"], stated) == js.Axes((0,), (1,))
