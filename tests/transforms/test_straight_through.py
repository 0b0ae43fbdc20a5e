"""A sparse forward pass, dense gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transforms import problems

import jaxsparse as js


def test_forward_is_pruned_and_backward_is_the_identity():
    params = problems.params()
    sparse = js.straight_through(params, 0.75)
    np.testing.assert_array_equal(
        sparse["dense_0"]["kernel"], js.prune(params, 0.75).params["dense_0"]["kernel"]
    )
    x = problems.batch(0)
    got = jax.grad(lambda p: problems.loss(js.straight_through(p, 0.75), x))(params)
    want = jax.grad(problems.loss)(sparse, x)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)
    assert bool(jnp.all(got["dense_1"]["kernel"] != 0))


@pytest.mark.parametrize(
    "pattern", [js.NM(2, 4), js.Block((4, 4)), js.Channel()], ids=str
)
def test_patterns_and_a_traced_sparsity(pattern):
    params = problems.params()
    f = jax.jit(lambda p, s: js.straight_through(p, s, pattern=pattern))
    sparse = f(params, jnp.float32(0.5))
    assert int(jnp.sum(sparse["dense_0"]["kernel"] == 0)) == 96
    tangent = jax.jvp(lambda p: f(p, jnp.float32(0.5)), (params,), (params,))[1]
    np.testing.assert_array_equal(
        tangent["dense_0"]["kernel"], params["dense_0"]["kernel"]
    )
