"""Ties, NaN, infinities, denormals and the narrow types, on one shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import selection

import jaxsparse as js

SHAPE = (4, 8)
FLOATS = ["float32", "bfloat16", "float16", "float8_e5m2"]


@jax.jit
def mask_alone_and_beside(scores, sparsity):
    beside = {"v": scores[:2], "w": scores}  # small arrays share a search
    return [js.patterns.masks(x, sparsity)["w"] for x in ({"w": scores}, beside)]


def mask(scores, sparsity):
    alone, beside = mask_alone_and_beside(scores, sparsity)
    np.testing.assert_array_equal(alone, beside)
    return alone


@functools.partial(jax.jit, static_argnames="pattern")
def mask_of(scores, sparsity, pattern):
    return js.patterns.masks({"w": scores}, sparsity, pattern=pattern)["w"]


def assert_sorted(scores, sparsities=(0.0, 0.3, 0.5, 0.9)):
    for s in sparsities:
        expected = selection.mask(scores, s, js.Unstructured())
        np.testing.assert_array_equal(mask(scores, s), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, np.inf, -np.inf])
def test_among_equal_scores_the_lower_index_stays(value):
    kept = np.asarray(mask(np.full(SHAPE, value, np.float32), 0.7))
    assert kept.ravel().tolist() == [True] * 10 + [False] * 22


def test_the_lower_index_stays_in_a_group_of_four():
    kept = mask_of(np.ones(SHAPE, np.float32), 0.5, js.NM(2, 4))
    assert kept.tolist() == [[True] * 8] * 2 + [[False] * 8] * 2


def test_minus_zero_equals_zero():
    scores = np.zeros(SHAPE, np.float32)
    scores[:, ::2] = -0.0
    kept = np.asarray(mask(scores, 0.5))
    assert kept.ravel().tolist() == [True] * 16 + [False] * 16
    kept = np.asarray(mask_of(scores, 0.5, js.NM(2, 4)))
    assert (kept.sum(0) == 2).all()
    assert kept[:2].all()


def test_infinities_are_the_largest_and_the_smallest():
    scores = np.arange(32, dtype=np.float32).reshape(SHAPE) - 16
    scores[0, :4], scores[2, :4] = np.inf, -np.inf
    assert_sorted(scores)


def test_denormals_are_told_apart():
    bits = np.arange(32, dtype=np.uint32)[::-1].reshape(SHAPE).copy()
    scores = bits.view(np.float32)
    assert 0 < scores[0, 0] < np.finfo(np.float32).tiny
    assert_sorted(scores)
    assert_sorted(-scores)


def test_negative_scores_are_in_order():
    rng = np.random.default_rng(0)
    assert_sorted(-np.abs(rng.standard_normal(SHAPE)).astype(np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_type_is_in_its_order(dtype):
    rng = np.random.default_rng(0)
    scores = (rng.standard_normal(SHAPE) * 3).astype(dtype)
    scores[0, :3] = np.array([np.inf, -np.inf, -0.0]).astype(dtype)
    assert_sorted(scores, (0.3, 0.9))


def test_float64_is_told_apart_beyond_float32(x64):
    scores = 1 + 1e-12 * np.random.default_rng(0).permutation(32).reshape(SHAPE)
    patterns = (js.Unstructured(), js.Unstructured("output"), js.NM(2, 4))
    each = jax.jit(lambda x: [mask_of(x, 0.5, pattern) for pattern in patterns])
    for got, pattern in zip(each(scores), patterns, strict=True):
        expected = selection.mask(scores, 0.5, pattern)
        np.testing.assert_array_equal(got, expected)


def test_nan_raises_with_the_path_and_the_count():
    w = np.ones(SHAPE, np.float32)
    w[0, :3] = np.nan
    scores = {"block": {"w": jnp.asarray(w)}}
    with pytest.raises(ValueError, match=r"block/w: 3 of 32 scores are NaN"):
        js.patterns.masks(scores, 0.5)


def test_nan_in_what_is_not_selected_does_not_matter():
    ones = np.ones(SHAPE, np.float32)
    scores = {"bias": jnp.asarray(np.nan * ones[0]), "w": jnp.asarray(ones)}
    assert np.sum(np.asarray(js.patterns.masks(scores, 0.5)["w"])) == 16


@pytest.mark.parametrize("dtype", FLOATS)
def test_under_jit_nan_is_removed_first(dtype):
    scores = (-np.arange(32.0).reshape(SHAPE)).astype(dtype)
    scores[0, 1], scores[0, 5], scores[1, 0] = np.nan, -np.nan, -np.inf
    kept = np.asarray(mask(scores, 3 / 32))
    assert np.argwhere(~kept).tolist() == [[0, 1], [0, 5], [1, 0]]


def test_under_jit_nan_is_removed_first_from_a_group_of_four():
    scores = np.full(SHAPE, -np.inf, np.float32)
    scores[0] = np.nan
    kept = mask_of(scores, 0.25, js.NM(2, 4))
    assert kept.tolist() == [[False] * 8] + [[True] * 8] * 3


def test_scores_of_nothing_but_nan_still_give_the_count():
    kept = np.asarray(mask(np.full(SHAPE, np.nan, np.float32), 0.75))
    assert kept.ravel().tolist() == [True] * 8 + [False] * 24


def test_parameters_without_weights_are_no_trouble():
    ones = np.ones(SHAPE, np.float32)
    scores = {"empty": jnp.asarray(ones[:0]), "w": jnp.asarray(ones)}
    for pattern in (js.Unstructured(), js.Unstructured("global"), js.NM(2, 4)):
        masks = js.patterns.masks(scores, 0.5, pattern=pattern)
        assert masks["empty"].shape == (0, 8)
        assert np.asarray(masks["w"]).sum() == 16
