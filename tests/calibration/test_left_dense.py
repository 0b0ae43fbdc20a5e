"""A parameter that cannot be followed does not stop the rest of the model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxsparse as js


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(0, 6, 3, 8)
PARAMS = {
    "first": normal(1, 8, 8),
    "register": normal(2, 1, 2, 8),
    "start": normal(3, 1, 1, 8),
    "left": normal(4, 8, 3),
    "right": normal(5, 3, 8),
    "both": normal(6, 8, 8, 2),
    "real": normal(7, 8, 8),
    "wave": normal(8, 8, 8),
    "picked": normal(9, 4, 8, 8),
    "unit": normal(10, 8, 8),
    "last": normal(11, 8, 8),
}
REASONS = {
    "register": "concatenate at",
    "start": "no data is contracted with it",
    "left": r"\(x @ a\) @ b",
    "right": r"\(x @ a\) @ b",
    "both": "complex numbers",
    "real": "complex numbers",
    "wave": "meets complex numbers",
    "picked": "traced index",
}


def apply_fn(p, x):
    spread = lambda token: jnp.broadcast_to(token, (len(x), *token.shape[1:]))
    h = jnp.concatenate([spread(p["start"]), spread(p["register"]), x], 1)
    h = jnp.tanh(h @ p["first"])
    h = jnp.tanh(h @ (p["left"] @ p["right"]))
    turned = h @ (p["both"][..., 0] + 1j * p["both"][..., 1])
    turned = (turned @ p["wave"]) @ lax.complex(p["real"], p["real"])
    h = jnp.tanh(turned.real)
    h = h @ p["picked"][jnp.argmax(x[0, 0, :4])]
    h = h @ (p["unit"] / jnp.linalg.norm(p["unit"]))
    return h @ p["last"]


@pytest.fixture(autouse=True, scope="module")
def complex_numbers_are_made_of_real_ones():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trace():
    return js.trace(apply_fn, PARAMS, X)


def check_reasons(left_dense, more=()):
    assert set(left_dense) == {*REASONS, *more}
    for path, reason in REASONS.items():
        assert path in left_dense[path]
        assert re.search(reason, left_dense[path])


def test_statistics_of_the_rest_are_taken(trace):
    stats = js.calibration.run(trace, PARAMS, [X])
    assert stats.paths == ("first", "unit", "last")
    check_reasons(stats.left_dense)
    scores = js.scores.wanda(PARAMS, stats, where="^(first|last)$")
    assert float(jnp.min(scores["last"])) > 0


def test_layerwise_prunes_the_rest_and_lists_what_it_left():
    options = {"sparsity": 0.5, "show": False, "solver": js.solvers.wanda}
    found = js.oneshot.layerwise(apply_fn, PARAMS, [X], **options)
    check_reasons(found.left_dense, ["unit"])
    assert "`div` at" in found.left_dense["unit"]
    params, masks, info = found
    assert list(info) == ["first", "last"]
    for path, before in PARAMS.items():
        assert np.mean(np.asarray(masks[path])) == (0.5 if path in info else 1.0)
        if path not in info:
            np.testing.assert_array_equal(params[path], before)
    table = js.report.layer_table(info, left_dense=found.left_dense)
    assert table.count("Left dense: ") == len(found.left_dense)


@pytest.mark.parametrize("path", REASONS)
def test_what_is_named_is_an_error(trace, path):
    with pytest.raises(ValueError, match=rf"(?s){path}.*`where`"):
        js.calibration.run(trace, PARAMS, [X], where=f"^({path}|first)$")


def test_what_is_changed_is_an_error_where_it_is_named():
    with pytest.raises(ValueError, match=r"^unit: `div`"):
        js.oneshot.layerwise(apply_fn, PARAMS, [X], sparsity=0.5, where="unit|last")


def test_a_scale_that_cannot_be_found_leaves_one_kernel_dense():
    params = {"w": normal(1, 8, 8), "o": normal(2, 8, 8)}

    def twice(p, x):
        return ((x @ p["w"]) + jnp.tanh(x) @ (2 * p["w"])) @ p["o"]

    options = {"sparsity": 0.5, "show": False, "solver": js.solvers.wanda}
    found = js.oneshot.layerwise(twice, params, [X], **options)
    assert list(found.info) == ["o"]
    assert "not the same product at all" in found.left_dense["w"]


def test_a_model_of_which_nothing_is_left_says_why():
    lost = lambda p, x: (x @ lax.complex(p["w"], p["w"])).real
    with pytest.raises(ValueError, match=r"None of the selected.*complex numbers"):
        js.oneshot.layerwise(lost, {"w": normal(1, 8, 8)}, [X], sparsity=0.5)
