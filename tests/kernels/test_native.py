"""Native kernels against dense products in float64, in each variant that runs here."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse.kernels import _native as native

D_IN, D_OUT = 130, 204
BATCHES = (0, 1, 3, 16, 33, 128)
VARIANTS = ("avx512vnni", "avx512", "avx2", "portable")


@pytest.fixture(autouse=True)
def library():
    """Compiled by the first test that needs it, not while tests are collected."""
    if not native.available():
        pytest.skip(native.why_not())


@pytest.fixture(params=VARIANTS)
def variant(request):
    if request.param not in native.variants():
        pytest.skip(f"this processor does not run {request.param}")
    return request.param


@functools.cache
def weights(kind, d_in=D_IN, d_out=D_OUT, seed=0):
    """A dense matrix in float64, and what a kernel takes of it."""
    rng = np.random.default_rng([seed, d_in, d_out])
    if kind == "csr":
        kept = rng.random((d_in, d_out)) < 0.2
    elif kind == "tiles4":
        kept = np.repeat(rng.random((d_in, d_out // 4)) < 0.2, 4, axis=1)
    else:
        kept = np.repeat(rng.random((-(-d_in // 4), d_out)) < 0.2, 4, axis=0)[:d_in]
    kept[:, 8:12] = False  # outputs and a group without an entry
    if kind == "int8":
        w = np.where(kept, rng.integers(-128, 128, kept.shape), 0)
        w[0, :8] = 0  # a tile that is stored may have zeros
        return w, int8_tiles(w, rng)
    w = np.where(kept, rng.standard_normal(kept.shape), 0).astype(np.float32)
    pack = csr if kind == "csr" else tiles4
    return w.astype(np.float64), pack(w, kept)


def csr(w, kept):
    return (w.T[kept.T], *structure(kept.T))


def tiles4(w, kept):
    tiles = w.reshape(len(w), -1, 4).transpose(1, 0, 2)
    there = kept[:, ::4].T
    return (tiles[there], *structure(there))


def int8_tiles(w, rng):
    padded = np.pad(w, ((0, -len(w) % 4), (0, 0)))
    tiles = padded.T.reshape(w.shape[1], -1, 4).astype(np.int8)
    there = tiles.any(-1)
    scale = rng.uniform(0.001, 0.01, w.shape[1]).astype(np.float32)
    return (tiles[there], scale, *structure(there))


def structure(there):
    """Indices and offsets of what each group has."""
    offsets = np.concatenate([[0], np.cumsum(there.sum(1))])
    return np.nonzero(there)[1].astype(np.uint16), offsets.astype(np.int32)


KERNELS = {
    "csr": (native.csr_matmul, native.csr_matmul_transposed, native.csr_sampled),
    "tiles4": (
        native.tiles4_matmul,
        native.tiles4_matmul_transposed,
        native.tiles4_sampled,
    ),
}
PACK = {"csr": csr, "tiles4": tiles4}


def activations(batch, size, seed=1):
    rng = np.random.default_rng([seed, batch, size])
    return rng.standard_normal((batch, size)).astype(np.float32)


def close(found, expected, magnitude):
    """Equal to a few roundings of the sum of what is added."""
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    assert np.all(np.abs(found - expected) <= 4e-6 * magnitude + 1e-30)


@pytest.mark.parametrize("kind", KERNELS)
def test_products(kind, variant):
    w, packed = weights(kind)
    matmul, transposed, sampled = KERNELS[kind]

    @jax.jit
    def all_three(x, dy, values, *where):
        return (
            matmul(x, values, *where, variant=variant),
            transposed(dy, values, *where, D_IN, variant=variant),
            sampled(x, dy, *where, variant=variant),
        )

    for batch in BATCHES:
        x, dy = activations(batch, D_IN), activations(batch, D_OUT)
        y, dx, dvalues = all_three(x, dy, *packed)
        x, dy = x.astype(np.float64), dy.astype(np.float64)
        close(y, x @ w, np.abs(x) @ np.abs(w))
        close(dx, dy @ w.T, np.abs(dy) @ np.abs(w).T)
        kept = w != 0
        expected, magnitude = x.T @ dy, np.abs(x).T @ np.abs(dy)
        close(dvalues, PACK[kind](expected, kept)[0], PACK[kind](magnitude, kept)[0])


def quantized_product(x, w, scale):
    """In the roundings of the definition: float32, and integers for the sums."""
    s = (np.abs(x).max(1) * np.float32(1 / 127)).astype(np.float32)
    inverse = np.where(s >= 1e-37, np.float32(1) / np.maximum(s, 1e-37), 0)
    q = np.rint(x * inverse.astype(np.float32)[:, None]).astype(np.int64)
    assert np.abs(q).max(initial=0) <= 127
    return (q @ w).astype(np.float32) * (s[:, None] * scale)


def test_int8_products_are_exact(variant):
    w, (values, scale, rows, offsets) = weights("int8")
    run = jax.jit(functools.partial(native.int8_tiles_matmul, variant=variant))
    for batch in (*BATCHES, 129):
        x = activations(batch, D_IN)
        if batch > 2:
            x[1] = 0
            x[2] *= 1e-40  # subnormal numbers
        y = run(x, values, scale, rows, offsets)
        np.testing.assert_array_equal(y, quantized_product(x, w, scale))


def test_int8_sums_do_not_saturate():
    """All products have one sign and are as large as they can be."""
    d_in = 1024
    values = np.full((d_in // 4, 4), -128, np.int8)
    rows, offsets = structure(np.ones((1, d_in // 4), bool))
    scale = np.ones(1, np.float32)
    for variant in native.variants():
        for batch in (1, 16):
            x = np.full((batch, d_in), 127, np.float32)
            y = native.int8_tiles_matmul(
                x, values, scale, rows, offsets, variant=variant
            )
            np.testing.assert_array_equal(y, np.full((batch, 1), -128.0 * 127 * d_in))


def test_int8_loses_no_token_that_is_not_finite():
    w, (values, scale, rows, offsets) = weights("int8")
    for variant in native.variants():
        for batch in (1, 5):
            x = activations(batch, D_IN)
            good = np.asarray(quantized_product(x, w, scale))
            for bad in (np.nan, np.inf, -np.inf):
                wrong = x.copy()
                wrong[0, 7] = bad
                y = native.int8_tiles_matmul(
                    wrong, values, scale, rows, offsets, variant=variant
                )
                assert not np.isfinite(np.asarray(y)[0]).any()
                np.testing.assert_array_equal(y[1:], good[1:])


@pytest.mark.parametrize("kind", KERNELS)
def test_wide_indices(kind):
    """More inputs than 16 bits can name."""
    d_in = 70_000
    rng = np.random.default_rng(3)
    there = np.zeros((3, d_in), bool)
    for group in range(3):
        there[group, rng.choice(d_in, 50, replace=False)] = True
        there[group, -1] = True
    narrow, offsets = structure(there)
    indices = np.nonzero(there)[1].astype(np.uint32)
    assert narrow.max() < 2**16 <= indices.max()
    height = 1 if kind == "csr" else 4
    values = rng.standard_normal((len(indices), height)).astype(np.float32)
    w = np.zeros((d_in, 3, height))
    w[indices, np.repeat(np.arange(3), np.diff(offsets))] = values
    w = w.reshape(d_in, -1)
    x, dy = activations(2, d_in), activations(2, w.shape[1])
    matmul, transposed, sampled = KERNELS[kind]
    given = values[:, 0] if kind == "csr" else values
    where = indices, offsets
    close(matmul(x, given, *where), x @ w, np.abs(x) @ np.abs(w))
    dx = transposed(dy, given, *where, d_in)
    close(dx, dy @ w.T, np.abs(dy) @ np.abs(w).T)
    full = (x.astype(np.float64).T @ dy).reshape(d_in, 3, height)
    at = full[indices, np.repeat(np.arange(3), np.diff(offsets))]
    close(sampled(x, dy, *where), at.reshape(given.shape), 10.0)


def test_hand_arithmetic():
    """w = [[2, 0], [0, 3], [5, 7]], from two tokens."""
    values = np.array([2, 5, 3, 7], np.float32)
    columns, offsets = np.array([0, 2, 1, 2], np.uint16), np.array([0, 2, 4], np.int32)
    x = np.array([[1, 10, 100], [0, 1, -1]], np.float32)
    y = native.csr_matmul(x, values, columns, offsets)
    np.testing.assert_array_equal(y, [[502, 730], [-5, -4]])
    dy = np.array([[1, 2], [0, 10]], np.float32)
    dx = native.csr_matmul_transposed(dy, values, columns, offsets, 3)
    np.testing.assert_array_equal(dx, [[2, 6, 19], [0, 30, 70]])
    dvalues = native.csr_sampled(x, dy, columns, offsets)
    np.testing.assert_array_equal(dvalues, [1, 100, 30, 190])


@pytest.mark.parametrize("kind", KERNELS)
def test_padding_is_not_read(kind):
    """Entries beyond the last offset: their values and indices may be anything."""
    w, (values, indices, offsets) = weights(kind)
    matmul, transposed, sampled = KERNELS[kind]
    more = np.full((5, *values.shape[1:]), np.nan, np.float32)
    values = np.concatenate([values, more])
    indices = np.concatenate([indices, np.full(5, 60_000, np.uint16)])
    x, dy = activations(3, D_IN), activations(3, D_OUT)
    close(matmul(x, values, indices, offsets), x @ w, np.abs(x) @ np.abs(w))
    dx = transposed(dy, values, indices, offsets, D_IN)
    close(dx, dy @ w.T, np.abs(dy) @ np.abs(w).T)
    assert np.all(np.asarray(sampled(x, dy, indices, offsets))[-5:] == 0)


@pytest.mark.parametrize("kind", KERNELS)
def test_no_weight_and_no_output(kind):
    matmul, transposed, sampled = KERNELS[kind]
    height = 1 if kind == "csr" else 4
    values = np.zeros((0, 4) if height == 4 else 0, np.float32)
    nothing = np.zeros(0, np.uint16)
    for groups in (0, 3):
        where = nothing, np.zeros(groups + 1, np.int32)
        x, dy = activations(5, D_IN), activations(5, groups * height)
        assert not np.any(matmul(x, values, *where))
        dx = np.asarray(transposed(dy, values, *where, D_IN))
        np.testing.assert_array_equal(dx, np.zeros((5, D_IN)))
        assert sampled(x, dy, *where).shape == values.shape


@pytest.mark.parametrize("kind", KERNELS)
def test_not_a_number_reaches_what_reads_it_alone(kind):
    w, packed = weights(kind)
    for batch in (1, 3, 33):
        x = activations(batch, D_IN)
        x[0, 5] = np.nan
        y = np.asarray(KERNELS[kind][0](x, *packed))
        np.testing.assert_array_equal(np.isnan(y[0]), w[5] != 0)
        assert np.isfinite(y[1:]).all()


# ---- Transformations -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KERNELS)
def test_gradients(kind):
    """First and second derivatives of a cubic form, against dense ones in float64."""
    w, (values, *where) = weights(kind)
    x, c = activations(3, D_IN), activations(3, D_OUT)
    kept = w != 0

    def loss(x, values):
        return jnp.sum(KERNELS[kind][0](x, values, *where) ** 2 * c)

    def slope(x, values):
        dx, dvalues = jax.grad(loss, (0, 1))(x, values)
        return jnp.sum(dx**2) + jnp.sum(dvalues**2)

    (dx, dvalues), (ddx, ddvalues) = jax.jit(
        lambda *a: (jax.grad(loss, (0, 1))(*a), jax.grad(slope, (0, 1))(*a))
    )(x, values)
    with jax.enable_x64(True):

        def dense_loss(x, w):
            return jnp.sum((x @ w) ** 2 * c.astype(np.float64))

        def dense_slope(x, w):
            dx, dw = jax.grad(dense_loss, (0, 1))(x, w)
            return jnp.sum(dx**2) + jnp.sum(jnp.where(kept, dw, 0) ** 2)

        args = x.astype(np.float64), w
        expected = jax.jit(jax.grad(dense_loss, (0, 1)))(*args)
        second = jax.jit(jax.grad(dense_slope, (0, 1)))(*args)
    for found, (to_x, to_w) in (((dx, dvalues), expected), ((ddx, ddvalues), second)):
        to_x, to_w = np.asarray(to_x), PACK[kind](np.asarray(to_w), kept)[0]
        close(found[0], to_x, 10 * np.abs(to_x).max())
        close(found[1], to_w, 10 * np.abs(to_w).max())


def test_int8_has_no_gradient():
    _, packed = weights("int8")
    x = activations(2, D_IN)
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda x: native.int8_tiles_matmul(x, *packed).sum())(x)


@pytest.mark.parametrize("kind", KERNELS)
def test_vmap(kind):
    """Over tokens, over stacked weights, and of a gradient for each example."""
    matmul = KERNELS[kind][0]
    w, (values, *where) = weights(kind)
    x = activations(6, D_IN)
    apart = jax.jit(
        jax.vmap(jax.vmap(lambda x: matmul(x, values, *where), in_axes=1), in_axes=2)
    )(x.reshape(2, 3, D_IN).transpose(2, 1, 0))
    close(apart.reshape(6, D_OUT), x @ w, np.abs(x) @ np.abs(w))

    scaled = np.stack([values, 2 * values])
    both = jax.jit(jax.vmap(lambda v: matmul(x, v, *where)))(scaled)
    close(both[1], 2 * x @ w, np.abs(x) @ np.abs(w) * 2)

    loss = lambda v, x: jnp.sum(matmul(x, v, *where) ** 2)
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(values, x)
    for one, row in zip(each, x.astype(np.float64), strict=True):
        expected = PACK[kind](2 * np.outer(row, row @ w), w != 0)[0]
        close(one, expected, 10 * np.abs(expected).max())


def test_scan_over_stacked_layers():
    """Layers with different numbers of entries, padded to the largest."""
    layers = [weights("csr", D_OUT, D_OUT, seed) for seed in range(3)]
    most = max(len(packed[0]) for _, packed in layers)
    pad = lambda a: np.pad(a, (0, most - len(a)))
    stacked = [
        np.stack([pad(p[i]) if i < 2 else p[i] for _, p in layers]) for i in range(3)
    ]
    x = activations(4, D_OUT)
    step = lambda x, packed: (native.csr_matmul(x, *packed), None)
    y, _ = jax.jit(lambda x, stacked: jax.lax.scan(step, x, tuple(stacked)))(x, stacked)
    expected = x.astype(np.float64)
    for w, _ in layers:
        expected = expected @ w
    close(y, expected, 30 * np.abs(expected).max())


def test_leading_axes():
    w, packed = weights("csr")
    x = activations(6, D_IN)
    y = native.csr_matmul(x.reshape(2, 3, D_IN), *packed)
    close(y.reshape(6, -1), x @ w, np.abs(x) @ np.abs(w))
    assert native.csr_matmul(x[0], *packed).shape == (D_OUT,)


def test_nothing_retraces():
    _, packed = weights("csr")
    traced = []

    @jax.jit
    def f(x):
        traced.append(1)
        return native.csr_matmul(x, *packed)

    for seed in (1, 2):
        f(activations(3, D_IN, seed))
    assert len(traced) == 1


def test_repeated_runs_are_the_same_bits():
    """However the work is cut among threads."""
    _, packed = weights("csr", 512, 1024)
    x = activations(128, 512)
    run = jax.jit(lambda x: native.csr_matmul(x, *packed))
    first = np.asarray(run(x))
    for _ in range(5):
        np.testing.assert_array_equal(run(x), first)


def test_many_callers_at_once():
    """They share XLA's threads, and none waits for what has not begun."""
    w, packed = weights("csr", 512, 1024)
    run = jax.jit(lambda x: native.csr_matmul(x, *packed))
    x = activations(64, 512)
    expected, magnitude = x @ w, np.abs(x) @ np.abs(w)
    run(x).block_until_ready()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for y in pool.map(lambda _: np.asarray(run(x)), range(64)):
            close(y, expected, magnitude)


