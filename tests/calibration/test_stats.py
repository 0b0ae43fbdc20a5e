import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.conftest import compilations as compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import activation as oracle

import jaxsparse as js

N, D, EXPERTS = 64, 8, 3
c = js.calibration


@functools.cache
def rows():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((D, D))
    return np.asarray(rng.standard_normal((N, D)) @ mix + 0.5, np.float32)


@functools.cache
def routed():
    """Rows of all experts and the weight of each; the last expert gets none."""
    rng = np.random.default_rng(1)
    weight = rng.random((EXPERTS, N)) * (rng.random((EXPERTS, N)) < 0.5)
    weight[-1] = 0
    return np.stack([rows(), 2 * rows(), rows()]), weight.astype(np.float32)


def collect(parts, weights=None, batch=(), gram=True, dtype=jnp.float32):
    state = c.init(batch, parts[0].shape[-1], gram=gram, dtype=dtype)
    for part, w in zip(parts, weights or itertools.repeat(None), strict=False):
        state = c.update(state, part, w)
    return state


def assert_close(stats, expected, rtol=2e-5):
    for got, wanted in zip(stats, expected, strict=True):
        scale = np.abs(wanted).max(initial=0)
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * scale)


def test_they_are_the_moments_of_the_rows():
    stats = c.finalize(collect([rows()]))
    assert_close(stats, oracle.weighted(rows()))
    # No more is promised: XLA may compute both halves of a product.
    gram = np.asarray(stats.gram)
    np.testing.assert_allclose(gram, gram.T, rtol=0, atol=1e-6 * abs(gram).max())


def test_rows_count_by_their_weights_and_experts_apart():
    x, w = routed()
    stats = c.finalize(collect([x], [w], batch=(EXPERTS,)))
    for e in range(EXPERTS):
        assert_close(
            [np.asarray(leaf)[e] for leaf in stats], oracle.weighted(x[e], w[e])
        )


