"""What bad input gets: a message with the path, before any work."""

import jax.numpy as jnp
import pytest

import jaxsparse as js

scores = {"mlp": {"w": jnp.ones((6, 5))}}


def masks(sparsity=0.5, scores=scores, **kwargs):
    return js.patterns.masks(scores, sparsity, **kwargs)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), 90])
@pytest.mark.parametrize("as_array", [False, True])
def test_a_sparsity_outside_its_range(sparsity, as_array):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        masks(jnp.float32(sparsity) if as_array else sparsity)


@pytest.mark.parametrize("sparsity", ["0.9", True, lambda step: 0.5, 0.5j])
def test_a_sparsity_that_is_no_number(sparsity):
    with pytest.raises(TypeError, match="sparsity must be a number"):
        masks(sparsity)


def test_no_sparsity_for_a_pattern_without_its_own():
    with pytest.raises(ValueError, match=r"Unstructured.* needs a sparsity"):
        masks(None)


def test_a_tree_of_sparsities_of_another_structure():
    with pytest.raises(ValueError, match=r"structure of scores: missing 'mlp/w'"):
        masks({"mlp": {"kernel": 0.5}})


def test_a_tree_with_a_sparsity_outside_its_range_names_the_path():
    with pytest.raises(ValueError, match=r"mlp/w: sparsity must lie in \[0, 1\)"):
        masks({"mlp": {"w": 1.5}})


def test_a_group_that_does_not_divide_names_the_path_and_the_size():
    with pytest.raises(ValueError, match=r"mlp/w: .* 4 divides.* has 6"):
        masks(pattern=js.NM(2, 4))


@pytest.mark.parametrize("shape", [(4, 1), (1, 2)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_tile_that_does_not_divide_names_the_path_and_the_size(shape, scope):
    size = 6 if shape[0] == 4 else 5
    with pytest.raises(ValueError, match=rf"mlp/w: .* \(6, 5\) is {size}"):
        masks(pattern=js.Block(shape, scope=scope))


@pytest.mark.parametrize("axis", [2, -3])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_channel_axis_out_of_range_names_the_path(axis, scope):
    with pytest.raises(ValueError, match=rf"mlp/w: .* axis {axis}.* \(6, 5\)"):
        masks(pattern=js.Channel(axis, scope=scope))


def test_nm_above_its_own_sparsity():
    with pytest.raises(ValueError, match=r"mlp/w: .* removes at most 1 of 3"):
        masks(0.9, pattern=js.NM(2, 3))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_scores_that_are_no_real_numbers(dtype):
    with pytest.raises(TypeError, match=rf"mlp/w: scores must be real .* {dtype}"):
        masks(scores={"mlp": {"w": jnp.ones((4, 4), dtype)}}, where=".")


def test_three_axes_have_to_be_stated_where_the_pattern_asks():
    three = {"query": jnp.ones((4, 2, 3))}
    masks(scores=three)
    for pattern in (js.NM(2, 4), js.Block((2, 1)), js.Unstructured("output")):
        with pytest.raises(ValueError, match=r"query: a kernel of three axes"):
            masks(scores=three, pattern=pattern)


def test_a_vector_has_no_inputs():
    with pytest.raises(ValueError, match=r"bias: .* has no input and output axes"):
        masks(scores={"bias": jnp.ones(4)}, where="bias", pattern=js.NM(2, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: js.Unstructured("tensor"),
        lambda: js.Block((4,)),
        lambda: js.Block((0, 4)),
        lambda: js.Balanced((4, 0)),
        lambda: js.Block((4, 4), reduce="sum"),
        lambda: js.Channel(scope="output"),
        lambda: js.NM(0, 4),
        lambda: js.NM(5, 4),
        lambda: js.NM(1, 1),
    ],
)
def test_patterns_without_meaning_cannot_be_made(make):
    with pytest.raises(ValueError, match=r"must be|keep <= of|\(inputs, outputs\)"):
        make()


@pytest.mark.parametrize(
    "make", [lambda: js.NM("2", 4), lambda: js.NM(True, 4), lambda: js.Channel("out")]
)
def test_patterns_of_the_wrong_type_cannot_be_made(make):
    with pytest.raises(TypeError, match="integer"):
        make()


def test_patterns_are_values():
    assert js.Block([4, 4]) == js.Block((4, 4))
    assert len({js.NM(2, 4), js.NM(keep=2, of=4), js.NM(1, 4)}) == 2
