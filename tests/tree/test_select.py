import jax
import jax.numpy as jnp
import pytest

import jaxsparse as js

params = {
    "embed": {"embedding": jnp.ones((10, 4))},
    "attn": {"query": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((2, 2))}},
    "mlp": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
    "norm": {"scale": jnp.ones(4)},
    "steps": jnp.array(3),
}


def selected(where=None, tree=params):
    chosen = js.tree.select(tree, where)
    assert jax.tree.structure(chosen) == jax.tree.structure(tree)
    assert all(isinstance(x, bool) for x in jax.tree.leaves(chosen))
    return {path for path, take in js.tree.leaves_with_paths(chosen) if take}


def test_the_default_takes_kernels_alone():
    assert selected() == {"attn/query/kernel", "mlp/kernel"}


@pytest.mark.parametrize(
    "name", ["bias", "q_bias", "scale", "embedding", "pos_embed", "layer_norm", "Gamma"]
)
def test_the_default_leaves_biases_scales_and_embeddings_dense(name):
    assert not js.tree.default_where(f"block/{name}", jnp.ones((4, 4)))


@pytest.mark.parametrize("name", ["kernel", "w", "bias_net/kernel", "unbiased"])
def test_the_default_looks_at_the_last_word_of_the_path(name):
    assert js.tree.default_where(name, jnp.ones((4, 4)))


def test_the_default_takes_no_integers():
    assert not js.tree.default_where("kernel", jnp.ones((4, 4), jnp.int8))


def test_a_regular_expression_is_searched_in_the_path():
    assert selected("kernel$") == {"attn/query/kernel", "mlp/kernel"}
    assert selected("^mlp/") == {"mlp/kernel", "mlp/bias"}


def test_a_predicate_sees_path_and_leaf():
    big = selected(lambda path, leaf: leaf.size > 15 and "embed" not in path)
    assert big == {"attn/query/kernel", "mlp/kernel"}


def test_a_tree_of_bools_may_be_a_prefix():
    prefix = {"embed": True, "attn": {"query": False}, "mlp": True, "norm": False}
    prefix["steps"] = False
    assert selected(prefix) == {"embed/embedding", "mlp/bias", "mlp/kernel"}


def test_shapes_are_all_it_needs():
    abstract = jax.eval_shape(lambda: params)
    assert selected(tree=abstract) == selected()


def test_a_tree_without_leaves_selects_nothing():
    assert js.tree.select({}, None) == {}
    assert js.tree.select({"a": None}, "kernel") == {"a": None}


def test_an_expression_that_matches_nothing_lists_the_nearest_paths():
    with pytest.raises(
        ValueError, match=r"'mlp/kernal' matches none .* \['mlp/kernel'"
    ):
        js.tree.select(params, "mlp/kernal")


def test_a_predicate_that_takes_nothing_is_refused():
    with pytest.raises(ValueError, match=r"selects none of the 7 parameters"):
        js.tree.select(params, lambda path, leaf: False)


def test_a_tree_of_false_is_refused():
    with pytest.raises(ValueError, match="selects none"):
        js.tree.select(params, jax.tree.map(lambda _: False, params))


def test_a_model_without_kernels_says_what_the_default_is():
    with pytest.raises(ValueError, match=r"The default selection .* \['bias'\]"):
        js.tree.select({"bias": jnp.ones(3)})


@pytest.mark.parametrize("where", [1, ["kernel"], {"mlp": 1.0}, {}, jnp.ones(2, bool)])
def test_what_is_no_selection_is_refused(where):
    with pytest.raises(TypeError, match="`where` must be None, a regular expression"):
        js.tree.select(params, where)


def test_bools_for_another_model_are_refused():
    with pytest.raises(ValueError, match=r"where.*missing .*not in params 'other'"):
        js.tree.select(params, {"other": True})


def test_the_nearest_paths_come_first():
    found = [path for path, _ in js.tree.leaves_with_paths(params)]
    assert js.tree.nearest("^kernal$", found, most=2) == [
        "attn/query/kernel",
        "mlp/kernel",
    ]
    assert js.tree.nearest("norm/scales", found)[0] == "norm/scale"
    assert len(js.tree.nearest("x", found, most=3)) == 3
