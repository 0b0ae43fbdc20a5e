import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
