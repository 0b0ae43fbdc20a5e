import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

SHAPES = {"w": (3, 7), "channel": (1, 5), "scalar": (), "empty": (0, 4), "byte": (8,)}


def random_masks(seed=0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.random(s) < 0.5) for k, s in SHAPES.items()}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == bool
        np.testing.assert_array_equal(got[name], expected[name])


def test_masks_come_back_bit_for_bit():
    for seed in range(5):
        masks = random_masks(seed)
        assert_equal(js.patterns.unpack(js.patterns.pack(masks)), masks)


def test_masks_come_back_through_jit():
    masks = random_masks()
    packed = jax.jit(js.patterns.pack)(masks)
    assert_equal(jax.jit(js.patterns.unpack)(packed), masks)


def test_a_byte_holds_eight_weights():
    packed = js.patterns.pack({"w": jnp.ones((16, 16), bool)})
    assert packed.bits["w"].dtype == jnp.uint8
    assert packed.bits["w"].nbytes == 32


def test_only_bools_are_packed():
    with pytest.raises(TypeError, match="w: a mask holds bools"):
        js.patterns.pack({"w": jnp.ones(3)})


def test_bits_of_another_shape_are_refused():
    packed = js.patterns.pack({"block": {"w": jnp.ones((3, 7), bool)}})
    wrong = dataclasses.replace(packed, shapes=((3, 6, 2),))
    with pytest.raises(
        ValueError, match=r"block/w: .* \(3, 6, 2\) takes 5 packed bytes"
    ):
        js.patterns.unpack(wrong)
