"""A sparse forward pass, dense gradients."""

import jax
import numpy as np
import pytest
from transforms import problems

import jaxsparse as js

KEY = jax.random.key(0)


def test_forward_is_pruned_and_backward_is_the_identity():
    params = problems.params()
    sparse = js.straight_through(params, 0.75)
    np.testing.assert_array_equal(
        sparse["dense_0"]["kernel"], js.prune(params, 0.75).params["dense_0"]["kernel"]
    )

    @jax.jit
    def gradients(params, x):
        through = lambda p: problems.loss(js.straight_through(p, 0.75), x)
        pruned = js.straight_through(params, 0.75)
        return jax.grad(through)(params), jax.grad(problems.loss)(pruned, x)

    got, want = gradients(params, problems.batch(0))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6)
    assert np.all(np.asarray(got["dense_1"]["kernel"]) != 0)


@pytest.mark.parametrize(
    "pattern",
    [
        js.NM(2, 4),
        *(
            pytest.param(pattern, marks=pytest.mark.exhaustive)
            for pattern in (js.Block((4, 4)), js.Channel())
        ),
    ],
    ids=str,
)
def test_patterns_and_a_traced_sparsity(pattern):
    params = problems.params()

    @jax.jit
    def f(params, sparsity):
        prune = lambda p: js.straight_through(p, sparsity, pattern=pattern)
        return jax.jvp(prune, (params,), (params,))

    sparse, tangent = f(params, np.float32(0.5))
    assert np.sum(np.asarray(sparse["dense_0"]["kernel"]) == 0) == 96
    np.testing.assert_array_equal(
        tangent["dense_0"]["kernel"], params["dense_0"]["kernel"]
    )


def test_given_masks_are_taken():
    params = problems.params()
    masks = js.prune(params, 0.5, score=lambda p: js.scores.random(p, key=KEY)).masks
    f = lambda p: js.straight_through(p, masks=masks)
    out, back = jax.vjp(f, params)
    expected = js.patterns.apply(params, masks)
    for got, w in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, w)
    (along,) = back(params)
    for got, w in zip(jax.tree.leaves(along), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, w)
    with pytest.raises(ValueError, match="got both"):
        js.straight_through(params, 0.5, masks=masks)
