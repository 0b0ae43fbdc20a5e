"""The best weights for a mask: exact, and by conjugate gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import layerwise as oracle
from solvers.layers import LAYER, TWO_OF_FOUR, correlated, layer, single

import jaxsparse as js

refit = js.solvers.refit


def random_mask(shape, seed=2):
    return np.random.default_rng(seed).random(shape) > 0.5


def test_exact_is_least_squares_and_many_iterations_are_too():
    w, gram = layer()
    mask = random_mask(w.shape)
    mask[0], mask[1] = False, True
    expected = oracle.refit(w, mask, gram)
    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in (w, mask, gram)]
        exact, close = refit(*given), refit(*given, iterations=80)
    for got in (exact, close):
        np.testing.assert_allclose(got.w, expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(got.mask, mask)
        np.testing.assert_allclose(
            got.info.error, oracle.error(w, expected, gram), rtol=1e-6
        )


def test_damping_is_part_of_the_objective():
    w, gram = layer()
    mask = random_mask(w.shape)
    expected = oracle.refit(w, mask, oracle.damped(gram, 0.1)[0])
    with jax.enable_x64(True):
        w, mask, gram = (jnp.asarray(x) for x in (w, mask, gram))
        got = refit(w, mask, gram, rel_damping=0.1)
        factor = js.curvature.factor_gram(gram, rel_damping=0.1)
        by_factor = refit(w, mask, factor, iterations=80)
    np.testing.assert_allclose(got.w, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(by_factor.w, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("iterations", [None, 30])
def test_kept_weights_of_dead_inputs_stay(iterations):
    w, gram = single(*layer(d_in=64, dead=(3, 9)))
    mask = jnp.asarray(random_mask(w.shape))
    got = refit(w, mask, gram, iterations=iterations)
    dead = np.asarray(mask)[:, (3, 9)]
    np.testing.assert_array_equal(
        np.asarray(got.w)[:, (3, 9)], np.where(dead, np.asarray(w)[:, (3, 9)], 0)
    )


def test_fewer_rows_than_inputs():
    w, gram = layer(rows=20)
    mask = jnp.asarray(random_mask(w.shape))
    w, gram = single(w, gram)
    assert float(refit(w, mask, gram, iterations=30).info.relative_error) < 0.05
    with pytest.raises(ValueError, match="not positive definite"):
        refit(
            w, np.ones(w.shape, bool), np.asarray(gram) - 0.1 * np.eye(40, dtype="f4")
        )
    assert np.isfinite(refit(w, mask, gram, rel_damping=0.01).w).all()


@pytest.mark.parametrize(
    "pattern",
    # Any mask will do: the pattern is a matter of the sweep.
    [LAYER, pytest.param(TWO_OF_FOUR, marks=pytest.mark.exhaustive)],
    ids=["layer", "nm"],
)
def test_it_halves_the_error_of_the_sweep(pattern):
    w, gram = correlated()
    swept = js.solvers.sparsegpt(w, gram, 0.5, pattern=pattern)
    ten = refit(w, swept.mask, gram, iterations=10, start=swept.w)
    exact = refit(w, swept.mask, gram)
    assert float(swept.info.error) > 1.8 * float(ten.info.error)
    assert float(exact.info.error) <= 1.001 * float(ten.info.error)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mask": None}, TypeError, "needs a mask"),
        ({"mask": np.ones((16, 39), bool)}, ValueError, "mask must have the shape"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1"),
        ({"start": np.ones((16, 40))}, ValueError, "be given with iterations"),
        ({"gram": np.eye(4)}, ValueError, "gram must be"),
    ],
)
def test_what_does_not_fit(options, error, match):
    w, gram = single(*layer())
    given = {"w": w, "mask": np.ones(w.shape, bool), "gram": gram}
    with pytest.raises(error, match=match):
        refit(**(given | options))
