import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import selection

import jaxsparse as js

PATTERNS = [
    js.Unstructured("global"),
    js.Block((2, 4), scope="global"),
    js.Channel(scope="global"),
    js.Channel(axis=0, reduce="max", scope="global"),
]


def tied_scores():
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 4), "b": (2, 4, 16), "c": (4, 8)}
    scores = {
        k: rng.integers(0, 5, size=s).astype(np.float32) for k, s in shapes.items()
    }
    return scores, {"b": js.Axes(input=(0, 1), output=(2,))}


def expected_masks(scores, sparsity, pattern):
    rules = [None, js.Axes(input=(0, 1), output=(2,)), None]
    default = js.Axes(input=(0,), output=(1,))
    return selection.global_masks(
        list(scores.values()), sparsity, pattern, [r or default for r in rules]
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_all_units_compete_in_the_order_of_the_leaves(pattern):
    scores, axes = tied_scores()
    for sparsity in (0.5, 0.9):
        masks = js.patterns.masks(scores, sparsity, pattern=pattern, axes=axes)
        expected = expected_masks(scores, sparsity, pattern)
        for mask, x, full in zip(
            masks.values(), scores.values(), expected, strict=True
        ):
            np.testing.assert_array_equal(np.broadcast_to(mask, x.shape), full)


def test_the_total_is_exact_and_shared_out_by_score():
    scores = {"low": jnp.zeros((10, 10)), "high": jnp.ones((10, 10))}
    pattern = js.Unstructured("global")
    for min_keep in (0, 1, 7):
        masks = js.patterns.masks(scores, 0.5, pattern=pattern, min_keep=min_keep)
        assert int(masks["low"].sum()) == min_keep
        assert int(masks["high"].sum()) == 100 - min_keep


def test_unselected_parameters_do_not_compete():
    scores = {"a": jnp.ones((4, 4)), "b": jnp.zeros((4, 4))}
    masks = js.patterns.masks(scores, 0.5, pattern=js.Unstructured("global"), where="a")
    assert int(masks["a"].sum()) == 8
    assert masks["b"].shape == ()


def test_parameters_of_different_types_compete():
    scores, _ = tied_scores()
    mixed = scores | {"a": scores["a"].astype(jnp.bfloat16)}
    pattern = js.Unstructured("global")
    masks = jax.jit(lambda x: js.patterns.masks(x, 0.5, pattern=pattern, where="."))
    expected = selection.global_masks(list(scores.values()), 0.5, pattern)
    for mask, full in zip(masks(mixed).values(), expected, strict=True):
        np.testing.assert_array_equal(mask, full)


def test_a_tree_of_sparsities_has_no_meaning():
    scores = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="takes one sparsity"):
        js.patterns.masks(
            scores, {"a": 0.5, "b": 0.5}, pattern=js.Unstructured("global")
        )
