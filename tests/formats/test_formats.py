"""Formats give back the same bits, in any type, and take what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse import formats

D_IN, D_OUT = 24, 16
DENSE = js.Axes(input=(0,), output=(1,))
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"]


def random_mask(shape=(D_IN, D_OUT), seed=0, kept=0.3):
    return np.random.default_rng(seed).random(shape) < kept


def of_pattern(pattern, shape=(D_IN, D_OUT), sparsity=0.5, axes=DENSE):
    scores = {"w": np.random.default_rng(1).random(shape).astype(np.float32)}
    masks = js.patterns.masks(scores, sparsity, pattern=pattern, axes=axes, where="w")
    return np.broadcast_to(masks["w"], shape)


@functools.cache
def condensed_mask():
    rng = np.random.default_rng(2)
    return np.outer(rng.random(D_IN) < 0.5, rng.random(D_OUT) < 0.5)


# name: the format, and a mask of its structure
CASES = {
    "bitmap": (formats.Bitmap, random_mask),
    "csr": (formats.Csr16, random_mask),
    "2:4": (js.NM(2, 4), lambda: of_pattern(js.NM(2, 4))),
    "1:2": (js.NM(1, 2), lambda: of_pattern(js.NM(1, 2))),
    "3:12": (js.NM(3, 12), lambda: of_pattern(js.NM(3, 12), sparsity=0.75)),
    "balanced": (js.Balanced((1, 8)), lambda: of_pattern(js.Balanced((1, 8)))),
    "squares": (js.Balanced((4, 4)), lambda: of_pattern(js.Balanced((4, 4)))),
    "tiles": (js.Block((1, 4)), lambda: of_pattern(js.Block((1, 4)))),
    "condensed": (formats.Condensed, condensed_mask),
}
every_format = pytest.mark.parametrize("name", CASES)


def bits(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def draw(dtype, shape=(D_IN, D_OUT)):
    """All kinds of numbers: NaN of several kinds, -0.0, infinities, subnormal ones."""
    width = 8 * np.dtype(dtype).itemsize
    rng = np.random.default_rng(3)
    whole = rng.integers(0, 2**width, shape, dtype=np.uint64).astype(f"uint{width}")
    return whole.view(dtype)


def assert_same_bits(got, expected):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(bits(got), bits(expected))


def pack(w, mask, format=None, axes=DENSE):
    tree = {"w": jnp.asarray(w)}
    masks = {"w": jnp.asarray(mask)}
    return formats.pack(tree, masks, format=format, axes=axes)["w"]


@every_format
def test_what_was_packed_comes_back_bit_for_bit(name):
    format, mask = CASES[name]
    for dtype in DTYPES if name in ("bitmap", "2:4", "tiles") else DTYPES[:2]:
        w = draw(dtype)
        packed = pack(w, mask(), format)
        zero = np.zeros((), dtype)
        assert_same_bits(formats.unpack(packed), np.where(mask(), w, zero))


@every_format
def test_a_format_takes_what_is_counted(name):
    """By the formulas of the docstrings, in bytes."""
    format, mask = CASES[name]
    packed = pack(np.ones((D_IN, D_OUT), np.float32), mask(), format)
    kept, taken = int(mask().sum()), sum(x.nbytes for x in jax.tree.leaves(packed))
    of_kept = 4 * kept
    expected = {
        "bitmap": of_kept + D_OUT * D_IN // 8,
        "csr": of_kept + 2 * kept + 4 * (D_OUT + 1),
        "balanced": of_kept + 2 * kept // 8,
        "squares": of_kept + 2 * kept // 16,
        "tiles": of_kept + 2 * kept // 4 + 4 * (D_OUT // 4 + 1),
        "condensed": of_kept + 2 * sum(mask().any(a).sum() for a in (0, 1)),
        "2:4": of_kept + 2 * 2 * D_OUT,
        "1:2": of_kept + 2 * D_OUT,
        "3:12": of_kept + 3 * D_OUT,
    }
    assert taken == expected[name]


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.135), ("bfloat16", 0.165)])
def test_a_bitmap_at_ninety_percent_is_as_small_as_promised(dtype, most):
    w = jnp.ones((512, 384), dtype)
    mask = js.patterns.masks({"w": jnp.arange(512 * 384.0).reshape(512, 384)}, 0.9)
    packed = formats.pack({"w": w}, mask, format=formats.Bitmap, axes=DENSE)
    assert sum(x.nbytes for x in jax.tree.leaves(packed)) <= most * w.nbytes


def test_a_bitmap_by_hand():
    w = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    mask = np.array([[1, 0], [0, 1], [1, 1]], bool)
    packed = pack(w, mask, formats.Bitmap)
    assert packed.values.tolist() == [[1, 5, 4, 6]]  # output after output
    assert packed.bits.tolist() == [[0b10100000], [0b01100000]]


def test_planes_by_hand():
    """The second group keeps one, the third none."""
    w = np.arange(1, 13, dtype=np.float32)[:, None]
    mask = np.array([1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0], bool)[:, None]
    packed = pack(w, mask, js.NM(2, 4))
    assert packed.values[:, :, 0].tolist() == [[1, 6, 0], [4, 0, 0]]
    # Positions 0, 1, 3 and 3, 1, 0; two bits each, the first in the lowest.
    assert packed.positions[:, 0, 0].tolist() == [0b110100, 0b000111]
    np.testing.assert_array_equal(formats.unpack(packed), np.where(mask, w, 0))


# Which axes.

LAYOUTS = {
    "a convolution": ((3, 3, 4, 8), js.Axes((0, 1, 2), (3,))),
    "a query": ((16, 2, 4), js.Axes((0,), (1, 2))),
    "a projection of heads": ((2, 8, 8), js.Axes((0, 1), (2,))),
    "layers of a scan": ((3, 16, 8), js.Axes((1,), (2,), (0,))),
    "experts, outputs first": ((4, 8, 16), js.Axes((2,), (1,), (0,))),
    "Equinox": ((8, 16), js.Axes((1,), (0,))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_of_more_axes(layout):
    """Each layer of its own mask, so of its own number of kept weights."""
    shape, axes = LAYOUTS[layout]
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    pairs = [
        (formats.Bitmap, random_mask(shape)),
        (formats.Csr16, random_mask(shape)),
        *(
            (pattern, of_pattern(pattern, shape, axes=axes))
            for pattern in (js.NM(2, 4), js.Balanced((2, 4)), js.Block((1, 2)))
        ),
    ]
    for format, mask in pairs:
        packed = pack(w, mask, format, axes)
        np.testing.assert_array_equal(formats.unpack(packed), np.where(mask, w, 0))


def test_masks_of_channels_are_condensed_in_each_layer():
    shape, axes = LAYOUTS["layers of a scan"]
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    scores = {"w": w}
    mask = js.patterns.masks(scores, 0.5, pattern=js.Channel(), axes=axes)["w"]
    packed = pack(w, mask, None, axes)
    assert isinstance(packed, formats.Condensed)
    assert packed.values.shape == (3, 16, 4)
    np.testing.assert_array_equal(formats.unpack(packed), np.where(mask, w, 0))


def test_a_mask_that_keeps_nothing_or_all():
    w = np.ones((8, 4), np.float32)
    for mask in (np.zeros_like(w, bool), np.ones_like(w, bool)):
        for format in (formats.Bitmap, formats.Csr16, js.Block((2, 2))):
            packed = pack(w, mask, format)
            np.testing.assert_array_equal(formats.unpack(packed), np.where(mask, w, 0))


# Which format.


def test_by_default_the_smallest_is_taken():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 256)).astype(np.float32)
    kind = lambda mask: type(pack(w, mask))
    of = lambda pattern, s=0.5: of_pattern(pattern, (256, 256), s)
    assert kind(rng.random(w.shape) < 0.2) is formats.Bitmap
    assert kind(rng.random(w.shape) < 0.02) is formats.Csr16
    assert kind(of(js.Balanced((1, 128)))) is formats.Tiles
    assert kind(of(js.Channel())) is formats.Condensed
    assert pack(w, of(js.Balanced((16, 16)), 0.9)).tile == (16, 16)
    dense = pack(w, rng.random(w.shape) < 0.99)
    assert isinstance(dense, jax.Array)


def test_formats_by_rule_and_what_is_left_dense():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    masks = {k: jnp.asarray(random_mask((8, 8))) for k in "ab"} | {
        "bias": jnp.array(True)
    }
    packed = formats.pack(params, masks, format={"a": formats.Csr16}, axes=DENSE)
    assert isinstance(packed["a"], formats.Csr16)
    np.testing.assert_array_equal(packed["b"], masks["b"])  # dense, and masked
    assert packed["bias"] is params["bias"]
    packed = formats.pack(params, masks, format=formats.Bitmap, where="b$", axes=DENSE)
    np.testing.assert_array_equal(packed["a"], masks["a"])
    assert isinstance(packed["b"], formats.Bitmap)


def test_what_stays_dense_is_masked_too():
    """A vector, and a parameter that is gone as a whole."""
    params = {"w": jnp.ones((8, 8)), "bias": jnp.ones(4), "gone": jnp.ones((2, 2))}
    masks = {
        "w": jnp.asarray(random_mask((8, 8))),
        "bias": jnp.arange(4) > 1,
        "gone": jnp.array(False),
    }
    packed = formats.pack(params, masks, format=formats.Bitmap, axes=DENSE)
    whole = formats.unpack(packed)
    jax.tree.map(np.testing.assert_array_equal, whole, js.patterns.apply(params, masks))


# Under transformations.


@every_format
def test_packed_arrays_go_through_jit_and_compile_once(name):
    format, mask = CASES[name]
    traces = []

    @jax.jit
    def total(packed, x):
        traces.append(1)
        return x @ formats.unpack(packed)

    x = np.ones((2, D_IN), np.float32)
    for w in (
        np.ones((D_IN, D_OUT), np.float32),
        np.full((D_IN, D_OUT), 2, np.float32),
    ):
        got = total(pack(w, mask(), format), x)
        np.testing.assert_array_equal(got, x @ np.where(mask(), w, 0))
    assert len(traces) == 1


@every_format
def test_gradients_are_those_of_what_is_kept(name):
    """What fills a format up is in no weight, so nothing would move it."""
    format, mask = CASES[name]
    w = np.random.default_rng(0).standard_normal((D_IN, D_OUT)).astype(np.float32)
    packed = pack(w, mask(), format)
    weights = np.random.default_rng(1).standard_normal(w.shape).astype(np.float32)

    def loss(values):
        return jnp.sum(formats.unpack(formats.with_values(packed, values)) * weights)

    grads = jax.jit(jax.grad(loss))(formats.values(packed))
    moved = formats.with_values(packed, packed.values + grads)
    expected = np.where(mask(), w + weights, 0)
    np.testing.assert_allclose(formats.unpack(moved), expected, rtol=1e-6)
    assert int((np.asarray(grads) != 0).sum()) == int(mask().sum())


def test_a_group_that_keeps_fewer_stays_so_in_training():
    mask = of_pattern(js.NM(2, 4)) & random_mask(kept=0.6)
    packed = pack(np.ones((D_IN, D_OUT), np.float32), mask, js.NM(2, 4))
    filled = formats.with_values(packed, jnp.full_like(packed.values, 7))
    np.testing.assert_array_equal(formats.unpack(filled), np.where(mask, 7, 0))


def test_weights_may_be_traced():
    mask = {"w": jnp.asarray(random_mask())}
    w = np.random.default_rng(0).standard_normal((D_IN, D_OUT)).astype(np.float32)

    @jax.jit
    @jax.grad
    def grad(w):
        packed = formats.pack({"w": w}, mask, format=formats.Bitmap, axes=DENSE)
        return jnp.sum(formats.unpack(packed)["w"] ** 2)

    np.testing.assert_allclose(grad(w), np.where(mask["w"], 2 * w, 0), rtol=1e-6)


# Errors.


@pytest.mark.parametrize(
    ("format", "hole", "said"),
    [
        (
            js.Block((4, 2)),
            (5, 3),
            r"w: the tile of inputs 4 to 7 and outputs 2 to 3 is",
        ),
        (js.NM(2, 4), (4, 1), r"w: group 0 of output 0 keeps 4 of 4, against NM"),
        (
            formats.Condensed,
            (2, 1),
            r"w: the weight of input 2 and output 1 is removed",
        ),
    ],
)
def test_a_mask_of_another_structure_is_named(format, hole, said):
    mask = np.ones((8, 4), bool)
    mask[hole] = False
    with pytest.raises(ValueError, match=said):
        pack(np.ones((8, 4), np.float32), mask, format)


def test_what_cannot_be_packed_is_named():
    w, mask = np.ones((6, 5), np.float32), np.ones((6, 5), bool)
    with pytest.raises(ValueError, match=r"w: NM.* 4 divides, .* has 6"):
        pack(w, mask, js.NM(2, 4))
    with pytest.raises(ValueError, match=r"w: tiles of \(2, 2\) .* outputs that 2 div"):
        pack(w, mask, js.Block((2, 2)))
    with pytest.raises(ValueError, match=r"w: a kernel of shape \(0, 5\) has no"):
        pack(w[:0], mask[:0], formats.Bitmap)
    with pytest.raises(TypeError, match="format must be"):
        pack(w, mask, "bitmap")
    with pytest.raises(TypeError, match="no packed kernel is in it"):
        formats.unpack({"w": jnp.ones(3)})
    with pytest.raises(TypeError, match="w: masks is traced"):
        jax.jit(lambda m: pack(w, m, formats.Bitmap))(mask)
    packed = pack(w, mask, formats.Bitmap)
    with pytest.raises(ValueError, match="values has the shape"):
        formats.with_values({"w": packed}, {"w": jnp.ones(3)})


def test_a_group_of_one_cannot_be_empty():
    w, mask = np.ones((8, 2), np.float32), np.zeros((8, 2), bool)
    with pytest.raises(ValueError, match=r"group 0 of output 0 keeps 0 of 4"):
        pack(w, mask, js.NM(1, 4))