@functools.cache
def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("batch", "model"), axis_types=(kind,) * 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_tokens_stay_where_they_are(kind):
    """Under jit and without it, in products and in gradients; nothing is gathered."""
    w, (values, *where) = weights("csr")
    x = activations(16, D_IN)
    loss = lambda values, x: jnp.sum(native.csr_matmul(x, values, *where) ** 2)

    def both(values, x):
        y = native.csr_matmul(x, values, *where)
        return y, *jax.grad(loss, (0, 1))(values, x)

    run = jax.jit(both)
    expected, magnitude = x @ w, np.abs(x) @ np.abs(w)
    to_values = PACK["csr"](2 * x.astype(np.float64).T @ expected, w != 0)[0]
    to_x = 2 * expected @ w.T
    for axes in (("batch",), (("batch", "model"),)):
        rows = NamedSharding(mesh(kind), P(*axes))
        sharded = jax.device_put(x, rows)
        y, dvalues, dx = run(values, sharded)
        eager = native.csr_matmul(sharded, values, *where)
        assert all(a.sharding.is_equivalent_to(rows, 2) for a in (y, dx, eager))
        assert "all-gather" not in run.lower(values, sharded).compile().as_text()
        close(y, expected, magnitude)
        close(eager, expected, magnitude)
        close(dx, to_x, 10 * np.abs(to_x).max())
        close(dvalues, to_values, 10 * np.abs(to_values).max())


