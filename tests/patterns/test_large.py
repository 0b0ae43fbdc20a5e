"""Arrays so large that a search begins near the cut, which a sample tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import selection

import jaxsparse as js

SHAPE = (1024, 1056)
SPARSITIES = (0.5, 0.99999)


@jax.jit
def select(x, sparsity):
    return js.patterns.masks({"w": x}, sparsity)["w"]


@jax.jit
def select_globally(tree, sparsity):
    return js.patterns.masks(tree, sparsity, pattern=js.Unstructured("global"))


def drawn(kind):
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal(SHAPE)).astype(np.float32)
    match kind:
        case "tied":
            return np.round(x * 4) / 4
        case "mostly zero":
            return np.where(rng.random(SHAPE) < 0.95, 0, x).astype(np.float32)
        case "of many scales":
            return (x * np.exp(20 * rng.standard_normal(SHAPE[1]))).astype(np.float32)
        case "in two heaps":  # a sample of the one says nothing of the other
            flat = x.reshape(-1)
            flat[:4096] += 1000
            return x
    return x


KINDS = ["tied", "in two heaps"]
MORE = ["plain", "mostly zero", "of many scales"]
KINDS += [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in MORE]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_a_sort(kind):
    x = drawn(kind)
    for sparsity in SPARSITIES:
        expected = selection.mask(x, sparsity, js.Unstructured())
        np.testing.assert_array_equal(select(x, np.float64(sparsity)), expected)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_narrow_types_are_tied_everywhere(dtype):
    x = drawn("plain").astype(dtype)
    expected = selection.mask(x, 0.9, js.Unstructured())
    np.testing.assert_array_equal(select(x, 0.9), expected)


def test_several_arrays_have_one_cut():
    tree = {"a": drawn("plain")[:512], "b": drawn("plain")[512:] * 2}
    # One array of all rows: the order of the leaves is that of the rows.
    rows = np.concatenate(list(tree.values()))
    expected = np.split(selection.mask(rows, 0.9, js.Unstructured()), 2)
    found = select_globally(tree, 0.9)
    for mask, full in zip(found.values(), expected, strict=True):
        np.testing.assert_array_equal(mask, full)


def test_magnitudes_of_a_step_are_those_that_are_given():
    """A step reads the weights; `masks` reads scores."""
    signs = np.where(np.arange(SHAPE[1]) % 3, 1, -1).astype(np.float32)
    params = {"a": drawn("plain") * signs, "b": drawn("of many scales") * signs}
    params = jax.tree.map(jnp.asarray, params)
    pattern = js.Unstructured("global")
    tx = js.prune_schedule(0.9, every=1, pattern=pattern)
    state = jax.jit(tx.update)(params, tx.init(params), params)[1]
    given = js.patterns.masks(js.scores.magnitude(params), 0.9, pattern=pattern)
    for mask, expected in zip(state.masks.values(), given.values(), strict=True):
        np.testing.assert_array_equal(mask, expected)
