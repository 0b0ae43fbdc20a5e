"""Memory of what XLA compiles, for shapes far above the scratch: no hidden copies."""

import functools

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

import jaxsparse as js

M, SHAPE, SIZE = 16, (2000, 2000), 8
MB = 10**6
SUMS = 4 * (SIZE + 1) * 4_000_000  # bytes: 144 MB
SCRATCH = 70 * MB
f32, bf16 = jnp.float32, jnp.bfloat16
estimator = js.curvature.block_estimator(block_size=SIZE)
mfac = functools.partial(js.curvature.mfac, damping=1e-3)


def tree(*lead, dtype=f32):
    return {"kernel": jax.ShapeDtypeStruct((*lead, *SHAPE), dtype)}


def memory(f, *args, donate=()):
    """Bytes of temporary memory, and of arguments that results take the place of."""
    compiled = jax.jit(f, donate_argnums=donate).lower(*args).compile()
    found = compiled.memory_analysis()
    return found.temp_size_in_bytes, found.alias_size_in_bytes


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_gradients_are_added_in_place_and_are_not_copied(dtype):
    sums = jax.eval_shape(estimator.init, tree())
    grads = tree(M, dtype=dtype)  # 256 MB, 128 MB
    temporary, in_place = memory(estimator.update, sums, grads, donate=0)
    assert in_place >= SUMS
    assert temporary < SCRATCH


@pytest.mark.xfail(
    jaxlib.version.__version_info__ >= (0, 12),
    reason="XLA of jaxlib 0.12 copies the blocks once",
    strict=True,
)
def test_blocks_are_inverted_in_place():
    sums = jax.eval_shape(estimator.init, tree())
    finalize = functools.partial(estimator.finalize, damping=1e-3)
    temporary, in_place = memory(finalize, sums, donate=0)
    assert in_place >= SUMS
    assert temporary < 10 * MB


def test_sums_become_the_inverse_without_jit_and_are_gone():
    estimator = js.curvature.block_estimator(block_size=2)
    grads = {"kernel": jnp.array([[[1.0, 2.0], [3.0, 5.0]]])}
    sums = estimator.update(estimator.init({"kernel": grads["kernel"][0]}), grads)
    kept = estimator.finalize(sums, damping=1e-3)
    first = sums.sums[0].square
    assert not first.is_deleted()
    given = estimator.finalize(sums, damping=1e-3, donate=True)
    assert first.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, given, kept)


def test_an_inverse_is_restricted_in_place_where_it_is_given_away():
    grads = {"kernel": jnp.array([[[1.0, 2.0], [3.0, 5.0]]])}
    fisher = js.curvature.block_fisher(grads, block_size=2, damping=1e-3)
    masks = {"kernel": jnp.array([[True, False], [True, True]])}
    kept = js.curvature.restrict(fisher, masks)
    assert not fisher.roots[0].square.is_deleted()
    given = js.curvature.restrict(fisher, masks, donate=True)
    assert fisher.roots[0].square.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, given, kept)


def test_sums_are_merged_in_place():
    sums = jax.eval_shape(estimator.init, tree())
    temporary, in_place = memory(estimator.merge, sums, sums, donate=0)
    assert in_place >= SUMS
    assert temporary < 10 * MB


def test_the_inverse_is_not_copied_to_be_used():
    sums = jax.eval_shape(estimator.init, tree())
    fisher = jax.eval_shape(functools.partial(estimator.finalize, damping=1e-3), sums)
    temporary, _ = memory(js.curvature.ihvp, fisher, tree())
    assert temporary < 3 * 16 * MB  # of vectors


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_mfac_makes_no_copy_of_the_gradients(dtype):
    grads = tree(M, dtype=dtype)
    temporary, _ = memory(lambda grads: mfac(grads).root, grads)
    assert temporary < 10 * MB
    fisher = jax.eval_shape(mfac, grads)
    for f, *args in (
        (js.curvature.inverse_diagonal, fisher),
        (js.curvature.ihvp, fisher, tree()),
        (js.curvature.span_ihvp, fisher, jax.ShapeDtypeStruct((M,), f32)),
    ):
        temporary, _ = memory(f, *args)
        assert temporary < 3 * 16 * MB  # of vectors
