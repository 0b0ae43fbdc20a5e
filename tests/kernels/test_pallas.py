"""Kernels for accelerators: in interpreters, and lowered, on a processor."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import formats, kernels
from jaxsparse.kernels import _owners, _pallas_hopper, _pallas_tpu, _pallas_triton

DENSE = js.Axes((0,), (1,))
# What is not written is NaN there, and what is read out of bounds raises.
TPU = pltpu.InterpretParams()
try:  # no public name yet
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
except ImportError:
    HOPPER = None
else:
    HOPPER = InterpretGPUParams()
interpreted = pytest.mark.skipif(HOPPER is None, reason="no interpreter of Mosaic GPU")
ERRORS = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def pack(format, shape, dtype="float32", mask=None):
    """A packed kernel, and the dense one in float64."""
    if mask is None:
        sparsity = None if isinstance(format, js.NM) else 0.5
        options = {"pattern": format, "axes": DENSE, "where": "w"}
        mask = js.patterns.masks({"w": draw(shape, 1)}, sparsity, **options)["w"]
    w = jnp.asarray(draw(shape), dtype)
    packed = formats.pack({"w": w}, {"w": mask}, format=format, axes=DENSE)["w"]
    return packed, np.where(mask, np.asarray(w, np.float64), 0)


def assert_product(engine, packed, w, rows, dtype):
    x = jnp.asarray(draw((rows, w.shape[0]), 2), dtype)
    y = engine(x, packed)
    assert (y.shape, y.dtype) == ((rows, w.shape[1]), x.dtype)
    expected = np.asarray(x, np.float64) @ w
    most = np.abs(expected).max()
    error = np.abs(np.asarray(y, np.float64) - expected).max()
    assert error <= 4 * ERRORS[dtype] * most
    return np.asarray(y)


def tiles_kept(kept, tile):
    return np.kron(np.asarray(kept, bool), np.ones(tile, bool)).astype(bool)


# Inputs go down, groups of outputs across: two of them have no tile.
KEPT = [[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]


# By interpreters.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_on_a_tpu_are_those_of_float64(dtype):
    engine = jax.jit(functools.partial(_pallas_tpu.tiles, interpret=TPU))
    packed, w = pack(js.Balanced((8, 128)), (32, 256), dtype)
    assert packed.offsets is None
    assert_product(engine, packed, w, 3, dtype)


def test_groups_without_tiles_are_exact_zeros_on_a_tpu():
    engine = functools.partial(_pallas_tpu.tiles, interpret=TPU)
    packed, w = pack(js.Block((8, 128)), (24, 512), mask=tiles_kept(KEPT, (8, 128)))
    assert packed.offsets is not None
    y = assert_product(engine, packed, w, 5, "float32")
    assert not y[:, :128].any()
    assert not y[:, 256:384].any()


def test_rows_of_several_blocks(monkeypatch):
    monkeypatch.setattr(_pallas_tpu, "ROWS", 8)
    engine = functools.partial(_pallas_tpu.tiles, interpret=TPU)
    packed, w = pack(js.Block((8, 128)), (24, 512), mask=tiles_kept(KEPT, (8, 128)))
    assert_product(engine, packed, w, 19, "float32")
    engine = functools.partial(_pallas_tpu.planes, interpret=TPU)
    packed, w = pack(js.NM(2, 4), (32, 16))
    assert_product(engine, packed, w, 19, "float32")


def test_tiles_split_in_pieces_of_unequal_length():
    """Nothing reads what fills up the shorter ones, and NaN meets no zero there."""
    packed, w = pack(js.Block((8, 128)), (24, 512), mask=tiles_kept(KEPT, (8, 128)))
    fill = lambda x: jnp.zeros((2, *x.shape[1:]), x.dtype)
    first, second = packed.values[0, :2], packed.values[0, 2:]
    split = type(packed)(
        values=fill(packed.values[:, :2]).at[0].set(first).at[1, :1].set(second),
        rows=fill(packed.rows[:, :2]).at[0].set(packed.rows[0, :2]).at[1, 0].set(2),
        offsets=jnp.array([[0, 0, 2], [0, 0, 1]], jnp.int32),
        tile=packed.tile,
        most=2,
        view=packed.view,
    )
    group, there, filled = _owners.owners(split)
    assert group.tolist() == [1, 1, 3, 3]
    assert there.tolist() == [True, True, True, False]
    assert filled.tolist() == [False, True, False, True]
    assert_product(
        functools.partial(_pallas_tpu.tiles, interpret=TPU), split, w, 3, "float32"
    )
    x = jnp.full((1, 24), jnp.nan).at[0, 16:].set(1)
    y = _pallas_tpu.tiles(x, split, interpret=TPU)
    np.testing.assert_allclose(y[0, 384:], w[16:, 384:].sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("keep", "of", "dtype"),
    [(2, 4, "float32"), (2, 4, "bfloat16"), (1, 2, "float32"), (3, 8, "float32")],
)
def test_planes_on_a_tpu_are_those_of_float64(keep, of, dtype):
    engine = jax.jit(functools.partial(_pallas_tpu.planes, interpret=TPU))
    packed, w = pack(js.NM(keep, of), (64, 24), dtype)
    assert_product(engine, packed, w, 3, dtype)


def test_planes_of_several_blocks_the_last_in_part(monkeypatch):
    monkeypatch.setattr(_pallas_tpu, "tpu_depth", lambda packed: 8)
    monkeypatch.setattr(_pallas_tpu, "OUTPUTS", 16)
    engine = functools.partial(_pallas_tpu.planes, interpret=True)
    packed, w = pack(js.NM(2, 4), (4 * 20, 40))
    assert_product(engine, packed, w, 3, "float32")


def spoiled_behind_the_end(shape, dtype):
    """2:4 with groups of two, one and none, and NaN where nothing may be read."""
    mask = np.zeros(shape, bool)
    mask[::4] = True
    mask[1::8] = True
    mask[8:16, 3] = False
    packed, w = pack(js.NM(2, 4), shape, dtype, mask)
    spoiled = jnp.where(packed.values == 0, jnp.nan, packed.values)
    assert jnp.isnan(spoiled).any()
    return formats.with_values(packed, spoiled), w


def test_groups_that_keep_fewer_on_a_tpu():
    own, w = spoiled_behind_the_end((64, 8), "float32")
    engine = functools.partial(_pallas_tpu.planes, interpret=TPU)
    assert_product(engine, own, w, 2, "float32")


@interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tiles_on_hopper_are_those_of_float64(dtype):
    engine = functools.partial(_pallas_hopper.tiles, interpret=HOPPER)
    mask = tiles_kept(KEPT, (16, 64))
    packed, w = pack(js.Block((16, 64)), (48, 256), dtype, mask)
    y = assert_product(engine, packed, w, 3, dtype)
    assert not y[:, :64].any()
    assert not y[:, 128:192].any()


@interpreted
def test_more_rows_than_a_block_has_on_hopper():
    engine = functools.partial(_pallas_hopper.tiles, interpret=HOPPER)
    packed, w = pack(js.Balanced((16, 64)), (32, 64), "bfloat16")
    assert_product(engine, packed, w, 67, "bfloat16")


@interpreted
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (2, 8)])
def test_planes_on_hopper_are_those_of_float64(keep, of):
    engine = functools.partial(_pallas_hopper.planes, interpret=HOPPER)
    packed, w = pack(js.NM(keep, of), (1024, 192), "bfloat16")
    assert_product(engine, packed, w, 67, "bfloat16")


@interpreted
def test_groups_that_keep_fewer_on_hopper():
    packed, w = spoiled_behind_the_end((1024, 64), "bfloat16")
    engine = functools.partial(_pallas_hopper.planes, interpret=HOPPER)
    assert_product(engine, packed, w, 3, "bfloat16")


# Lowered.


def lowered(platform, packed, rows=3, dtype=None):
    x = jnp.ones((rows, packed.view.d_in), dtype or packed.values.dtype)
    traced = jax.jit(kernels.pallas).trace(x, packed)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return {name for name in ("tpu_custom_call", "mosaic_gpu") if name in text}


TPU_CALL, GPU_CALL = {"tpu_custom_call"}, {"mosaic_gpu"}
SERVED = [
    (js.Balanced((8, 128)), (32, 256), "float32", TPU_CALL, set()),
    (js.Balanced((8, 128)), (32, 256), "bfloat16", TPU_CALL, set()),
    (js.Balanced((16, 64)), (32, 128), "bfloat16", set(), GPU_CALL),
    (js.Balanced((128, 128)), (256, 256), "bfloat16", TPU_CALL, GPU_CALL),
    (js.Balanced((128, 256)), (256, 256), "float16", set(), GPU_CALL),
    (js.Balanced((1, 128)), (32, 256), "bfloat16", set(), set()),
    (js.NM(2, 4), (64, 24), "float32", TPU_CALL, set()),
    (js.NM(2, 4), (1024, 128), "bfloat16", TPU_CALL, GPU_CALL),
    (js.NM(4, 8), (1024, 128), "bfloat16", TPU_CALL, GPU_CALL),
    (js.NM(1, 2), (1024, 64), "bfloat16", TPU_CALL, GPU_CALL),
    (js.NM(2, 4), (4 * 513, 8), "float32", TPU_CALL, set()),
    (js.NM(2, 4), (4 * 17, 8), "float32", set(), set()),
    (js.NM(8, 32), (64, 64), "float32", set(), set()),
]


@pytest.mark.parametrize(("format", "shape", "dtype", "tpu", "gpu"), SERVED)
def test_what_is_served_is_lowered_for_both(format, shape, dtype, tpu, gpu):
    packed, _ = pack(format, shape, dtype)
    assert lowered("tpu", packed) == tpu
    assert lowered("cuda", packed) == gpu


@pytest.mark.parametrize("format", [js.Balanced((8, 128)), js.NM(2, 4)], ids=str)
def test_on_a_processor_it_is_plain_jax(format):
    packed, w = pack(format, (32, 256), "bfloat16")
    assert lowered("cpu", packed) == set()
    assert_product(jax.jit(kernels.pallas), packed, w, 3, "bfloat16")


@pytest.mark.parametrize("format", [js.Balanced((16, 128)), js.NM(2, 4)], ids=str)
def test_with_64_bits_it_is_the_same_kernel(format):
    packed, _ = pack(format, (1024, 128), "bfloat16")
    with jax.enable_x64(True):
        assert lowered("tpu", packed) == TPU_CALL
        assert lowered("cuda", packed) == GPU_CALL


def test_a_real_size_is_lowered():
    """Shapes of 7B models: nothing is as large as a kernel may be in one block."""
    packed, _ = pack(js.NM(2, 4), (4096, 256), "bfloat16")
    assert lowered("tpu", packed, 300) == TPU_CALL
    assert lowered("cuda", packed, 300) == GPU_CALL


def test_types_are_those_of_the_product():
    packed, w = pack(js.Balanced((16, 128)), (32, 128), "bfloat16")
    assert lowered("tpu", packed, dtype="float32") == TPU_CALL
    assert lowered("cuda", packed, dtype="float32") == set()
    y = jax.jit(kernels.pallas)(jnp.ones((2, 32)), packed)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[0], w.sum(0), atol=1e-5)


def test_no_kernel_is_for_another_gpu(monkeypatch):
    packed, _ = pack(js.Balanced((16, 64)), (32, 64), "bfloat16")
    seen = lambda capability: [type("GPU", (), {"compute_capability": capability})()]
    cases = ("8.0", set()), ("10.0", set()), ("9.0", GPU_CALL)
    for i, (capability, calls) in enumerate(cases):
        monkeypatch.setattr(jax, "devices", lambda kind, c=capability: seen(c))
        assert lowered("cuda", packed, rows=10 + i) == calls  # traced anew


def test_no_kernel_is_where_jax_has_no_mosaic_gpu(monkeypatch):
    packed, _ = pack(js.Balanced((128, 128)), (128, 128), "bfloat16")
    monkeypatch.setitem(sys.modules, "jaxsparse.kernels._pallas_hopper", None)
    monkeypatch.delattr(kernels, "_pallas_hopper")
    assert lowered("cuda", packed, rows=20) == set()
    assert lowered("tpu", packed, rows=20) == TPU_CALL


# As any engine.


@pytest.mark.parametrize("format", [js.Balanced((8, 128)), js.NM(2, 4)], ids=str)
def test_gradients_are_those_of_float64(format):
    packed, w = pack(format, (32, 128))
    x, dy = draw((3, 32), 2), draw((3, 128), 3)

    def loss(values, x):
        return jnp.sum(kernels.pallas(x, formats.with_values(packed, values)) * dy)

    dv, dx = jax.jit(jax.grad(loss, (0, 1)))(packed.values, x)
    np.testing.assert_allclose(dx, dy.astype(np.float64) @ w.T, atol=1e-4)
    moved = formats.unpack(formats.with_values(packed, packed.values + dv))
    expected = np.where(w != 0, x.astype(np.float64).T @ dy, 0)
    np.testing.assert_allclose(moved - w, expected, atol=1e-4)


def test_experts_and_vmap_are_lowered_too():
    pattern, axes = js.Balanced((8, 128)), js.Axes((1,), (2,), (0,))
    w = {"w": jnp.asarray(draw((2, 16, 128)))}
    params, masks = js.prune(w, 0.5, pattern=pattern, axes=axes)
    packed = formats.pack(params, masks, format=pattern, axes=axes)["w"]
    x = draw((2, 3, 16), 2)
    y = jax.jit(kernels.pallas)(x, packed)
    expected = np.einsum("eri,eio->ero", x.astype(np.float64), params["w"])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    many = jax.vmap(kernels.pallas)
    for f in (kernels.pallas, many):
        text = jax.jit(f).trace(x, packed).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in text


def test_vmap_over_activations_makes_one_product_of_more_rows():
    packed, w = pack(js.Balanced((8, 128)), (32, 128))
    x = draw((2, 3, 32), 2)
    f = jax.jit(jax.vmap(kernels.pallas, (0, None)))
    np.testing.assert_allclose(f(x, packed), x.astype(np.float64) @ w, atol=1e-5)
    text = f.trace(x, packed).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    assert "while" not in text


def test_nothing_is_traced_twice():
    packed, _ = pack(js.NM(2, 4), (32, 16))
    traced = []
    f = jax.jit(lambda *args: (traced.append(1), kernels.pallas(*args))[1])
    for seed in range(2):
        f(draw((3, 32), seed), packed)
    assert len(traced) == 1


def test_a_batch_of_none_and_a_kernel_of_nothing():
    packed, _ = pack(js.Balanced((8, 128)), (32, 128))
    assert kernels.pallas(np.zeros((0, 32), np.float32), packed).shape == (0, 128)
    none = np.zeros((32, 128), bool)
    packed, _ = pack(js.Balanced((8, 128)), (32, 128), mask=none)
    assert lowered("tpu", packed) == set()
    assert not kernels.pallas(jnp.ones((2, 32)), packed).any()


# On a mesh.


def mesh_of_eight():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def test_what_is_split_over_a_mesh_stays_there():
    pattern, mesh = js.Balanced((8, 128)), mesh_of_eight()
    packed, w = pack(pattern, (32, 1024))
    packed = jax.device_put(packed, NamedSharding(mesh, P("x")))
    x = jax.device_put(draw((4, 32), 2), NamedSharding(mesh, P()))
    f = jax.jit(kernels.pallas)
    text = f.trace(x, packed).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text
    y = f(x, packed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 2)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ w, atol=1e-4)


@pytest.mark.parametrize("format", [js.Balanced((16, 128)), js.NM(2, 4)], ids=str)
def test_each_device_runs_the_kernel_under_shard_map(format):
    packed, w = pack(format, (1024, 128), "bfloat16")
    x = jnp.asarray(draw((8, 1024), 2), "bfloat16")

    def step(values, x):
        def loss(values):
            y = kernels.pallas(x, formats.with_values(packed, values))
            return jnp.sum(y.astype(jnp.float32))

        value, grads = jax.value_and_grad(loss)(values)
        return jax.lax.psum(value, "x"), grads

    specs = {"in_specs": (P(), P("x")), "out_specs": (P(), P())}
    f = jax.jit(jax.shard_map(step, mesh=mesh_of_eight(), **specs))
    traced = f.trace(packed.values, x)
    for platform, call in (("tpu", "tpu_custom_call"), ("cuda", "mosaic_gpu")):
        assert call in traced.lower(lowering_platforms=(platform,)).as_text()
    value, grads = f(packed.values, x)
    each = np.asarray(x, np.float64) @ w
    assert abs(float(value) - each.sum()) < 2**-8 * np.abs(each).sum()
    expected = np.where(w != 0, np.asarray(x, np.float64).sum(0)[:, None], 0)
    got = formats.unpack(formats.with_values(packed, grads))
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, atol=2**-6 * np.abs(expected).max()
    )


# Bitmaps.


def test_where_the_values_of_each_output_begin():
    mask = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]], bool)
    packed, _ = pack(formats.Bitmap, (3, 3), mask=mask)
    assert _pallas_triton.starts(packed).tolist() == [0, 2, 2]


@pytest.mark.skipif(not _pallas_triton.MISSING, reason="there is a kernel of bitmaps")
def test_without_the_extra_one_line_says_how_to_get_it():
    packed, _ = pack(formats.Bitmap, (8, 8), mask=np.eye(8, dtype=bool))
    with pytest.raises(RuntimeError, match=r"pip install 'jaxsparse\[gpu\]'") as error:
        kernels.pallas(jnp.ones((1, 8)), packed)
    assert "\n" not in str(error.value)
    assert kernels.matmul(jnp.ones((1, 8)), packed).shape == (1, 8)


@pytest.mark.skipif(bool(_pallas_triton.MISSING), reason="jax-triton is an extra")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernel_of_bitmaps_compiles_for_hopper(dtype):
    packed, _ = pack(formats.Bitmap, (100, 70), dtype, draw((100, 70), 1) > 0)
    engine = jax.jit(functools.partial(_pallas_triton.bitmap, capability=90))
    traced = engine.trace(jnp.ones((3, 100), dtype), packed)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" in text


def test_another_format_is_named():
    packed, _ = pack(formats.Csr16, (8, 8), mask=np.eye(8, dtype=bool))
    with pytest.raises(TypeError, match=r"kernels.pallas multiplies Tiles.* a Csr16"):
        kernels.pallas(jnp.ones((1, 8)), packed)
