"""The diagonal Fisher matrix, which is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
from curvature import problems

import jaxsparse as js

DAMPING = 0.5


def problem():
    return problems.tree(("kernel", "stacked")), problems.weights(("kernel", "stacked"))


def expected(grads, damping=DAMPING):
    square = lambda g: np.mean(np.square(np.asarray(g, np.float64)), axis=0) + damping
    return {k: square(g) for k, g in grads.items() if g is not None}


def test_the_inverse_is_one_over_the_mean_square():
    grads, x = problem()
    fisher = js.curvature.diagonal_fisher(grads, damping=DAMPING)
    diagonal = js.curvature.inverse_diagonal(fisher)
    product = js.curvature.ihvp(fisher, x)
    assert diagonal["apart"] is None
    assert product["apart"] is None
    for k, want in expected(grads).items():
        assert diagonal[k].dtype == jnp.float32  # of 16-bit gradients too
        np.testing.assert_allclose(diagonal[k], 1 / want, rtol=1e-6)
        np.testing.assert_allclose(product[k], x[k] / want, rtol=1e-6)


def test_streamed_and_merged_it_is_the_same_and_the_damping_is_free():
    grads, x = problem()
    estimator = js.curvature.diagonal_estimator(where="kernel|stacked")
    start = estimator.init(x | {"bias": jnp.ones(3)})
    part = lambda at: {k: None if g is None else g[at] for k, g in grads.items()}
    update = jax.jit(estimator.update)
    first, second = update(start, part(slice(4))), update(start, part(slice(4, None)))
    merged = estimator.merge(first, second)
    streamed = estimator.update(first, part(slice(4, None)))
    for sums in (merged, streamed):
        assert int(sums.count) == problems.M
        for damping in (DAMPING, 1e-7):
            fisher = estimator.finalize(sums, damping=damping)
            got = js.curvature.inverse_diagonal(fisher)
            assert got["bias"] is None
            for k, want in expected(grads, damping).items():
                np.testing.assert_allclose(got[k], 1 / want, rtol=2e-6)


def test_relative_damping_is_of_the_weights_that_have_gradients():
    grads = {"a": jnp.array([[1.0, 0.0, 3.0]]), "b": jnp.zeros((1, 7))}
    fisher = js.curvature.diagonal_fisher(grads, rel_damping=0.1)
    np.testing.assert_allclose(fisher.damping, 0.5, rtol=1e-6)


def test_a_weight_taken_out_has_the_damping_alone_and_no_other_changes():
    grads, x = problem()
    fisher = js.curvature.diagonal_fisher(grads, damping=DAMPING)
    masks = jax.tree.map(lambda w: w > 0, x)
    kept = js.curvature.inverse_diagonal(js.curvature.restrict(fisher, masks))
    change = js.curvature.eliminate(fisher, x, jax.tree.map(jnp.logical_not, masks))
    for k, want in expected(grads).items():
        alone = np.where(masks[k], 1 / want, 1 / DAMPING)
        np.testing.assert_allclose(kept[k], alone, rtol=1e-6)
        np.testing.assert_array_equal(change[k], np.where(masks[k], 0, -x[k]))
