"""Products with `Int8Tiles` are those of integers, to the last bit, in every engine."""

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

DENSE, STACKED = js.Axes((0,), (1,)), js.Axes((1,), (2,), (0,))
ENGINES = ("dense", "native")


def by_unpacking(x, packed):
    """An engine for any format, wherever tests run."""
    return kernels.dense(x, packed)


OF_FOUR = js.Block((4, 1))
ANY = kernels.Rules([kernels.Rule(by_unpacking, formats.PackedArray)])


def engine_of(name):
    if name == "native" and not _native.available():
        pytest.skip(_native.why_not())
    return jax.jit(getattr(kernels, name))


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def packed_kernel(shape=(26, 12), axes=DENSE, kept=0.4):
    """With an output of zeros, and inputs that 4 does not divide."""
    mask = np.random.default_rng(1).random(shape) < kept
    mask[..., 3] = False
    options = {"format": formats.Int8Tiles, "axes": axes}
    w = jnp.asarray(draw(shape))
    return formats.pack({"w": w}, {"w": jnp.asarray(mask)}, **options)["w"]


def integers(packed):
    """`[..., d_in, d_out]` in int64, from the definition of the format."""
    values, rows, offsets = (
        np.asarray(x) for x in (packed.values, packed.rows, packed.offsets)
    )
    *batch, pieces, _ = rows.shape
    d_in, d_out = packed.view.d_in, packed.view.d_out
    each = d_out // pieces
    w = np.zeros((*batch, -(-d_in // 4), 4, d_out), np.int64)
    for at in np.ndindex(*batch, pieces, each):
        *layer, piece, output = at
        begin, end = offsets[(*layer, piece)][output : output + 2]
        for slot in range(begin, end):
            where = (*layer, rows[(*layer, piece, slot)])
            w[(*where, slice(None), piece * each + output)] = values[
                (*layer, piece, slot)
            ]
    return w.reshape(*batch, -1, d_out)[..., :d_in, :]


def product(x, packed):
    """In the roundings of the definition: float32, and integers for the sums."""
    s = (np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)).astype(np.float32)
    usable = s >= np.float32(1e-37)
    inverse = np.float32(1) / np.where(usable, s, np.float32(1))
    q = np.where(usable, np.rint(x * inverse), 0).astype(np.int64)
    sums = (q @ integers(packed)).astype(np.float32)
    return sums * (s * np.asarray(packed.scale)[..., None, :])


def tokens(rows, d_in):
    """With one of zeros, one too small, and one in which all lie between integers."""
    x = draw((rows, d_in), 2)
    if rows > 3:
        x[1] = 0
        x[2] *= 1e-38
        x[3] = np.arange(d_in) + 0.5
        x[3, 0] = 127
    return x


@pytest.mark.parametrize("engine", ENGINES)
def test_products_are_those_of_integers(engine):
    run, packed = engine_of(engine), packed_kernel()
    for rows in (0, 1, 5, 33):
        x = tokens(rows, 26)
        y = run(x, packed)
        assert (y.shape, y.dtype) == ((rows, 12), np.float32)
        np.testing.assert_array_equal(y, product(x, packed))
    x = tokens(6, 26).reshape(2, 3, 26)  # more axes
    np.testing.assert_array_equal(run(x, packed), product(x, packed))


@pytest.mark.parametrize("engine", ENGINES)
def test_sums_beyond_the_exact_integers_of_float32(engine):
    """Of one sign and as large as they can be."""
    run, d_in = engine_of(engine), 2500
    w = np.full((d_in, 2), 3.0, np.float32)
    w[:, 1] = np.linspace(-3, 3, d_in)
    packed = formats.pack(
        {"w": jnp.asarray(w)},
        {"w": jnp.ones((d_in, 2), bool)},
        format=formats.Int8Tiles,
        axes=DENSE,
    )["w"]
    x = np.ones((2, d_in), np.float32)
    x[1] = draw(d_in)
    assert integers(packed)[:, 0].sum() * 127 > 2**24
    np.testing.assert_array_equal(run(x, packed), product(x, packed))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_is_not_finite_is_lost_alone(engine):
    run, packed = engine_of(engine), packed_kernel()
    for bad in (np.nan, np.inf, -np.inf):
        x = tokens(5, 26)
        x[4, 7] = bad
        y = np.asarray(run(x, packed))
        assert not np.isfinite(y[4]).any()
        np.testing.assert_array_equal(y[:4], product(x[:4], packed))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_kernel_that_keeps_nothing_gives_zeros(engine):
    run, w = engine_of(engine), {"w": jnp.ones((8, 4))}
    none = {"w": jnp.zeros((8, 4), bool)}
    packed = formats.pack(w, none, format=formats.Int8Tiles, axes=DENSE)["w"]
    for rows in (0, 1, 3):
        y = run(jnp.ones((rows, 8)), packed)
        np.testing.assert_array_equal(y, np.zeros((rows, 4)))


def test_the_error_is_that_of_the_roundings():
    """Of float64 products of the weights: half a step of activations and of weights."""
    w = draw((96, 32))
    mask = np.random.default_rng(1).random(w.shape) < 0.3
    packed = formats.pack(
        {"w": jnp.asarray(w)},
        {"w": jnp.asarray(mask)},
        format=formats.Int8Tiles,
        axes=DENSE,
    )["w"]
    x = draw((16, 96), 3).astype(np.float64)
    kept = np.where(mask, w, 0).astype(np.float64)
    y = np.asarray(kernels.dense(x.astype(np.float32), packed), np.float64)
    step, scale = np.abs(x).max(1, keepdims=True) / 127, np.abs(kept).max(0) / 127
    read = (np.abs(x) + step / 2) @ mask
    bound = step / 2 * np.abs(kept).sum(0) + scale / 2 * read
    assert (np.abs(y - x @ kept) <= bound * (1 + 1e-5)).all()
    relative = np.linalg.norm(y - x @ kept) / np.linalg.norm(x @ kept)
    assert 1e-3 < relative < 0.02


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_and_experts(engine):
    run, packed = engine_of(engine), packed_kernel((3, 12, 12), STACKED)
    x = draw((3, 5, 12))
    np.testing.assert_array_equal(run(x, packed), product(x, packed))

    @jax.jit
    def through(x, packed):
        own = getattr(kernels, engine)
        return jax.lax.scan(lambda x, layer: (own(x, layer), None), x, packed)[0]

    expected = x[0]
    for layer in range(3):
        one = jax.tree.map(lambda a, i=layer: a[i], packed)
        expected = product(expected, one)
    np.testing.assert_array_equal(through(x[0], packed), expected)
    many = jax.vmap(getattr(kernels, engine), (None, 0))(x[0], packed)
    np.testing.assert_array_equal(many, product(np.stack([x[0]] * 3), packed))


def test_the_type_of_a_product():
    packed, x = packed_kernel(), jnp.asarray(draw((5, 26)))
    half = x.astype(jnp.bfloat16)
    assert kernels.dense(half, packed).dtype == np.float32  # the kernel's is wider
    y = kernels.dense(half, formats.dense.with_dtype(packed, half.dtype))
    assert y.dtype == half.dtype
    expected = product(np.asarray(half, np.float32), packed)
    np.testing.assert_array_equal(y, jnp.asarray(expected).astype(half.dtype))


@pytest.mark.parametrize("engine", ENGINES)
def test_there_is_no_gradient(engine):
    packed, run = packed_kernel(), engine_of(engine)
    with pytest.raises(TypeError, match=r"no gradient: .* Train in another format"):
        jax.grad(lambda x: run(x, packed).sum())(draw((2, 26)))


def test_what_comes_after_can_be_trained():
    """A head on features of int8."""
    packed, head, x = packed_kernel(), jnp.asarray(draw((12, 2))), draw((5, 26))
    loss = lambda head: jnp.sum(kernels.matmul(x, packed) @ head)
    features = product(x, packed).astype(np.float64)
    expected = np.repeat(features.sum(0)[:, None], 2, 1)
    error = np.abs(np.asarray(jax.jit(jax.grad(loss))(head)) - expected)
    assert (error <= 1e-6 * np.abs(features).sum(0)[:, None]).all()


def test_outputs_that_are_split_over_devices():
    """Compiled kernels work on one device: there it is the product in plain JAX."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    w = jax.device_put(draw((26, 32)), NamedSharding(mesh, P(None, "x")))
    mask = {"w": jnp.asarray(np.random.default_rng(1).random((26, 32)) < 0.1)}
    options = {"format": formats.Int8Tiles, "axes": DENSE}
    packed = formats.pack({"w": w}, mask, **options)["w"]
    x = jax.device_put(tokens(5, 26), NamedSharding(mesh, P()))
    assert kernels.choose(packed, rows=5, platform="cpu") is kernels.dense
    y = jax.jit(kernels.matmul)(x, packed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 2)
    np.testing.assert_array_equal(y, product(np.asarray(x), packed))
    if _native.available():
        with pytest.raises(ValueError, match="a kernel in 8 pieces lies on as many"):
            kernels.native(x, packed)


def test_which_engine():
    little, much = packed_kernel((40, 12), kept=0.02), packed_kernel()
    best = kernels.native if _native.available() else kernels.dense
    assert kernels.choose(little, rows=1, platform="cpu") is best
    assert kernels.choose(much, rows=1, platform="cpu") is kernels.dense
    assert kernels.choose(little, rows=1, platform="gpu") is kernels.dense
    assert "Int8Tiles from" in str(kernels.MEASURED)
    # More is stored than the kernel has weights, and any rule of no sparsity fits.
    full = packed_kernel((5, 12), kept=1)
    assert kernels.choose(full, rows=1, rules=ANY) is by_unpacking


# A whole model.


def sparsified(apply_fn, params, x, pattern=OF_FOUR, **options):
    trace = js.trace(apply_fn, params, x)
    pruned = js.prune(params, 0.75, pattern=pattern, trace=trace)
    options = {"format": formats.Int8Tiles, "rules": ANY} | options
    return kernels.sparsify(trace, *pruned, **options), pruned


def test_a_model_end_to_end():
    def apply_fn(p, x):
        turn = lambda x, w: (jax.nn.relu(x @ w), None)
        return jax.lax.scan(turn, x @ p["in"], p["stack"])[0] @ p["out"]

    params = {"in": (24, 16), "stack": (3, 16, 16), "out": (16, 8)}
    params = {k: jnp.asarray(draw(s, i)) for i, (k, s) in enumerate(params.items())}
    x = draw((5, 24), 9)
    sparse, pruned = sparsified(apply_fn, params, x)
    assert {layer.format for layer in sparse.layers.values()} == {"Int8Tiles"}
    got = jax.jit(sparse.apply_fn)(sparse.params, x)
    packed = sparse.params
    h = product(x, packed["in"])
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], packed["stack"])
        h = np.maximum(product(h, one), 0)
    np.testing.assert_array_equal(got, product(h, packed["out"]))
    want = apply_fn(pruned.params, x)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-3 < error < 0.05
    with pytest.raises(TypeError, match="have no gradient"):
        jax.grad(lambda x: sparse.apply_fn(sparse.params, x).sum())(x)


def test_a_model_in_bfloat16_and_a_convolution():
    half = jnp.bfloat16

    def apply_fn(p, x):
        y = jax.lax.conv(x.astype(half), p["conv"].astype(half), (1, 1), "SAME")
        return (y.mean((2, 3)) @ p["w"].astype(half)).astype(jnp.float32)

    params = {"conv": (8, 4, 3, 3), "w": (8, 8)}
    params = {k: jnp.asarray(draw(s, i)) for i, (k, s) in enumerate(params.items())}
    x = draw((2, 4, 5, 5), 9)
    # Of windows of three no tile is cut out: single weights go.
    sparse, pruned = sparsified(apply_fn, params, x, js.Unstructured())
    assert {layer.format for layer in sparse.layers.values()} == {"Int8Tiles"}
    got, want = sparse.apply_fn(sparse.params, x), apply_fn(pruned.params, x)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_rows_that_are_split_over_devices_stay_there(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": (64, 32), "b": (32, 16)}
    params = {
        k: jax.device_put(draw(s), NamedSharding(mesh, P())) for k, s in params.items()
    }
    x = jax.device_put(draw((16, 64)), NamedSharding(mesh, P("x")))
    for rules in (ANY, kernels.MEASURED) if _native.available() else (ANY,):
        sparse, _ = sparsified(apply_fn, params, x, rules=rules)
        packed = sparse.params
        y = jax.jit(sparse.apply_fn)(packed, x)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)
        hidden = np.maximum(product(np.asarray(x), packed["a"]), 0)
        np.testing.assert_array_equal(y, product(hidden, packed["b"]))


def test_a_packed_model_runs_without_the_dense_one():
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params = {"a": jnp.asarray(draw((16, 16))), "b": jnp.asarray(draw((16, 8), 1))}
    x = draw((3, 16), 2)
    sparse, _ = sparsified(apply_fn, params, x)
    shapes = jax.eval_shape(lambda: params)
    trace = js.trace(apply_fn, shapes, x)
    run = kernels.packed_apply(trace, rules=ANY)
    np.testing.assert_array_equal(
        run(sparse.params, x), sparse.apply_fn(sparse.params, x)
    )


def test_a_model_has_int8_only_where_it_is_asked_for():
    apply_fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.asarray(draw((64, 32)))}, draw((3, 64), 1)
    for rules in (ANY, kernels.MEASURED):
        sparse, pruned = sparsified(apply_fn, params, x, format=None, rules=rules)
        assert sparse.layers["w"].format != "Int8Tiles"
        want = apply_fn(pruned.params, x)
        np.testing.assert_allclose(
            sparse.apply_fn(sparse.params, x), want, atol=1e-5, rtol=1e-5
        )


def test_where_no_engine_is_quicker_the_weights_stay_as_they_are():
    apply_fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.asarray(draw((64, 32)))}, draw((3, 64), 1)
    sparse, pruned = sparsified(apply_fn, params, x, rules=kernels.Rules())
    assert sparse.layers["w"].engine == "dense"
    np.testing.assert_array_equal(sparse.params["w"], pruned.params["w"])


def test_a_model_of_weights_that_cannot_be_rounded():
    apply_fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.asarray(draw((8, 8))).at[5, 2].set(jnp.nan)}, draw((3, 8), 1)
    trace = js.trace(apply_fn, params, x)
    masks = {"w": jnp.arange(64).reshape(8, 8) > 8}
    with pytest.raises(ValueError, match="w: the largest weight of output 2 is nan"):
        kernels.sparsify(trace, params, masks, format=formats.Int8Tiles, rules=ANY)
