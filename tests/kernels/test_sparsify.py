"""A model with packed kernels computes what the masked model does."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from zoo.models import ZOO

import jaxsparse as js
from jaxsparse import formats, kernels


def by_unpacking(x, packed):
    """An engine for any format, as quick as it may be."""
    return kernels.dense(x, packed)


ANY = kernels.Rules([
    kernels.Rule(kernels.gathered, formats.Tiles),
    kernels.Rule(by_unpacking, formats.PackedArray),
])


def of_zoo(name):
    with jax.enable_x64(True):
        return ZOO[name]()


WEIGHTS = js.Unstructured()


def sparse_and_masked(apply_fn, params, inputs, *, pattern=WEIGHTS, **options):
    trace = js.trace(apply_fn, params, *inputs)
    pruned = js.prune(params, 0.5, pattern=pattern, trace=trace, where=trace.where)
    options = {"rules": ANY} | options
    return kernels.sparsify(trace, *pruned, **options), pruned


FEW = ("moe", "attention_flax", "attention_gqa", "scan_remat")


@pytest.mark.parametrize(
    "name",
    [n if n in FEW else pytest.param(n, marks=pytest.mark.exhaustive) for n in ZOO],
)
def test_models_of_many_styles(name):
    """In float64: all that differs is the order of sums."""
    apply_fn, params, inputs = of_zoo(name)
    with jax.enable_x64(True):
        sparse, pruned = sparse_and_masked(
            apply_fn, params, inputs, format=formats.Csr16
        )
        got = jax.jit(sparse.apply_fn)(sparse.params, *inputs)
        want = jax.jit(apply_fn)(pruned.params, *inputs)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            most = max(1e-300, float(jnp.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * most)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


def check(apply_fn, params, *inputs, packed, pattern=WEIGHTS, **options):
    sparse, pruned = sparse_and_masked(
        apply_fn, params, inputs, pattern=pattern, **options
    )
    names = {p for p, layer in sparse.layers.items() if layer.engine != "dense"}
    assert names == set(packed), str(sparse)
    got = jax.jit(sparse.apply_fn)(sparse.params, *inputs)
    assert_close(got, jax.jit(apply_fn)(pruned.params, *inputs))
    return sparse, pruned


def test_heads_are_permuted_and_merged_on_the_way():
    def apply_fn(p, x):
        q = (x @ p["q"].reshape(8, 12)).reshape(-1, 3, 4)
        k = jnp.einsum("bd,hdk->bhk", x, p["k"])  # heads first
        y = q * k
        return jnp.einsum("bhk,khd->bd", y, p["o"])  # (head_dim, heads, out)

    params = {"q": draw(8, 3, 4), "k": draw(3, 8, 4), "o": draw(4, 3, 8)}
    params = jax.tree.map(jnp.asarray, params)
    check(apply_fn, params, draw(5, 8), packed=params)


def test_a_kernel_on_the_left_and_a_transposed_one():
    apply_fn = lambda p, x: (p["a"] @ x.T).T @ p["b"].T
    params = {"a": jnp.asarray(draw(6, 8)), "b": jnp.asarray(draw(4, 6))}
    check(apply_fn, params, draw(5, 8), packed=params)


def test_layers_of_a_scan_are_handed_out_packed():
    def apply_fn(p, x):
        turn = lambda x, layer: (jnp.tanh(x @ layer["w"] + layer["b"]), None)
        return jax.lax.scan(jax.checkpoint(turn), x, p)[0]

    params = {"w": jnp.asarray(draw(3, 8, 8)), "b": jnp.asarray(draw(3, 1, 8))}
    sparse, _ = check(apply_fn, params, draw(1, 8), packed={"w"})
    assert sparse.params["w"].values.shape[0] == 3
    text = jax.jit(sparse.apply_fn).lower(sparse.params, draw(1, 8)).as_text()
    assert "tensor<3x8x8xf32>" not in text  # no dense stack anywhere


def test_tiles_run_as_gathered_products_and_no_dense_kernel_is_made():
    apply_fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    params = {"up": jnp.asarray(draw(16, 32)), "down": jnp.asarray(draw(32, 16))}
    pattern = js.Balanced((1, 16))
    x = draw(4, 16)
    sparse, _ = check(
        apply_fn, params, x, packed=params, pattern=pattern, format=pattern
    )
    assert {layer.engine for layer in sparse.layers.values()} == {"gathered"}
    text = jax.jit(sparse.apply_fn).lower(sparse.params, x).as_text()
    assert "tensor<16x32xf32>" not in text
    assert "up      gathered" in str(sparse).replace("down", "up  ")


def test_a_model_that_computes_in_bfloat16():
    half = jnp.bfloat16
    apply_fn = lambda p, x: (x.astype(half) @ p["w"].astype(half)).astype(jnp.float32)
    params = {"w": jnp.asarray(draw(16, 8))}
    sparse, pruned = sparse_and_masked(apply_fn, params, (draw(4, 16),))
    got = sparse.apply_fn(sparse.params, draw(4, 16))
    want = apply_fn(pruned.params, draw(4, 16))
    np.testing.assert_allclose(got, want, atol=2**-6 * np.abs(want).max())


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NHWC")


@pytest.mark.parametrize(
    ("kernel", "numbers", "options"),
    [
        ((1, 1, 4, 8), NHWC, {"window_strides": (2, 1), "padding": "VALID"}),
        ((3, 2, 4, 8), NHWC, {"window_strides": (2, 1), "padding": "SAME"}),
        (
            (8, 4, 3, 2),
            NCHW,
            {
                "window_strides": (1, 2),
                "padding": ((1, 2), (0, 3)),
                "rhs_dilation": (2, 1),
            },
        ),
    ],
    ids=["one place", "same", "dilated"],
)
def test_convolutions_are_products_of_their_windows(kernel, numbers, options):
    """And those with groups stay convolutions."""

    def apply_fn(p, x):
        conv = functools.partial(
            jax.lax.conv_general_dilated, x, dimension_numbers=numbers, **options
        )
        return conv(p["whole"]) + conv(p["grouped"], feature_group_count=2)

    fewer = tuple(2 if n == 4 else n for n in kernel)
    params = {"whole": jnp.asarray(draw(*kernel)), "grouped": jnp.asarray(draw(*fewer))}
    shape = (2, 7, 6, 4) if numbers is NHWC else (2, 4, 7, 6)
    sparse, _ = check(apply_fn, params, draw(*shape), packed={"whole"})
    why = "`conv_general_dilated` reads it as an array"
    assert sparse.layers["grouped"].why == why
    assert isinstance(sparse.params["grouped"], jax.Array)


def test_a_kernel_that_is_read_as_an_array_too_stays_dense():
    apply_fn = lambda p, x: x @ p["a"] + jnp.sum(jnp.abs(p["a"])) + x @ p["b"]
    params = {k: jnp.asarray(draw(8, 8, seed=i)) for i, k in enumerate("ab")}
    sparse, _ = check(apply_fn, params, draw(3, 8), packed={"b"})
    assert sparse.layers["a"].why == "`abs` reads it as an array"
    assert "`abs` reads it as an array" in str(sparse)


def test_where_no_rule_is_quicker_kernels_stay_dense():
    apply_fn = lambda p, x: x @ p["w"]
    params = {"w": jnp.asarray(draw(8, 8))}
    sparse, _ = check(apply_fn, params, draw(3, 8), packed=(), rules=kernels.Rules())
    assert sparse.layers["w"].why == "no rule has a quicker engine for it"


def mine(x, packed):
    """Another engine for tiles."""
    return kernels.gathered(x, packed)


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ([1.0, 3.0, 2.0], "dense"),
        ([4.0, 3.0, 2.0], "mine"),
        ([4.0, 1.0, 2.0], "by_unpacking"),
    ],
)
def test_engines_can_be_chosen_by_the_clock(times, name, monkeypatch):
    """The quickest of all that the rules name, or a dense product; one run for all of a
    shape. (The clock is not the machine's here.)"""
    apply_fn = lambda p, x: x @ p["a"] + x @ p["b"]
    params = {k: jnp.asarray(draw(8, 8, seed=i)) for i, k in enumerate("ab")}
    pattern, x, calls = js.Balanced((1, 8)), draw(4, 8), []

    def measured(pairs, rows, dtype):
        calls.append((len(pairs), rows, dtype))
        return times

    monkeypatch.setattr("jaxsparse.kernels._layers.milliseconds", measured)
    engines = by_unpacking, mine
    each = [kernels.Rule(e, formats.Tiles, sparsity=1) for e in engines]
    rules = kernels.Rules(each)
    options = {"rules": rules, "pattern": pattern, "format": pattern, "measure": True}
    sparse, pruned = sparse_and_masked(apply_fn, params, (x,), **options)
    assert calls == [(2, 4, np.float32)]
    for layer in sparse.layers.values():
        assert layer.engine == name
        assert (layer.dense_ms, layer.packed_ms) == (times[0], min(times[1:]))
    assert ("a dense product is quicker" in str(sparse)) == (name == "dense")
    assert_close(sparse.apply_fn(sparse.params, x), apply_fn(pruned.params, x))


def test_a_real_clock_gives_times():
    apply_fn = lambda p, x: jnp.einsum("erd,edf->erf", x, p["w"])
    params, x = {"w": jnp.asarray(draw(2, 8, 8))}, draw(2, 3, 8)
    pattern = js.Balanced((1, 8))
    options = {"pattern": pattern, "format": pattern, "measure": True}
    sparse, _ = sparse_and_masked(apply_fn, params, (x,), **options)
    layer = sparse.layers["w"]
    assert layer.dense_ms > 0
    assert layer.packed_ms > 0
    assert (layer.engine == "dense") == (layer.dense_ms <= layer.packed_ms)


def test_gradients_of_the_values_train_the_model():
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params = {"a": jnp.asarray(draw(8, 16)), "b": jnp.asarray(draw(16, 4))}
    x = draw(5, 8)
    sparse, pruned = sparse_and_masked(
        apply_fn, params, (x,), pattern=js.Balanced((1, 4)), format=js.Balanced((1, 4))
    )

    @jax.jit
    @jax.grad
    def grad(values):
        packed = formats.with_values(sparse.params, values)
        return jnp.sum(sparse.apply_fn(packed, x) ** 2)

    found = formats.with_values(sparse.params, grad(formats.values(sparse.params)))
    dense = jax.jit(jax.grad(lambda p: jnp.sum(apply_fn(p, x) ** 2)))(pruned.params)
    masked = js.patterns.apply(dense, pruned.masks)
    jax.tree.map(assert_close, formats.unpack(found), masked)


def test_other_shapes_vmap_and_the_second_call():
    apply_fn = lambda p, x: jax.nn.relu(x @ p["w"])
    params = {"w": jnp.asarray(draw(8, 8))}
    sparse, pruned = sparse_and_masked(apply_fn, params, (draw(3, 8),))
    traces = []

    @jax.jit
    def run(p, x):
        traces.append(1)
        return sparse.apply_fn(p, x)

    for x in (draw(3, 8), draw(3, 8, seed=1), draw(7, 8)):
        assert_close(run(sparse.params, x), apply_fn(pruned.params, x))
    assert len(traces) == 2
    many = jax.vmap(sparse.apply_fn, (None, 0))(sparse.params, draw(2, 3, 8))
    assert_close(many, apply_fn(pruned.params, draw(2, 3, 8)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_many_devices(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    apply_fn = lambda p, x: x @ p["w"]
    w = jax.device_put(draw(16, 64), NamedSharding(mesh, P(None, "x")))
    pattern = js.Balanced((1, 8))
    x = jax.device_put(draw(8, 16), NamedSharding(mesh, P()))
    sparse, pruned = sparse_and_masked(
        apply_fn, {"w": w}, (x,), pattern=pattern, format=pattern
    )
    y = jax.jit(sparse.apply_fn)(sparse.params, x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 2)
    want = np.asarray(x) @ np.asarray(pruned.params["w"])
    assert_close(y, want)
    dense, _ = sparse_and_masked(apply_fn, {"w": w}, (x,), rules=kernels.Rules())
    assert jax.jit(dense.apply_fn)(dense.params, x).sharding.is_equivalent_to(
        y.sharding, 2
    )


def test_a_packed_model_runs_from_a_checkpoint_without_the_dense_one(tmp_path):
    """In a process of its own there would be a pickled template, and shapes alone."""
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None]
    params = {"a": draw(16, 16), "b": draw(16, 8, seed=1), "c": draw(8)}
    params = jax.tree.map(jnp.asarray, params)
    axes = js.Axes((0,), (1,))
    pruned = js.prune(params, 0.5, axes=axes)
    format = {"a": formats.Csr16, "b": formats.Bitmap}
    packed = formats.pack(*pruned, format=format, axes=axes)
    js.checkpoint.save(tmp_path, step=1, params=packed)
    template = pickle.dumps(jax.eval_shape(lambda: packed))
    back = js.checkpoint.restore(tmp_path, params=pickle.loads(template)).params
    shapes = jax.eval_shape(lambda: params)
    trace = js.trace(apply_fn, shapes, jax.ShapeDtypeStruct((3, 16), jnp.float32))
    run = jax.jit(kernels.packed_apply(trace))
    x = draw(5, 16)  # of another shape than what was traced
    assert_close(run(back, x), apply_fn(pruned.params, x))


def test_what_does_not_belong_together_is_an_error():
    apply_fn = lambda p, x: x @ p["w"]
    params, masks = {"w": jnp.ones((8, 8))}, {"w": jnp.ones((8, 8), bool)}
    trace = js.trace(apply_fn, params, draw(3, 8))
    with pytest.raises(TypeError, match=r"trace must be what js.trace"):
        kernels.sparsify(apply_fn, params, masks)
    with pytest.raises(
        ValueError, match=r"w: traced with shape \(8, 8\), got \(4, 8\)"
    ):
        kernels.sparsify(trace, {"w": jnp.ones((4, 8))}, {"w": jnp.ones((4, 8), bool)})
    half = {"w": jnp.arange(64).reshape(8, 8) % 2 == 0}
    with pytest.raises(ValueError, match="w: the tile of inputs 0 to 1"):
        kernels.sparsify(trace, params, half, format=js.Block((2, 2)))
