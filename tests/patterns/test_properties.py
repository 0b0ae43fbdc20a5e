"""What holds for all scores: shapes are few (each compiles), values are free."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import selection

import jaxsparse as js

SHAPE = (4, 6)
PATTERNS = {
    "layer": js.Unstructured(),
    "output": js.Unstructured("output"),
    "nm": js.NM(2, 4),
    "block": js.Block((2, 2), reduce="max"),
    "balanced": js.Balanced((2, 2), reduce="max"),
    "channel": js.Channel(reduce="max"),
}
# Few distinct values make ties; wild ones are every float32 but NaN.
few = hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5]))
wild = hnp.arrays(np.float32, SHAPE, elements=st.floats(width=32, allow_nan=False))
scores_of = st.one_of(few, wild)
distinct = st.permutations(range(24)).map(
    lambda order: np.asarray(order, np.float32).reshape(SHAPE)
)
sparsities = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 0.95])
budget = settings(max_examples=40)


def masks_of(pattern):
    @jax.jit
    def masks(scores, sparsity):
        found = js.patterns.masks({"w": scores}, sparsity, pattern=pattern)["w"]
        return jnp.broadcast_to(found, scores.shape)

    return lambda scores, sparsity: np.asarray(masks(scores, np.float32(sparsity)))


MASKS = {name: masks_of(pattern) for name, pattern in PATTERNS.items()}
every_pattern = pytest.mark.parametrize("name", PATTERNS)


def largest(name):
    return PATTERNS["nm"].sparsity if name == "nm" else 1.0


@every_pattern
@budget
@given(scores=scores_of, sparsity=sparsities)
def test_masks_are_those_of_a_sort(name, scores, sparsity):
    sparsity = min(sparsity, largest(name))
    expected = selection.mask(scores, sparsity, PATTERNS[name])
    np.testing.assert_array_equal(MASKS[name](scores, sparsity), expected)


@budget
@given(scores=scores_of, sparsity=sparsities)
def test_the_count_is_exact_and_no_removed_score_is_above_a_kept_one(scores, sparsity):
    kept = MASKS["layer"](scores, sparsity)
    assert (~kept).sum() == js.patterns.removed_count(sparsity, scores.size)
    if kept.any() and not kept.all():
        assert scores[kept].min() >= scores[~kept].max()


@every_pattern
@budget
@given(scores=scores_of, pair=st.tuples(sparsities, sparsities).map(sorted))
def test_what_a_lower_sparsity_removes_a_higher_one_removes_too(name, scores, pair):
    few_removed, more_removed = (~MASKS[name](scores, s) for s in pair)
    assert not (few_removed & ~more_removed).any()


@every_pattern
@budget
@given(scores=scores_of, sparsity=sparsities)
def test_masks_of_masked_scores_are_the_masks(name, scores, sparsity):
    magnitudes = np.abs(scores)
    kept = MASKS[name](magnitudes, sparsity)
    again = MASKS[name](np.where(kept, magnitudes, -np.inf), sparsity)
    np.testing.assert_array_equal(again, kept)


@budget
@given(scores=distinct, order=st.permutations(range(24)), sparsity=sparsities)
def test_without_ties_a_permutation_of_the_weights_permutes_the_mask(
    scores, order, sparsity
):
    kept = MASKS["layer"](scores, sparsity).ravel()
    moved = scores.ravel()[order].reshape(SHAPE)
    np.testing.assert_array_equal(MASKS["layer"](moved, sparsity).ravel(), kept[order])


@every_pattern
@budget
@given(scores=distinct, order=st.permutations(range(6)), sparsity=sparsities)
def test_without_ties_a_permutation_of_outputs_permutes_the_mask(
    name, scores, order, sparsity
):
    if name in {"block", "balanced"}:
        order = [2 * i + j for i in np.argsort(order[:3]) for j in (0, 1)]
    kept = MASKS[name](scores, sparsity)
    np.testing.assert_array_equal(
        MASKS[name](scores[:, order], sparsity), kept[:, order]
    )


@budget
@given(scores=distinct, sparsity=sparsities)
def test_only_the_order_of_the_scores_counts(scores, sparsity):
    kept = MASKS["layer"](scores, sparsity)
    np.testing.assert_array_equal(MASKS["layer"](np.exp(scores), sparsity), kept)
