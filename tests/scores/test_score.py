import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

params = {"w": jnp.array([[1.0, -2.0]])}
grads = {"w": jnp.array([[3.0, 0.5]])}


def test_a_function_of_params_needs_no_gradients():
    score = js.scores.as_score(js.scores.magnitude)
    assert not score.needs_grads
    assert score.score(params, None, score.init(params))["w"].tolist() == [[1.0, 2.0]]


def test_a_function_of_params_and_grads_is_given_both():
    score = js.scores.as_score(js.scores.taylor)
    assert score.needs_grads
    assert score.score(params, grads, score.init(params))["w"].tolist() == [[3.0, 1.0]]


def test_a_plain_function_has_no_state():
    score = js.scores.as_score(js.scores.magnitude)
    state = score.init(params)
    assert jax.tree.leaves(state) == []
    assert score.update(grads, state, params) == state


def test_a_score_is_left_as_it_is():
    score = js.scores.moving_average(js.scores.taylor)
    assert js.scores.as_score(score) is score


def test_other_arguments_have_to_be_bound(getkey):
    with pytest.raises(TypeError, match=r"functools\.partial"):
        js.scores.as_score(js.scores.random)
    bound = functools.partial(js.scores.random, key=getkey())
    assert not js.scores.as_score(bound).needs_grads


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="A score is a function"):
        js.scores.as_score("magnitude")


def test_an_average_follows_its_recurrence():
    score = js.scores.moving_average(js.scores.taylor, decay=0.75)
    state, expected = score.init(params), np.zeros((1, 2))
    for step in range(4):
        now = {"w": grads["w"] * step}
        state = jax.jit(score.update)(now, state, params)
        expected = 0.75 * expected + 0.25 * np.abs(params["w"] * now["w"])
    np.testing.assert_allclose(
        score.score(params, grads, state)["w"], expected, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_average_of_narrow_scores_is_kept_in_float32(dtype, request):
    if dtype == "float16":
        request.getfixturevalue("float16")
    narrow = {"w": jnp.ones((2, 2), dtype)}
    score = js.scores.moving_average(js.scores.taylor, decay=0.999)
    state = score.init(narrow)
    for _ in range(3):
        state = score.update(narrow, state, narrow)
    average = score.score(narrow, narrow, state)["w"]
    assert average.dtype == jnp.float32
    np.testing.assert_allclose(average, 1 - 0.999**3, rtol=1e-4)


def test_an_average_of_an_average_is_one(x64):
    once = js.scores.moving_average(js.scores.magnitude, decay=0.5)
    twice = js.scores.moving_average(once, decay=0.5)
    state = twice.init(params)
    state = twice.update(grads, state, params)
    np.testing.assert_allclose(
        twice.score(params, grads, state)["w"], [[0.25, 0.5]], rtol=1e-6
    )


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        js.scores.moving_average(js.scores.taylor, decay=decay)