def test_other_shardings_are_gathered():
    """Features that are split, a number of tokens that does not divide, `shard_map`."""
    w, (values, *where) = weights("csr")
    x = activations(16, D_IN)
    f = lambda x, values: native.csr_matmul(x, values, *where)
    expected, magnitude = x @ w, np.abs(x) @ np.abs(w)
    split = NamedSharding(mesh(), P("batch", "model"))
    y = jax.jit(f)(jax.device_put(x, split), values)
    close(y, expected, magnitude)

    def uneven(x):
        return f(jax.lax.with_sharding_constraint(x[:13], split), values)

    close(jax.jit(uneven)(x), expected[:13], magnitude[:13])
    for manual in ({"batch"}, {"batch", "model"}):
        mapped = jax.shard_map(
            f,
            mesh=mesh(),
            in_specs=(P("batch"), P()),
            out_specs=P("batch"),
            axis_names=manual,
            check_vma=False,
        )
        y = jax.jit(mapped)(x, values)
        close(y, expected, magnitude)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh(), P("batch")), 2)


# ---- What is wrong -------------------------------------------------------------------


def test_wrong_structures_are_errors_and_not_read():
    _, (values, columns, offsets) = weights("csr")
    x, dy = activations(40, D_IN), activations(40, D_OUT)

    def all_three(columns, offsets):
        where = columns, offsets
        return (
            lambda: native.csr_matmul(x, values, *where),
            lambda: native.csr_matmul_transposed(dy, values, *where, D_IN),
            lambda: native.csr_sampled(x, dy, *where),
        )

    large = columns.copy()
    large[len(large) // 2] = D_IN
    before, beyond, behind = offsets.copy(), offsets.copy(), offsets.copy()
    before[0] = -1
    beyond[-1] = len(values) + 1
    behind[3] = behind[4] + 1
    wrong = [(large, offsets, "not below 130")]
    wrong += [(columns, bad, "offsets must ascend") for bad in (before, beyond, behind)]
    for c, o, message in wrong:
        for call in all_three(c, o):
            with pytest.raises(jax.errors.JaxRuntimeError, match=message):
                jax.block_until_ready(call())
    turned = columns.copy()
    turned[:2] = columns[[1, 0]]
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not ascend"):
        jax.block_until_ready(
            native.csr_matmul_transposed(dy, values, turned, offsets, D_IN)
        )


def test_wrong_arguments():
    _, (values, columns, offsets) = weights("csr")
    _, (tiles, rows, tile_offsets) = weights("tiles4")
    x, dy = activations(2, D_IN), activations(2, D_OUT)
    wrong = {
        "columns is int32": lambda: native.csr_matmul(
            x, values, columns.astype(np.int32), offsets
        ),
        "offsets is int64": lambda: native.csr_matmul(
            x, values, columns, offsets.astype(np.int64)
        ),
        "values is float32 of shape": lambda: native.csr_matmul(
            x, values[1:], columns, offsets
        ),
        "expected float32 of shape": lambda: native.tiles4_matmul(
            x, tiles[:, :3], rows, tile_offsets
        ),
        "x is bfloat16": lambda: native.csr_matmul(
            jnp.asarray(x, jnp.bfloat16), values, columns, offsets
        ),
        "a last axis of 204": lambda: native.csr_matmul_transposed(
            x, values, columns, offsets, D_IN
        ),
        "leading axes": lambda: native.csr_sampled(x[:1], dy, columns, offsets),
        "no variant 'mmx'": lambda: native.csr_matmul(
            x, values, columns, offsets, variant="mmx"
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_int8_overflow_is_an_error():
    _, (values, scale, rows, offsets) = weights("int8")
    x = jax.ShapeDtypeStruct((1, 132_105), jnp.float32)
    call = lambda x: native.int8_tiles_matmul(x, values, scale, rows, offsets)
    with pytest.raises(ValueError, match="at most 132104"):
        jax.eval_shape(call, x)
    jax.eval_shape(call, jax.ShapeDtypeStruct((1, 132_104), jnp.float32))


def test_the_environment_chooses_and_turns_off(monkeypatch):
    _, packed = weights("csr")
    x = activations(2, D_IN)
    monkeypatch.setenv("JAXSPARSE_NATIVE", "portable")
    lowered = jax.jit(lambda x: native.csr_matmul(x, *packed)).lower(x)
    assert 'variant = "portable"' in lowered.as_text()
    monkeypatch.setenv("JAXSPARSE_NATIVE", "off")
    assert not native.available()
    assert native.variants() == ()
    assert native.why_not().endswith("turned off by JAXSPARSE_NATIVE=off")
    with pytest.raises(RuntimeError, match="turned off"):
        native.csr_matmul(x, *packed)
