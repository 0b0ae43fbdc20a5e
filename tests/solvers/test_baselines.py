"""Wanda and magnitude as solvers: they choose, and tell what it costs."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js


def layer(d_out=6, d_in=16):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, d_in)) * np.linspace(0.2, 3, d_in)
    w = rng.standard_normal((d_out, d_in))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / 40, jnp.float32)


@pytest.mark.parametrize("solver", [js.solvers.wanda, js.solvers.magnitude])
def test_it_keeps_the_highest_scores_of_each_output_as_they_are(solver):
    w, gram = layer()
    solved = solver(w, gram, 0.5, pattern=js.Unstructured("output"))
    inputs = np.sqrt(np.diag(gram)) if solver is js.solvers.wanda else np.ones(16)
    score = np.abs(w) * inputs
    kept = score > np.sort(score, axis=1)[:, 7:8]
    np.testing.assert_array_equal(solved.mask, kept)
    np.testing.assert_array_equal(solved.w, np.where(kept, w, 0))
    lost, gram = np.where(kept, 0, w).astype(np.float64), np.asarray(gram)
    error = np.sum((lost @ gram) * lost)
    np.testing.assert_allclose(solved.info.error, error, rtol=1e-5)
    whole = np.sum((np.asarray(w) @ gram) * w)
    np.testing.assert_allclose(solved.info.relative_error, error / whole, rtol=1e-5)


def test_the_diagonal_alone_gives_the_same_mask():
    w, gram = layer()
    whole = js.solvers.wanda(w, gram, pattern=js.NM(2, 4))
    diagonal = js.solvers.wanda(w, np.diag(gram), pattern=js.NM(2, 4))
    factor = js.curvature.factor_gram(gram, rel_damping=0.01)
    shared = js.solvers.wanda(w, factor, pattern=js.NM(2, 4))
    np.testing.assert_array_equal(whole.mask, diagonal.mask)
    np.testing.assert_array_equal(whole.mask, shared.mask)
    assert np.all(np.asarray(whole.mask).reshape(6, 4, 4).sum(-1) == 2)
    np.testing.assert_allclose(whole.info.error, shared.info.error, rtol=1e-6)


def test_as_the_solver_of_a_pass_it_needs_no_gram():
    w, _ = layer()
    x = np.random.default_rng(1).standard_normal((20, 16)).astype("float32")
    run = lambda **options: js.oneshot.layerwise(
        lambda p, x: x @ p["w"].T,
        {"w": w},
        [x],
        sparsity=0.5,
        solver=js.solvers.wanda,
        pattern=js.Unstructured("output"),
        **options,
    )
    np.testing.assert_array_equal(run().masks["w"], run(gram=False).masks["w"])


def test_bad_input():
    w, gram = layer()
    with pytest.raises(ValueError, match="has 16 inputs"):
        js.solvers.wanda(w, np.ones(15, "float32"), 0.5)
    with pytest.raises(ValueError, match="needs a sparsity"):
        js.solvers.magnitude(w, gram)
    with pytest.raises(TypeError, match="refit"):
        js.solvers.wanda(w, gram, 0.5, pattern=js.Block((4, 1)))
