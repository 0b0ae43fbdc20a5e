"""Every engine is the dense product of float64, in any type, and so are gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import formats, kernels
from jaxsparse.kernels import _native

D_IN, D_OUT, ROWS = 24, 16, 6
DENSE = js.Axes((0,), (1,))
FORMATS = {
    "bitmap": (formats.Bitmap, js.Unstructured()),
    "csr": (formats.Csr16, js.Unstructured()),
    "2:4": (js.NM(2, 4), js.NM(2, 4)),
    "3:8": (js.NM(3, 8), js.NM(3, 8)),
    "balanced": (js.Balanced((1, 8)), js.Balanced((1, 8))),
    "squares": (js.Balanced((4, 4)), js.Balanced((4, 4))),
    "tiles": (js.Block((2, 4)), js.Block((2, 4))),
    "outputs": (formats.Condensed, js.Channel()),
    "inputs": (formats.Condensed, js.Channel(axis=-2)),
}
GATHERED = [name for name in FORMATS if name not in ("bitmap", "csr")]
# Of the sums' largest entry; a dense product has the same.
ERRORS = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}


def draw(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def packed_kernel(name, shape=(D_IN, D_OUT), axes=DENSE, dtype="float32"):
    format, pattern = FORMATS[name]
    w = jnp.asarray(draw(shape), dtype)
    sparsity = None if isinstance(pattern, js.NM) else 0.5
    options = {"pattern": pattern, "axes": axes, "where": "w"}
    masks = js.patterns.masks({"w": draw(shape, 1)}, sparsity, **options)
    packed = formats.pack({"w": w}, masks, format=format, axes=axes)["w"]
    whole = np.where(masks["w"], np.asarray(w, np.float64), 0)
    return packed, whole


def assert_close(got, expected, dtype="float32"):
    most = np.abs(expected).max()
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=8 * ERRORS[dtype] * most)


CASES = [("dense", name) for name in FORMATS] + [("gathered", n) for n in GATHERED]
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
every_engine = pytest.mark.parametrize(("engine", "name"), CASES)


@every_engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", exhaustive("float16")])
def test_products_are_those_of_float64(engine, name, dtype):
    packed, w = packed_kernel(name, dtype=dtype)
    x = jnp.asarray(draw((2, 3, D_IN)), dtype)
    y = jax.jit(getattr(kernels, engine))(x, packed)
    assert (y.shape, y.dtype) == ((2, 3, D_OUT), x.dtype)
    assert_close(y, np.asarray(x, np.float64) @ w, dtype)


@pytest.mark.parametrize(
    ("engine", "name"),
    [c if c[0] == "gathered" or c[1] == "csr" else exhaustive(*c) for c in CASES],
)
def test_gradients_of_both_are_those_of_float64(engine, name):
    packed, w = packed_kernel(name)
    x, dy = draw((ROWS, D_IN)), draw((ROWS, D_OUT), 2)

    def loss(values, x):
        own = formats.with_values(packed, values)
        return jnp.sum(getattr(kernels, engine)(x, own) * dy)

    dv, dx = jax.jit(jax.grad(loss, (0, 1)))(packed.values, x)
    assert_close(dx, dy.astype(np.float64) @ w.T)
    moved = formats.unpack(formats.with_values(packed, packed.values + dv))
    kept = np.asarray(formats.unpack(_ones(packed))) != 0
    expected = np.where(kept, x.astype(np.float64).T @ dy, 0)
    assert_close(moved - w.astype(np.float32), expected)


def _ones(packed):
    return formats.with_values(packed, jnp.ones_like(packed.values))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_weights_of_eight_bits_are_widened(dtype):
    """The product has the type of the activations."""
    x = draw((ROWS, D_IN))
    mask = {"w": jnp.asarray(draw((D_IN, D_OUT)) > 0)}
    w = jnp.asarray(np.round(4 * draw((D_IN, D_OUT), 1)), dtype)
    whole = np.where(mask["w"], np.asarray(w, np.float64), 0)
    packed = formats.pack({"w": w}, mask, format=formats.Csr16, axes=DENSE)["w"]
    y = jax.jit(kernels.matmul)(x, packed)
    assert y.dtype == np.float32
    assert_close(y, x.astype(np.float64) @ whole)


@pytest.mark.parametrize("name", ["csr", "2:4", "balanced", "tiles", "outputs"])
def test_experts_are_multiplied_each_by_its_own(name):
    shape, axes = (3, D_IN, D_OUT), js.Axes((1,), (2,), (0,))
    packed, w = packed_kernel(name, shape, axes)
    x = draw((3, ROWS, D_IN))
    y = jax.jit(kernels.matmul)(x, packed)
    assert_close(y, np.einsum("eri,eio->ero", x.astype(np.float64), w))


def test_input_and_output_axes_count_as_one():
    shape, axes = (3, 8, 4, 2), js.Axes((0, 1), (2, 3))
    packed, w = _heads(shape, axes)
    x = draw((ROWS, 24))
    assert_close(kernels.matmul(x, packed), x.astype(np.float64) @ w.reshape(24, 8))


def _heads(shape, axes):
    masks = {"w": jnp.asarray(draw(shape, 1) > 0)}
    w = draw(shape)
    packed = formats.pack({"w": jnp.asarray(w)}, masks, format=formats.Csr16, axes=axes)
    return packed["w"], np.where(masks["w"], w, 0).astype(np.float64)


@pytest.mark.parametrize(
    "name", ["bitmap", "csr", "2:4", "balanced", "tiles", "inputs"]
)
def test_scan_and_vmap_take_layer_after_layer(name):
    shape, axes = (3, 8, 8), js.Axes((1,), (2,), (0,))
    packed, w = packed_kernel(name, shape, axes)
    x = draw((2, 8))

    @jax.jit
    def run(x, packed):
        return jax.lax.scan(
            lambda x, layer: (kernels.matmul(x, layer), None), x, packed
        )

    expected = x.astype(np.float64)
    for layer in w:
        expected = expected @ layer
    assert_close(run(x, packed)[0], expected)
    many = jax.vmap(kernels.matmul, (None, 0))(x, packed)
    assert_close(many, np.einsum("ri,lio->lro", x.astype(np.float64), w))


def test_a_batch_of_none():
    for name in ("bitmap", "2:4", "balanced", "inputs"):
        packed, _ = packed_kernel(name)
        assert kernels.matmul(np.zeros((0, D_IN), np.float32), packed).shape == (
            0,
            D_OUT,
        )


def test_a_kernel_that_keeps_nothing_gives_zeros():
    w, none = {"w": jnp.ones((8, 8))}, {"w": jnp.zeros((8, 8), bool)}
    for format in (
        formats.Bitmap,
        formats.Csr16,
        js.Balanced((1, 4)),
        formats.Condensed,
    ):
        packed = formats.pack(w, none, format=format, axes=DENSE)["w"]
        assert not np.asarray(kernels.matmul(jnp.ones((2, 8)), packed)).any()


def test_nan_in_what_is_not_read_stays_where_it_is():
    """A product of dense zeros would have spread it over all outputs."""
    mask = {"w": jnp.asarray(np.arange(8) < 4)[:, None]}
    packed = formats.pack(
        {"w": jnp.ones((8, 8))}, mask, format=js.Balanced((1, 8)), axes=DENSE
    )["w"]
    x = jnp.ones((1, 8)).at[0, 7].set(jnp.nan)
    assert np.isfinite(kernels.gathered(x, packed)).all()


@pytest.mark.parametrize("kind", [AxisType.Auto], ids=str)
def test_tiles_split_over_devices_stay_there(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    pattern = js.Balanced((1, 4))
    w = jax.device_put(draw((16, 64)), NamedSharding(mesh, P(None, "x")))
    params, masks = js.prune({"w": w}, 0.5, pattern=pattern, axes=DENSE)
    packed = formats.pack(params, masks, format=pattern, axes=DENSE)["w"]
    x = jax.device_put(draw((4, 16)), NamedSharding(mesh, P()))
    compiled = jax.jit(kernels.gathered).lower(x, packed).compile()
    y = compiled(x, packed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 2)
    assert "all-gather" not in compiled.as_text()
    assert_close(y, np.asarray(x, np.float64) @ np.asarray(params["w"], np.float64))


# Which engine.


def test_the_first_rule_that_fits_counts():
    packed, _ = packed_kernel("balanced")
    rule = functools.partial(kernels.Rule, kernels.gathered)
    choose = lambda *rules, rows=1: kernels.choose(
        packed, rows=rows, rules=kernels.Rules(rules), platform="cpu"
    )
    assert choose(rule(formats.Tiles)) is kernels.gathered
    assert choose(rule(formats.Csr16)) is kernels.dense
    assert choose(rule(formats.Tiles, "tpu")) is kernels.dense
    assert choose(rule(formats.Tiles, sparsity=0.6)) is kernels.dense
    assert choose(rule(formats.Tiles, sparsity=0.5)) is kernels.gathered
    assert choose(rule(formats.Tiles, outputs=16)) is kernels.dense
    assert choose(rule(formats.Tiles, rows=4), rows=5) is kernels.dense
    mine = lambda x, packed: x[..., :1]
    assert choose(rule(formats.Tiles)._replace(engine=mine)) is mine


def test_rules_of_ones_own_are_taken():
    packed, _ = packed_kernel("balanced")
    mine = lambda x, packed: jnp.full((*x.shape[:-1], packed.view.d_out), 7.0)
    rules = kernels.Rules([kernels.Rule(mine, formats.Tiles)])
    assert (kernels.matmul(jnp.ones((1, D_IN)), packed, rules=rules) == 7).all()


def test_the_table_can_be_read():
    text = str(kernels.MEASURED)
    assert "cpu         Tiles of 64 outputs or more from 75 %: gathered" in text
    assert text.endswith("else dense")


# Errors.


def test_what_does_not_fit_is_named():
    packed, _ = packed_kernel("csr")
    x = jnp.ones((2, D_IN))
    with pytest.raises(ValueError, match=r"x has the shape \(2, 5\); a kernel of 24"):
        kernels.matmul(x[:, :5], packed)
    with pytest.raises(TypeError, match="x must be of floating point, got int32"):
        kernels.matmul(x.astype(jnp.int32), packed)
    with pytest.raises(TypeError, match="packed must be what js"):
        kernels.matmul(x, x)
    with pytest.raises(TypeError, match=r"kernels.gathered multiplies Tiles.* a Csr16"):
        kernels.gathered(x, packed)
    with pytest.raises(TypeError, match=r"kernels.native multiplies Csr16.* a Bitmap"):
        kernels.native(x, packed_kernel("bitmap")[0])
    experts, _ = packed_kernel("csr", (3, 8, 8), js.Axes((1,), (2,), (0,)))
    with pytest.raises(ValueError, match=r"x has the shape \(2, 8\); .* \[3, ..., 8\]"):
        kernels.matmul(jnp.ones((2, 8)), experts)


NATIVE = {
    "csr": (formats.Csr16, js.Unstructured()),
    "4x1": (js.Block((1, 4)), js.Block((1, 4))),
    "4x1 balanced": (js.Balanced((1, 4)), js.Balanced((1, 4))),
}


@pytest.mark.parametrize("layers", [(), (3,)], ids=["one", "layers"])
@pytest.mark.parametrize("name", NATIVE)
def test_compiled_kernels_are_the_same_or_say_what_is_missing(name, layers):
    format, pattern = NATIVE[name]
    shape, n = (*layers, D_IN, D_OUT), len(layers)
    axes = js.Axes((n,), (n + 1,), tuple(range(n)))
    options = {"pattern": pattern, "axes": axes, "where": "w"}
    masks = js.patterns.masks({"w": draw(shape, 1)}, 0.5, **options)
    w = jnp.asarray(draw(shape))
    packed = formats.pack({"w": w}, masks, format=format, axes=axes)["w"]
    x = draw((*layers, ROWS, D_IN))
    if not _native.available():
        with pytest.raises(RuntimeError, match=r"No compiled kernels: .+"):
            kernels.native(x, packed)
        assert _native.why_not()
        return

    def loss(values, x, engine):
        return jnp.sum(jnp.sin(engine(x, formats.with_values(packed, values))))

    grads = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    got = grads(packed.values, x, kernels.native)
    want = grads(packed.values, x, kernels.dense)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