def test_a_weight_of_an_integer_is_that_many_copies():
    times = np.tile([0, 2, 1, 1], N // 4)  # as many copies as there are rows
    weighted = c.finalize(collect([rows()], [times.astype(np.float32)]))
    assert_close(weighted, c.finalize(collect([np.repeat(rows(), times, axis=0)])))


def test_an_expert_that_saw_nothing_has_zeros_and_is_named():
    x, w = routed()
    stats = c.finalize(collect([x], [w], batch=(EXPERTS,)))
    for leaf in stats:
        assert not np.asarray(leaf)[-1].any()
        assert np.isfinite(leaf).all()
    view = js.tree.matrix_view((EXPERTS, D, 4), js.Axes((1,), (2,), batch=(0,)))
    plain = js.tree.matrix_view((D, 4), js.Axes((0,), (1,)))
    known = {"routed": stats, "all": c.finalize(collect([rows()]))}
    kernels = (("up", "routed", view), ("gate", "routed", view), ("q", "all", plain))
    assert c.unseen(c.Statistics(known, kernels)) == {"up": 1, "gate": 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_in_a_row_of_weight_0_does_not_matter(bad):
    x = rows().copy()
    x[::2] = bad
    w = (np.arange(N) % 2).astype(np.float32)
    assert_close(c.finalize(collect([x], [w])), oracle.weighted(rows()[1::2]))


def test_a_nan_that_counts_is_not_hidden():
    x = rows().copy()
    x[3, 2] = np.nan
    stats = c.finalize(collect([x]))
    assert np.isnan(np.asarray(stats.mean)[2])
    assert np.isnan(np.asarray(stats.square)[2])


def test_weights_may_broadcast():
    x, _ = routed()
    by_expert = np.array([[1.0], [0.0], [2.0]], np.float32)
    stats = c.finalize(collect([x], [by_expert], batch=(EXPERTS,)))
    np.testing.assert_array_equal(stats.count, [N, 0, 2 * N])
    w = np.linspace(0, 1, N, dtype=np.float32)
    stats = c.finalize(collect([x], [w], batch=(EXPERTS,)))
    one = [np.asarray(leaf)[1] for leaf in stats]
    assert_close(one, oracle.weighted(x[1], w))


@pytest.mark.parametrize("chunks", [1, 8, 64])
def test_a_mean_10000_times_the_spread_cancels_nothing(chunks):
    offset = 1e4 * np.linspace(-1, 1, D)
    x = (np.tile(rows(), (8, 1)) + offset).astype(np.float32)
    stats = c.finalize(collect(np.split(x, chunks)))
    _, mean, square, variance, gram = oracle.weighted(x)
    # E[x^2] - E[x]^2 in float32 is off by several times the variance here.
    np.testing.assert_allclose(stats.variance, variance, rtol=1e-3)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(stats.square, square, rtol=1e-6)
    np.testing.assert_allclose(stats.gram, gram, rtol=1e-6)


def test_an_input_that_is_always_0_is_exactly_0():
    x = rows().copy()
    x[:, 3] = 0
    stats = c.finalize(collect(np.split(x, 8)))
    stats = stats._replace(gram=np.asarray(stats.gram))
    for leaf in (stats.mean, stats.square, stats.variance, stats.gram[3]):
        assert np.asarray(leaf)[3] == 0
    assert not np.any(stats.gram[:, 3])


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.permutations(range(8)))
def test_chunks_may_come_in_any_order_and_be_merged_in_any_tree(tree, order):
    parts = np.split(rows(), 8)
    states = [collect([parts[i]]) for i in order]
    for turn in tree:
        if len(states) > 1:
            i = turn % (len(states) - 1)
            states[i : i + 2] = [c.merge(states[i], states[i + 1])]
    merged = functools.reduce(c.merge, states)
    assert_close(c.finalize(merged), oracle.weighted(rows()))


def test_merging_is_associative_and_nothing_is_neutral_bit_for_bit():
    x, w = routed()
    cut = [slice(i, i + 16) for i in (0, 16, 32)]
    a, b, d = (collect([x[:, s]], [w[:, s]], batch=(EXPERTS,)) for s in cut)
    left, right = c.merge(c.merge(a, b), d), c.merge(a, c.merge(b, d))
    assert_close(left, right, rtol=1e-5)
    assert_close(c.merge(a, b), c.merge(b, a), rtol=1e-5)
    empty = c.init((EXPERTS,), D, gram=True)
    for merged in (c.merge(a, empty), c.merge(empty, a)):
        jax.tree.map(np.testing.assert_array_equal, merged, a)


def test_rows_in_another_order_are_the_same_rows():
    order = np.random.default_rng(2).permutation(N)
    permuted = c.finalize(collect([rows()[order]]))
    assert_close(permuted, c.finalize(collect([rows()])), rtol=1e-5)


def test_no_rows_change_nothing():
    state = collect([rows()])
    more = c.update(state, np.zeros((0, D), np.float32))
    jax.tree.map(np.testing.assert_array_equal, more, state)


def test_bf16_rows_are_counted_in_float32():
    x = rows().astype(jnp.bfloat16)
    stats = c.finalize(collect([x]))
    assert {leaf.dtype for leaf in stats} == {jnp.dtype("float32")}
    assert_close(stats, oracle.weighted(x.astype(np.float32)))


@pytest.mark.usefixtures("x64")
def test_float64_rows_are_counted_in_float64():
    x = rows().astype(np.float64) + 1e4 + 1e-9 * np.arange(D)
    w = np.linspace(0, 1, N)
    stats = c.finalize(collect(np.split(x, 4), np.split(w, 4), dtype=jnp.float64))
    assert {leaf.dtype for leaf in stats} == {jnp.dtype("float64")}
    assert_close(stats, oracle.weighted(x, w), rtol=1e-11)


def test_without_gram_the_rest_is_the_same():
    light, full = (c.finalize(collect([rows()], gram=g)) for g in (False, True))
    assert light.gram is None
    assert_close(light[:4], full[:4], rtol=1e-6)


def test_jitted_and_mapped_it_is_the_same_and_does_not_compile_again(compilations):
    x, w = routed()
    step = jax.jit(lambda state, x, w: c.finalize(c.update(state, x, w)))
    state = c.init((EXPERTS,), D, gram=True)
    expected = c.finalize(c.update(state, x, w))
    assert_close(step(state, x, w), expected, rtol=1e-5)
    one = lambda x, w: c.finalize(c.update(c.init((), D, gram=True), x, w))
    assert_close(jax.vmap(one)(x, w), expected, rtol=1e-5)
    with compilations() as found:
        step(state, x + 1, w)
        c.finalize(c.merge(c.update(state, x + 1, w), state))
        c.finalize(c.merge(c.update(state, x + 2, w), state))
    assert found.of("_update") == 0
    assert found.of("_finalize") == 0
    assert found.of("_merge") <= 1


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["rows", "inputs"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_rows_have_the_statistics_of_all(kind, spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    x = jax.device_put(rows(), NamedSharding(mesh, spec))
    w = np.linspace(0, 1, N, dtype=np.float32)
    state = c.init((), D, gram=True)
    stats = c.finalize(c.update(c.update(state, x), x, w))
    twice = np.concatenate([rows(), rows()])
    assert_close(stats, oracle.weighted(twice, np.concatenate([np.ones(N), w])))


def test_axes_name_each_kernel_and_no_other():
    plain = js.tree.matrix_view((D, 4), js.Axes((0,), (1,)))
    out = js.tree.matrix_view((2, 4, D), js.Axes((0, 1), (2,)))
    stats = c.Statistics({}, (("a", "x", plain), ("a/b.c", "x", out)))
    params = {"a": {"b.c": np.ones((2, 4, D))}, "aa": {"bxc": np.ones((4, 4))}}
    found = js.tree.resolve_axes(params, {k: stats.axes[k] for k in [r"^a/b\.c$"]})
    assert found == {"a/b.c": js.Axes((0, 1), (2,))}


@pytest.mark.parametrize(
    ("shape", "split", "axes", "expected"),
    [
        ((4, 2, 8), (4, 2, 2, 4), js.Axes((0, 1), (3,), (2,)), ((0, 1), (2,))),
        ((4, 1, 8), (4, 1, 8, 1), js.Axes((0, 1), (3,), (2,)), ((0, 1), (2,))),
        ((1, 1, 1), (1, 1, 1, 1), js.Axes((0, 1), (3,), (2,)), ((0, 1), (2,))),
        ((8, 6), (2, 4, 6), js.Axes((0, 1), (2,)), ((0,), (1,))),
        ((8, 6), (2, 4, 6), js.Axes((1,), (2,), (0,)), None),
        ((8, 6), (2, 4, 6), js.Axes((1,), (0, 2)), None),
    ],
    ids=["groups", "depthwise", "ones", "inputs", "batch in input", "output in input"],
)
def test_a_view_that_splits_has_the_axes_that_say_the_same(
    shape, split, axes, expected
):
    view = js.tree.matrix_view(shape, axes, split=split)
    found = c.Statistics({}, (("w", "x", view),)).axes
    assert found == ({} if expected is None else {"^w$": js.Axes(*expected)})


def test_statistics_are_a_tree():
    plain = js.tree.matrix_view((D, 4), js.Axes((0,), (1,)))
    stats = c.Statistics({"x": c.finalize(collect([rows()]))}, (("k", "x", plain),))
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(stats)
    mean = np.asarray(stats.of("k").mean)
    np.testing.assert_array_equal(doubled.of("k").mean, 2 * mean)
    assert doubled.view("k") == plain
    with pytest.raises(KeyError, match=r"no statistics of 'j'.*\['k'\]"):
        stats.of("j")


# Gradients.


@pytest.mark.parametrize("order", [1, 2])
def test_gradient_norms_are_over_examples_of_all_batches(order):
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((12, 4, 2)).astype(np.float32)
    expected = oracle.gradient_norms(grads, order)
    whole = c.gradient_norms({"w": jnp.asarray(grads), "bias": None}, order=order)
    assert whole["bias"] is None
    parts = ({"w": jnp.asarray(g), "bias": None} for g in np.split(grads, [5, 10]))
    streamed = c.gradient_norms(parts, order=order)
    for norms in (whole, streamed):
        np.testing.assert_allclose(norms["w"], expected, rtol=1e-6)


def test_gradient_norms_of_a_stream_of_gradients():
    loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2) / 2
    params = {"w": jnp.asarray(np.ones((2, 1), np.float32))}
    batches = np.array([[[1, 0], [1, 2]], [[-1, 1], [0, 1]]], np.float32)
    stream = js.curvature.stream_grads(loss, params, list(batches))
    norms = c.gradient_norms(stream, order=1)
    np.testing.assert_allclose(norms["w"], [[1 + 3 + 0 + 0], [0 + 6 + 0 + 1]])


def test_many_small_bf16_gradients_do_not_stall():
    grads = {"w": jnp.asarray(np.full((4096, 1), 1e-3), jnp.bfloat16)}
    norms = c.gradient_norms(grads, order=1)
    assert norms["w"].dtype == jnp.float32
    np.testing.assert_allclose(norms["w"], 4.096, rtol=4e-3)


# Bad input.


def test_rows_of_another_shape_are_refused():
    state = c.init((EXPERTS,), D, gram=False)
    fits = r"\[3, n, 8\].*x.reshape\(3, -1, 8\)"
    for shape in [(N, D), (2, N, D), (EXPERTS, N, D + 1), (EXPERTS, 2, N, D)]:
        with pytest.raises(ValueError, match=fits):
            c.update(state, np.ones(shape, np.float32))


def test_rows_that_are_no_numbers_of_that_type_are_refused():
    state = c.init((), D, gram=False)
    with pytest.raises(TypeError, match="floating-point numbers, got int32"):
        c.update(state, np.ones((N, D), np.int32))
    with pytest.raises(TypeError, match=r"init\(..., dtype=float64\)"):
        c.update(state, np.ones((N, D)))


def test_weights_of_another_shape_or_sign_are_refused():
    state = c.init((), D, gram=False)
    x = rows()
    for shape in [(N - 1,), (N, D), (2, N)]:
        with pytest.raises(ValueError, match=r"Weights of shape .* \(64,\)"):
            c.update(state, x, np.ones(shape, np.float32))
    for bad in (-1.0, np.nan):
        w = np.where(np.arange(N) == 3, bad, 1).astype(np.float32)
        with pytest.raises(ValueError, match="at least 0; the least is"):
            c.update(state, x, w)


def test_statistics_that_do_not_belong_together_are_refused():
    plain = c.init((), D, gram=False)
    with pytest.raises(ValueError, match="same `gram`"):
        c.merge(plain, c.init((), D, gram=True))
    with pytest.raises(ValueError, match=r"\(8,\) and \(9,\) cannot be merged"):
        c.merge(plain, c.init((), D + 1, gram=False))


def test_bad_sizes_and_types_are_refused():
    with pytest.raises(ValueError, match="d_in must be at least 1"):
        c.init((), 0, gram=False)
    with pytest.raises(TypeError, match="batch must be an integer"):
        c.init((2.0,), 3, gram=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="float32 or float64"):
        c.init((), 3, gram=False, dtype=jnp.bfloat16)


@pytest.mark.parametrize("order", [0, 3, True, "1"])
def test_another_order_is_refused(order):
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        c.gradient_norms({"w": np.ones((2, 2))}, order=order)


def test_gradients_that_are_none_or_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"no gradients\. Was the iterator"):
        c.gradient_norms(iter([]), order=1)
    with pytest.raises(ValueError, match="no leaves"):
        c.gradient_norms({"w": None}, order=1)
    with pytest.raises(ValueError, match="w: gradients are"):
        c.gradient_norms({"w": jnp.asarray(np.ones(()))}, order=1)
    ones = jnp.asarray(np.ones((2, 2), np.float32))
    stream = iter([{"w": ones}, {"v": ones}])
    with pytest.raises(ValueError, match="grads must have exactly the structure"):
        c.gradient_norms(stream, order=1)
