"""Greedy OBS against the same in dense float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import layerwise as oracle
from solvers import layers
from solvers.layers import LAYER, PATTERNS, TWO_OF_FOUR, correlated, layer, single

import jaxsparse as js

exact_obs = js.solvers.exact_obs
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


@every_pattern
@pytest.mark.parametrize("dead", [(), (3, 10)], ids=["", "dead inputs"])
def test_it_is_greedy_obs_in_each_row(pattern, dead):
    w, gram = layer(dead=dead)
    new, kept = oracle.exact_obs(w, gram, 0.5, pattern)
    with jax.enable_x64(True):
        got = exact_obs(jnp.asarray(w), jnp.asarray(gram), 0.5, pattern=pattern)
    np.testing.assert_array_equal(got.mask, kept)
    np.testing.assert_allclose(got.w, new, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(got.info.error, oracle.error(w, new, gram), rtol=1e-6)
    layers.assert_obeys(got.mask, 0.5, pattern)
    assert int(got.info.dead) == len(dead)


@pytest.mark.parametrize(
    "pattern",
    # The values for each pattern are tested above.
    [LAYER, pytest.param(TWO_OF_FOUR, marks=pytest.mark.exhaustive)],
    ids=["layer", "nm"],
)
def test_it_is_better_than_a_sweep(pattern):
    w, gram = correlated()
    swept = js.solvers.sparsegpt(w, gram, 0.5, pattern=pattern)
    greedy = exact_obs(w, gram, 0.5, pattern=pattern)
    assert float(swept.info.error) > 2 * float(greedy.info.error)


def test_rows_in_chunks_are_rows():
    w, gram = single(*layer(d_in=64))
    whole, chunked = exact_obs(w, gram, 0.6), exact_obs(w, gram, 0.6, chunk=3)
    np.testing.assert_array_equal(whole.mask, chunked.mask)
    np.testing.assert_allclose(whole.w, chunked.w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sparsity": 1.0}, ValueError, r"must lie in \[0, 1\)"),
        ({"pattern": js.Channel()}, TypeError, "exact_obs prunes"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        (
            {"damping": 0.0, "gram": (np.eye(40) - 0.1).astype("f4")},
            ValueError,
            "positive definite",
        ),
    ],
)
def test_what_does_not_fit(options, error, match):
    w, gram = single(*layer())
    with pytest.raises(error, match=match):
        exact_obs(**({"w": w, "gram": gram, "sparsity": 0.5} | options))
