import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

PLAIN = np.array([3.0, 1.0, 1.0, 0.0, 5.0])
COPIES = np.array([[1.0, 3.0], [2.0, 10.0]])
SCORES = {"plain": PLAIN, "copies": COPIES}

BY_HAND = {
    "normalize_mean": ([1.5, 0.5, 0.5, 0, 2.5], [[0.25, 0.75], [0.5, 2.5]]),
    "normalize_max": ([0.6, 0.2, 0.2, 0, 1], [[0.1, 0.3], [0.2, 1]]),
    "normalize_norm": (
        [0.5, 1 / 6, 1 / 6, 0, 5 / 6],
        np.divide([[1, 3], [2, 10]], 114**0.5),
    ),
    "normalize_range": ([0.6, 0.2, 0.2, 0, 1], [[0, 2 / 9], [1 / 9, 1]]),
    "normalize_quantile": ([3, 1, 1, 0, 5], [[1 / 3, 1], [2 / 3, 10 / 3]]),
    "standardize": (
        np.array([1, -1, -1, -2, 3]) / 2,
        np.array([[-3, -1], [-2, 6]]) / (50 / 3) ** 0.5,
    ),
    "lamp": ([3 / 8, 0.1, 0.1, 0, 1], [[1 / 16, 3 / 13], [2 / 15, 1]]),
}
PER_COPY = {
    "normalize_mean": [[0.5, 1.5], [1 / 3, 5 / 3]],
    "normalize_max": [[1 / 3, 1], [0.2, 1]],
    "normalize_norm": np.array([[1, 3], [2, 10]]) / np.sqrt([[10], [104]]),
    "normalize_range": [[0, 1], [0, 1]],
    "normalize_quantile": [[1 / 3, 1], [0.2, 1]],
    "standardize": np.array([[-1, 1], [-1, 1]]) / 2**0.5,
    "lamp": [[0.25, 1], [1 / 6, 1]],
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", BY_HAND)
def test_they_are_what_the_formulas_give_by_hand(name):
    f = getattr(js.channels, name)
    orders = []

    @jax.jit
    def both(*values):  # no dicts, whose keys JAX sorts
        scores = dict(zip(SCORES, values, strict=True))
        found = f(scores), f(scores, per_copy=True)
        orders.extend(map(list, found))
        return found

    joint, of_each = both(*SCORES.values())
    assert orders == [["plain", "copies"]] * 2
    np.testing.assert_allclose(joint["plain"], BY_HAND[name][0], rtol=1e-14)
    np.testing.assert_allclose(joint["copies"], BY_HAND[name][1], rtol=1e-14)
    np.testing.assert_allclose(of_each["plain"], BY_HAND[name][0], rtol=1e-14)
    np.testing.assert_allclose(of_each["copies"], PER_COPY[name], rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_without_jit_they_are_the_same():
    for name, (wanted, _) in BY_HAND.items():
        found = getattr(js.channels, name)({"plain": PLAIN})["plain"]
        np.testing.assert_allclose(found, wanted, rtol=1e-14)


def test_a_quantile_of_zero_is_not_divided_by():
    scores = {"a": jnp.array([0.0, 0.0, 4.0, 2.0]), "b": jnp.zeros(4)}
    found = js.channels.normalize_quantile(scores, q=0.25)
    np.testing.assert_array_equal(found["a"], [0, 0, 2, 1])
    np.testing.assert_array_equal(found["b"], 0)
    assert float(js.channels.normalize_quantile(scores, q=1.0)["a"][2]) == 1
    with pytest.raises(ValueError, match=r"q must lie in \[0, 1\], got 1\.5"):
        js.channels.normalize_quantile(scores, q=1.5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", BY_HAND)
def test_the_order_within_a_group_stays(name):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=20) - 1, [0.3, 0.3, -1.2, -1.2]])
    x = abs(x) if name == "lamp" else x
    got = np.asarray(jax.jit(getattr(js.channels, name))({"g": x})["g"])
    np.testing.assert_array_equal(np.sign(got[:, None] - got), np.sign(x[:, None] - x))


@pytest.mark.parametrize("name", BY_HAND)
def test_equal_scores_are_no_division_by_zero(name):
    scores = {"zero": np.zeros(3), "equal": np.full((2, 3), 0.1), "one": np.ones(1)}
    scores = {n: x.astype(np.float32) for n, x in scores.items()}
    found = jax.device_get(jax.jit(getattr(js.channels, name))(scores))
    for x in found.values():
        assert np.isfinite(x).all()
        assert np.ptp(x) == 0 or name == "lamp"
    assert not np.any(found["zero"])


def test_numbers_that_are_very_small_have_a_norm():
    found = js.channels.normalize_norm({"g": np.array([3e-30, 4e-30], np.float32)})
    np.testing.assert_allclose(found["g"], [0.6, 0.8], 1e-6)


def test_sixteen_bit_scores_become_float32():
    found = js.channels.standardize({"g": np.array([1, 2, 3], jnp.bfloat16)})["g"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [-1, 0, 1])


def ones(*shape):
    return np.ones(shape, np.float32)


def groups_and_params():
    params = {
        "up": {"kernel": ones(5, 3), "bias": ones(3)},
        "q": ones(5, 2, 4),
        "o": ones(2, 4, 1),
        "down": ones(3, 7),
    }

    def apply_fn(p, x):
        hidden = x @ p["up"]["kernel"] + p["up"]["bias"][None]
        heads = jnp.einsum("nd,dhk->nhk", x, p["q"])
        return jnp.tanh(hidden) @ p["down"], jnp.einsum("nhk,hko->no", heads, p["o"])

    return js.coupling.groups(js.trace(apply_fn, params, ones(2, 5))), params


def test_per_parameter_counts_the_weights_that_where_selects():
    groups, params = groups_and_params()
    scores = {n: ones(*g.copies, g.size) for n, g in groups.prunable.items()}
    assert {n: x.shape for n, x in scores.items()} == {
        "q[1]": (2,),
        "q[2]": (2, 4),
        "up/kernel[1]": (3,),
    }
    found = js.channels.per_parameter(groups, scores, params)
    np.testing.assert_allclose(found["up/kernel[1]"], np.full(3, 1 / 12))
    np.testing.assert_allclose(found["q[1]"], np.full(2, 1 / 24))
    np.testing.assert_allclose(found["q[2]"], np.full((2, 4), 1 / 6))
    found = js.channels.per_parameter(
        groups, scores, params, where=lambda path, _: True
    )
    np.testing.assert_allclose(found["up/kernel[1]"], np.full(3, 1 / 13))
    shapes = jax.eval_shape(lambda: params)
    found = js.channels.per_parameter(groups, {"q[1]": scores["q[1]"]}, shapes)
    np.testing.assert_allclose(found["q[1]"], np.full(2, 1 / 24))


def test_errors_say_what_is_expected():
    groups, params = groups_and_params()
    with pytest.raises(ValueError, match=r"g: lamp needs .*the least is -1"):
        js.channels.lamp({"g": np.array([1, -1], np.float32)})
    with pytest.raises(TypeError, match="g: scores must be real floating-point"):
        js.channels.normalize_mean({"g": jnp.array([1, 2])})
    with pytest.raises(ValueError, match=r"up/kernel\[0\]: it has scores, but no prun"):
        js.channels.per_parameter(groups, {"up/kernel[0]": ones(5)}, params)
    with pytest.raises(ValueError, match=r"q\[2\]: scores of shape \(4,\) for a group"):
        js.channels.per_parameter(groups, {"q[2]": ones(4)}, params)
