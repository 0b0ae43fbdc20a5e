"""`Int8Tiles` rounds to within half a step, and keeps zeros exactly."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import formats

DENSE = js.Axes((0,), (1,))


def pack(w, mask, axes=DENSE):
    options = {"format": formats.Int8Tiles, "axes": axes}
    return formats.pack({"w": jnp.asarray(w)}, {"w": jnp.asarray(mask)}, **options)["w"]


def draw(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def random_mask(shape, seed=1):
    return np.random.default_rng(seed).random(shape) < 0.3


def test_a_kernel_by_hand():
    """Six inputs: the second tile of each output is filled up."""
    w = np.array([[127, 2], [-64, 2], [0.4, 2], [3, 2], [5, -254], [9, 1]], np.float32)
    mask = np.array([[1, 0], [1, 0], [1, 0], [0, 0], [0, 1], [0, 1]], bool)
    packed = pack(jnp.asarray(w), mask)
    # What is removed counts in no maximum, and is 0 in a tile that is stored.
    assert packed.scale.tolist() == [1, 2]
    assert packed.values.tolist() == [[[127, -64, 0, 0], [-127, 0, 0, 0]]]
    assert packed.rows.tolist() == [[0, 1]]
    assert packed.offsets.tolist() == [[0, 1, 2]]
    assert (packed.values.dtype, packed.rows.dtype) == (np.int8, np.uint16)
    expected = [[127, 0], [-64, 0], [0, 0], [0, 0], [0, -254], [0, 0]]
    assert formats.unpack(packed).tolist() == expected


LAYOUTS = {
    "a matrix": ((24, 16), DENSE),
    "inputs that 4 does not divide": ((27, 16), DENSE),
    "a convolution": ((3, 3, 3, 8), js.Axes((0, 1, 2), (3,))),
    "a query": ((16, 2, 4), js.Axes((0,), (1, 2))),
    "layers of a scan": ((3, 18, 8), js.Axes((1,), (2,), (0,))),
    "experts, outputs first": ((4, 8, 16), js.Axes((2,), (1,), (0,))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_weight_is_within_half_a_step(layout):
    """In outputs of all magnitudes, with zeros and subnormal numbers among them."""
    shape, axes = LAYOUTS[layout]
    w, mask = draw(shape).astype(np.float64), random_mask(shape)
    view = js.tree.matrix_view(shape, axes)
    matrices = js.tree.to_matrices(w, view)
    power = np.linspace(-44, 36, view.d_out)[:, None]
    power[1] = 0
    matrices = matrices * 10.0**power
    matrices[..., 1, :] = 0
    w = np.asarray(js.tree.from_matrices(matrices, view), np.float32)
    packed = pack(jnp.asarray(w), mask, axes)
    back = np.asarray(formats.unpack(packed))
    assert (back.shape, back.dtype) == (w.shape, w.dtype)
    assert not back[~mask].view(np.uint32).any()
    step = np.asarray(packed.scale, np.float64)[..., None]
    kept = js.tree.to_matrices(np.where(mask, w, 0).astype(np.float64), view)
    found = js.tree.to_matrices(back.astype(np.float64), view)
    assert (np.abs(found - kept) <= step / 2 * (1 + 1e-5)).all()
    # And no step is larger than it has to be.
    largest = np.abs(kept).max(-1, keepdims=True)
    least = np.finfo(np.float32).tiny
    np.testing.assert_allclose(step, np.maximum(largest / 127, least), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float64"])
def test_the_type_comes_back(dtype):
    """And the weight, to within half a step and a rounding of its type."""
    with jax.enable_x64(dtype == "float64"):
        w, mask = jnp.asarray(draw((24, 8)), dtype), random_mask((24, 8))
        packed = pack(w, mask)
        back = formats.unpack(packed)
        assert back.dtype == packed.dtype == dtype
        kept = np.where(mask, np.asarray(w, np.float64), 0)
        about = jnp.finfo(dtype)
        error = np.abs(np.asarray(back, np.float64) - kept)
        step = np.asarray(packed.scale, np.float64)[None]
        half, least = step / 2 * (1 + 1e-5), float(about.smallest_subnormal)
        rounding = float(about.eps) / 2 * (np.abs(kept) + half) + least / 2
        assert (error <= half + rounding).all()


def test_masks_that_keep_nothing_or_all():
    for mask in (np.zeros((8, 4), bool), np.ones((8, 4), bool)):
        packed = pack(jnp.ones((8, 4)), mask)
        np.testing.assert_allclose(formats.unpack(packed), mask, rtol=1e-6)
        assert packed.values.shape == (1, mask.sum() // 4, 4)


def test_it_takes_what_is_counted():
    """Six bytes a stored tile, eight an output."""
    shape, axes = (3, 22, 8), js.Axes((1,), (2,), (0,))
    w, mask = jnp.asarray(draw(shape)), random_mask(shape)
    taken = sum(x.nbytes for x in jax.tree.leaves(pack(w, mask, axes)))
    tiles = np.pad(mask, ((0, 0), (0, 2), (0, 0))).reshape(3, 6, 4, 8).any(2)
    assert taken == 3 * (6 * tiles.sum((1, 2)).max() + 8 * 8 + 4)
    sizes = formats.sizes({"w": w}, {"w": jnp.asarray(mask)}, axes=axes)["w"]
    assert sizes["Int8Tiles"] == taken


def test_it_is_taken_only_where_it_is_asked_for():
    params = {"w": jnp.asarray(draw((64, 64)))}
    pruned = js.prune(params, 0.9, pattern=js.Block((4, 1)), axes=DENSE)
    sizes = formats.sizes(*pruned, axes=DENSE)
    assert min(sizes["w"], key=sizes["w"].get) == "Int8Tiles"
    packed = formats.pack(*pruned, axes=DENSE)["w"]
    assert not isinstance(packed, formats.Int8Tiles)
    taken = sum(x.nbytes for x in jax.tree.leaves(packed))
    assert taken == sorted(sizes["w"].values())[1]
    lines = js.report.format_table(sizes).splitlines()
    assert "Int8Tiles" in lines[0].split()
    assert lines[1].split()[-3] == type(packed).__name__
    whole = {"w": jnp.ones((8, 8), jnp.int32)}  # which is not rounded
    masks = {"w": jnp.asarray(random_mask((8, 8)))}
    assert "Int8Tiles" not in formats.sizes(whole, masks, axes=DENSE)["w"]


def test_it_goes_through_jit_vmap_and_a_checkpoint(tmp_path):
    axes = js.Axes((1,), (2,), (0,))
    w, mask = jnp.asarray(draw((3, 12, 8)), jnp.bfloat16), random_mask((3, 12, 8))
    packed, traces = pack(w, mask, axes), []

    @jax.jit
    def whole(packed):
        traces.append(1)
        return formats.unpack(packed)

    expected = whole(packed)
    whole(pack(2 * w, mask, axes))
    assert len(traces) == 1
    js.checkpoint.save(tmp_path, step=1, params={"w": packed})
    template = pickle.dumps(jax.eval_shape(lambda: {"w": packed}))
    back = js.checkpoint.restore(tmp_path, params=pickle.loads(template)).params["w"]
    assert isinstance(back, formats.Int8Tiles)
    assert (back.dtype, back.view) == (packed.dtype, packed.view)
    jax.tree.map(np.testing.assert_array_equal, back, packed)
    np.testing.assert_array_equal(whole(back), expected)
    assert len(traces) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_it_lies_where_the_kernel_does(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    cases = {
        "outputs": ((18, 32), DENSE, P(None, "x")),
        "layers": ((8, 16, 8), js.Axes((1,), (2,), (0,)), P("x")),
    }
    for shape, axes, spec in cases.values():
        w, mask = draw(shape), random_mask(shape)
        own = jax.device_put(w, NamedSharding(mesh, spec))
        packed = pack(own, mask, axes)
        for x in (packed.values, packed.scale, packed.rows, packed.offsets):
            assert x.addressable_shards[0].data.nbytes * 8 == x.nbytes
        whole = formats.unpack(packed)
        assert whole.sharding.is_equivalent_to(own.sharding, len(shape))
        np.testing.assert_array_equal(whole, formats.unpack(pack(w, mask, axes)))


# Errors.


def test_what_cannot_be_rounded_is_named():
    w, mask = np.ones((3, 8, 4), np.float32), np.ones((3, 8, 4), bool)
    axes, options = js.Axes((1,), (2,), (0,)), {"format": formats.Int8Tiles}
    for bad in (np.nan, np.inf, -np.inf):
        wrong = w.copy()
        wrong[2, 5, 3] = bad
        said = r"w: the largest weight of output 3 of layer \(2,\) is (nan|inf); "
        with pytest.raises(ValueError, match=said):
            pack(wrong, mask, axes)
        removed = mask.copy()
        removed[2, 5, 3] = False  # what is removed does not count
        assert np.isfinite(formats.unpack(pack(wrong, removed, axes))).all()
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"is 1e\+300; "):
        pack(jnp.full((4, 1), 1e300), np.ones((4, 1), bool))
    with pytest.raises(TypeError, match=r"w: .* of floating point, got int32"):
        pack(jnp.ones((8, 4), jnp.int32), mask[0])
    own = {"w": jnp.asarray(mask[0])}
    with pytest.raises(TypeError, match=r"w: .* but these are traced"):
        jax.jit(lambda w: formats.pack({"w": w}, own, axes=DENSE, **options))(w[0])
    many = np.ones((132_105, 1), np.float32)
    with pytest.raises(ValueError, match=r"w: .* over 132,105 inputs .* 132,104 at"):
        pack(many, many > 0)


def test_it_cannot_be_trained():
    w, mask = jnp.ones((8, 4)), random_mask((8, 4))
    packed = {"a": {"w": pack(w, mask)}, "bias": jnp.ones(4)}
    put = functools.partial(formats.with_values, values={"a": {"w": 0}})
    for call in (formats.values, put):
        with pytest.raises(TypeError, match=r"a/w: the values of Int8Tiles are round"):
            call(packed)
    with pytest.raises(TypeError, match="packed: the values of Int8Tiles"):
        formats.values(packed["a"]["w"])
