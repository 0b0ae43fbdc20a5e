"""ADMM against the same in dense float64; ALPS by what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import layerwise as oracle
from solvers import layers
from solvers.layers import LAYER, PATTERNS, TWO_OF_FOUR, correlated, layer, single

import jaxsparse as js

every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
both = pytest.mark.parametrize("solve", [js.solvers.admm, js.solvers.alps])


@every_pattern
def test_admm(pattern):
    w, gram = layer()
    new, kept = oracle.admm(w, gram, 0.5, pattern)
    with jax.enable_x64(True):
        given = jnp.asarray(w), jnp.asarray(gram)
        got = js.solvers.admm(*given, 0.5, pattern=pattern)
    np.testing.assert_array_equal(got.mask, kept)
    np.testing.assert_allclose(got.w, new, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(got.info.error, oracle.error(w, new, gram), rtol=1e-6)


@pytest.mark.parametrize("pattern", [LAYER, TWO_OF_FOUR], ids=["layer", "nm"])
def test_alps_leaves_a_third_of_the_error_of_the_sweep(pattern):
    w, gram = correlated()
    swept = js.solvers.sparsegpt(w, gram, 0.5, pattern=pattern)
    got = js.solvers.alps(w, gram, 0.5, pattern=pattern)
    layers.assert_obeys(got.mask, 0.5, pattern)
    assert float(swept.info.error) > 3 * float(got.info.error)
    exact = js.solvers.refit(w, got.mask, gram)
    assert float(got.info.error) < 1.25 * float(exact.info.error)  # undamped


@both
def test_counts_and_dead_inputs(solve):
    w, gram = single(*layer(d_in=64, dead=(3, 9)))
    got = solve(w, gram, 0.37)
    layers.assert_obeys(got.mask, 0.37, LAYER)
    assert not np.asarray(got.mask)[:, (3, 9)].any()
    assert int(got.info.dead) == 2
    got = solve(w, gram, 0.01)  # fewer than the weights of dead inputs
    unused = np.asarray(got.mask)[:, (3, 9)]
    assert unused.any()
    np.testing.assert_array_equal(
        np.asarray(got.w)[:, (3, 9)][unused], np.asarray(w)[:, (3, 9)][unused]
    )


@both
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sparsity": -0.1}, ValueError, r"must lie in \[0, 1\)"),
        ({"pattern": js.Block((4, 4))}, TypeError, "js.Unstructured, js.NM and"),
        ({"rho": 0.0}, ValueError, "rho must be positive"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1"),
        ({"rel_damping": float("nan")}, ValueError, "rel_damping must be"),
    ],
)
def test_what_does_not_fit(solve, options, error, match):
    w, gram = single(*layer())
    with pytest.raises(error, match=match):
        solve(**({"w": w, "gram": gram, "sparsity": 0.5} | options))
