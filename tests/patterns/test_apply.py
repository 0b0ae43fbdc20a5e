import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js


def test_what_is_removed_becomes_zero_even_nan_and_infinity():
    params = {"w": jnp.array([jnp.nan, jnp.inf, -jnp.inf, -3.0, 5.0])}
    masks = {"w": jnp.array([False, False, False, False, True])}
    pruned = js.patterns.apply(params, masks)["w"]
    assert pruned.tolist() == [0, 0, 0, 0, 5]
    assert not jnp.signbit(pruned).any()


def test_what_is_kept_is_kept_bit_for_bit():
    bits = np.array([0x7FC01234, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    params = {"w": jnp.asarray(bits.view(np.float32))}
    for mask in (jnp.ones(4, bool), jnp.ones((), bool)):
        pruned = jax.jit(js.patterns.apply)(params, {"w": mask})["w"]
        assert np.asarray(pruned).view(np.uint32).tolist() == bits.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "bool"])
def test_the_dtype_stays(dtype):
    params = {"w": jnp.ones((2, 3), dtype)}
    pruned = js.patterns.apply(params, {"w": jnp.array([[True, False, True]])})
    assert pruned["w"].dtype == dtype
    assert pruned["w"].astype(int).tolist() == [[1, 0, 1]] * 2


def test_random_keys_in_a_state_pass_through():
    params = {"rng": jax.random.key(0), "w": jnp.ones((2, 2))}
    masks = {"rng": jnp.array(True), "w": jnp.array([[True, False]])}
    pruned = js.patterns.apply(params, masks)
    assert pruned["rng"] == params["rng"]


def test_arrays_of_numpy_are_taken_as_they_come():
    pruned = js.patterns.apply({"w": np.ones(2)}, {"w": np.array([True, False])})
    assert pruned["w"].tolist() == [1, 0]


def test_masks_of_another_model_are_refused():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    masks = {"a": jnp.ones(2, bool), "c": jnp.ones(2, bool)}
    with pytest.raises(ValueError, match=r"missing 'b'; not in params 'c'"):
        js.patterns.apply(params, masks)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 2, 3), (6,), (2, 3, 1)])
def test_masks_that_do_not_broadcast_are_refused(shape):
    params = {"block": {"w": jnp.ones((2, 3))}}
    masks = {"block": {"w": jnp.ones(shape, bool)}}
    with pytest.raises(ValueError, match=r"block/w: a mask of shape .* \(2, 3\)"):
        js.patterns.apply(params, masks)


@pytest.mark.parametrize("mask", [jnp.ones(2), jnp.ones(2, jnp.uint8), 1.0, True])
def test_masks_that_are_no_arrays_of_bools_are_refused(mask):
    with pytest.raises(TypeError, match="w: a mask holds bools"):
        js.patterns.apply({"w": jnp.ones(2)}, {"w": mask})


def test_the_kept_weights_of_a_broadcast_mask_are_counted():
    for mask in ([[True, False, True]], [[True], [False]], True):
        mask = jnp.array(mask)
        full = np.broadcast_to(mask, (2, 3)) if mask.ndim else np.ones((2, 3))
        assert int(js.patterns.kept_count(mask, (2, 3))) == full.sum()


def test_sparsity_is_reported_for_every_parameter():
    params = {"w": jnp.ones((2, 4)), "bias": jnp.ones(4), "empty": jnp.ones((0, 2))}
    masks = {
        "w": jnp.array([[True, False, False, False]]),
        "bias": jnp.array(True),
        "empty": jnp.array(True),
    }
    reached = js.patterns.sparsity_of(masks, params)
    assert (reached["w"], reached["bias"]) == (0.75, 0.0)
