import jax
import jax.numpy as jnp

import jaxsparse as js


def data(keys):
    return jax.tree.map(lambda k: tuple(jax.random.key_data(k).tolist()), keys)


def test_every_leaf_gets_a_key_of_its_own(getkey):
    tree = {"a": [0, 0], "b": {"a": 0}}
    keys = js.tree.keys_like(getkey(), tree)
    assert jax.tree.structure(keys) == jax.tree.structure(tree)
    assert (
        len(set(jax.tree.leaves(data(keys), is_leaf=lambda x: isinstance(x, tuple))))
        == 3
    )


def test_a_new_layer_does_not_reshuffle_the_others(getkey):
    key = getkey()
    few = data(js.tree.keys_like(key, {"b": {"kernel": 0}}))
    more = data(js.tree.keys_like(key, {"a": 0, "b": {"bias": 0, "kernel": 0}}))
    assert few["b"]["kernel"] == more["b"]["kernel"]


def test_another_key_gives_other_keys(getkey):
    first, second = (data(js.tree.keys_like(getkey(), {"a": 0})) for _ in range(2))
    assert first != second


def test_keys_are_the_same_in_every_process():
    # Python salts its own hash; this one is the first 4 bytes of blake2s(path).
    folded = int.from_bytes(bytes.fromhex("822d6055"), "little")
    keys = js.tree.keys_like(jax.random.key(0), {"block": {"kernel": jnp.ones(2)}})
    expected = jax.random.fold_in(jax.random.key(0), folded)
    assert data(keys["block"]["kernel"]) == data(expected)
