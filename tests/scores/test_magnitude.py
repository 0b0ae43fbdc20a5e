import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_magnitude_is_the_absolute_value(dtype):
    w = jnp.array([[-2.0, 0.5], [-0.0, -jnp.inf]], dtype)
    score = js.scores.magnitude({"w": w})["w"]
    assert score.dtype == dtype
    assert score.tolist() == [[2.0, 0.5], [0.0, float("inf")]]
    assert not jnp.signbit(score).any()


def test_states_with_random_keys_and_counters_are_scored():
    params = {"rng": jax.random.key(0), "step": jnp.uint32(3), "w": -jnp.ones((2, 2))}
    for score in (
        js.scores.magnitude(params),
        js.scores.random(params, key=params["rng"]),
    ):
        assert score["rng"] == params["rng"]
        assert score["w"].shape == (2, 2)


def test_random_scores_are_uniform(getkey):
    score = js.scores.random({"w": jnp.zeros((200, 200))}, key=getkey())["w"]
    counts = np.histogram(score, bins=10, range=(0, 1))[0]
    assert counts.sum() == 40_000
    assert np.abs(counts - 4000).max() < 6 * np.sqrt(4000 * 0.9)


def test_a_new_layer_does_not_change_the_random_scores_of_others(getkey):
    key = getkey()
    few = js.scores.random({"b": jnp.ones((2, 3))}, key=key)
    more = js.scores.random({"a": jnp.ones(2), "b": jnp.ones((2, 3))}, key=key)
    np.testing.assert_array_equal(few["b"], more["b"])


def test_with_one_key_a_rising_sparsity_brings_no_weight_back(getkey):
    score = js.scores.random({"w": jnp.ones((8, 8))}, key=getkey())
    kept = [np.asarray(js.patterns.masks(score, s)["w"]) for s in (0.2, 0.5, 0.9)]
    assert not (kept[1] & ~kept[0]).any()
    assert not (kept[2] & ~kept[1]).any()


def test_integers_get_random_scores_that_can_be_selected_by(getkey):
    score = js.scores.random({"w": jnp.ones((2, 2), jnp.int8)}, key=getkey())
    assert score["w"].dtype == jnp.float32
