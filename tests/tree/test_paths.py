import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxsparse as js


class Layer(NamedTuple):
    kernel: int
    bias: int


@dataclasses.dataclass
class Model:
    layers: list
    head: int


jax.tree_util.register_dataclass(Model, ["layers", "head"], [])


def paths(tree):
    return [path for path, _ in js.tree.leaves_with_paths(tree)]


def test_dicts_lists_named_tuples_and_dataclasses_have_plain_paths():
    assert paths({"a": {"b": 1}, "c": [2, (3,)]}) == ["a/b", "c/0", "c/1/0"]
    assert paths(Layer(1, 2)) == ["kernel", "bias"]
    assert paths(Model([Layer(1, 2)], 3)) == [
        "layers/0/kernel",
        "layers/0/bias",
        "head",
    ]


def test_the_leaves_are_in_the_order_of_jax():
    tree = {"b": 2, "a": {"c": 1}, "A": 0}
    leaves = [leaf for _, leaf in js.tree.leaves_with_paths(tree)]
    assert leaves == jax.tree.leaves(tree) == [0, 1, 2]


def test_a_lone_array_has_the_empty_path():
    assert paths(jnp.ones(3)) == [""]


def test_a_state_of_nnx_has_the_paths_of_linen():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert paths({"dense": state}) == ["dense/bias", "dense/kernel"]
    value = jax.tree_util.GetAttrKey("value")
    assert js.tree.path_str((jax.tree_util.DictKey("kernel"), value)) == "kernel"


def test_map_with_path_passes_the_leaves_of_every_tree():
    got = js.tree.map_with_path(
        lambda path, x, y: (path, x + y), {"a": [1, 2]}, {"a": [10, 20]}
    )
    assert got == {"a": [("a/0", 11), ("a/1", 22)]}


def test_keys_with_a_slash_keep_it():
    haiku = {"mlp/linear": {"w": 1}, "mlp": {"b": 2}}
    assert paths(haiku) == ["mlp/b", "mlp/linear/w"]


def test_no_two_leaves_have_one_path():
    assert paths({"a": {"b": 1}, "a/b": 2}) == ["a/b", "a%2Fb"]
    assert paths({"k": [1, 2], "k/0": 3}) == ["k/0", "k/1", "k%2F0"]
    tree = {"a": {"b": 1}, "a/b": 2, "c": 3}
    named = js.tree.map_with_path(lambda path, x: f"{path}={x}", tree)
    assert named == {"a": {"b": "a/b=1"}, "a/b": "a%2Fb=2", "c": "c=3"}


def test_paths_that_cannot_be_told_apart_are_an_error():
    tree = {"a": {"b": 1}, "a/b": 2, "a%2Fb": 3}
    with pytest.raises(ValueError, match=r"a%2Fb: 2 leaves .* Rename a key"):
        js.tree.leaves_with_paths(tree)
