"""Whether statistics are those of the rows that a kernel really meets.

A contraction is linear in its kernel. So for any change D of the kernel, however the
program reshapes, cuts and joins it, the outputs change by a sum of squares of
`sum_b n_b tr(D_b G_b D_b^T)`, with D_b the change of its matrices and G_b the gram of
their inputs. One wrong column, row or axis, and that fails.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxsparse as js


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ones(*shape):
    return np.ones(shape, np.float32)


def conv(x, w, **options):
    dims = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, w, dimension_numbers=dims, **options)


def scanned(w, x):
    """Each layer's output, with inputs that do not depend on the kernel."""
    return lax.scan(lambda c, wi: (jnp.tanh(c) + 1, c @ wi), x, w)[1]


def looped(w, x):
    return [jnp.tanh(i * x) @ w[i] for i in range(3)]


def recurrent(w, x):
    return lax.scan(lambda c, _: (jnp.sin(c), c @ w), x, None, length=4)[1]


def while_loop(w, x):
    start = (0, x, jnp.zeros((4, 10, 6)))
    turn = lambda s: (s[0] + 1, jnp.sin(s[1]), s[2].at[s[0]].set(s[1] @ w))
    return lax.while_loop(lambda s: s[0] < 4, turn, start)[2]


def nested(w, x):
    """Two stacked axes, two scans."""
    inner = lambda c, wi: (jnp.cos(c), c @ wi)
    return lax.scan(lambda c, wo: lax.scan(inner, c, wo), x, w)[1]


def ragged(w, x):
    return lax.ragged_dot(x, w, jnp.array([3, 0, 7], jnp.int32))


def ragged_torch(w, x):
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return lax.ragged_dot_general(x, w, jnp.array([3, 0, 7], jnp.int32), numbers)


def torch_layout(w, x):
    return lax.conv_general_dilated(
        x, w, (2, 1), ((1, 2), (0, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


X, IMAGE = normal(1, 10, 8), normal(1, 2, 7, 6, 8)
CASES = {
    # name: kernel, input, function, shape of the view, its axes (input, output, batch)
    "dense": ((8, 6), X, lambda w, x: x @ w, None, ((0,), (1,), ())),
    "torch": ((6, 8), X, lambda w, x: x @ w.T, None, ((1,), (0,), ())),
    "kernel_first": ((6, 8), X, lambda w, x: w @ x.T, None, ((1,), (0,), ())),
    "vector": ((8,), X, lambda w, x: x @ w, None, ((0,), (), ())),
    "query": (
        (8, 3, 2),
        X,
        lambda w, x: x @ w.reshape(8, 6),
        None,
        ((0,), (1, 2), ()),
    ),
    "out": (
        (4, 2, 6),
        normal(1, 10, 4, 2),
        lambda w, x: jnp.einsum("thk,hkd->td", x, w),
        None,
        ((0, 1), (2,), ()),
    ),
    "out_swapped": (
        (2, 4, 6),
        normal(1, 10, 4, 2),
        lambda w, x: jnp.einsum("thk,khd->td", x, w),
        None,
        ((0, 1), (2,), ()),
    ),
    "fused_in_one_axis": (
        (6, 8),
        normal(1, 10, 4, 2),
        lambda w, x: (
            x.transpose(0, 2, 1).reshape(10, 8) @ w.T.reshape(2, 4, 6).reshape(8, 6)
        ),
        None,
        ((1,), (0,), ()),
    ),
    "split_axis": (
        (8, 6),
        X,
        lambda w, x: jnp.einsum(
            "tgi,gio->tgo", x.reshape(10, 2, 4), w.reshape(2, 4, 6)
        ),
        (2, 4, 6),
        ((1,), (2,), (0,)),
    ),
    "experts": (
        (3, 8, 6),
        normal(1, 3, 10, 8),
        lambda w, x: jnp.einsum("etd,edf->tef", x, w),
        None,
        ((1,), (2,), (0,)),
    ),
    "experts_all": (
        (3, 8, 6),
        X,
        lambda w, x: jax.vmap(lambda k: x @ k)(w),
        None,
        ((1,), (0, 2), ()),
    ),
    "ragged": ((3, 8, 6), X, ragged, None, ((1,), (2,), (0,))),
    "ragged_torch": ((3, 8, 8), X, ragged_torch, None, ((2,), (1,), (0,))),
    "mask_and_scale": (
        (8, 6),
        X,
        lambda w, x: x @ (w * 2.0 * jnp.ones((8, 6))),
        None,
        ((0,), (1,), ()),
    ),
    "cast": (
        (8, 6),
        X,
        lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
        None,
        ((0,), (1,), ()),
    ),
    "slices": (
        (8, 6),
        X,
        lambda w, x: [x @ w[:, :2], x @ w[:, 2:5], x @ w[:, 5:]],
        None,
        ((0,), (1,), ()),
    ),
    "joined": (
        (8, 6),
        X,
        lambda w, x: x @ jnp.concatenate([w, jnp.zeros((8, 3))], 1),
        None,
        ((0,), (1,), ()),
    ),
    "joined_inputs": (
        (8, 6),
        X,
        lambda w, x: (
            jnp.concatenate([x[:, :3], x], 1)
            @ jnp.concatenate([jnp.zeros((3, 6)), w], 0)
        ),
        None,
        ((0,), (1,), ()),
    ),
    "tied": (
        (8, 6),
        X,
        lambda w, x: [x @ w, jnp.tanh(x) @ w, normal(2, 5, 8) * x[:5] @ w],
        None,
        ((0,), (1,), ()),
    ),
    "conv": ((3, 3, 8, 5), IMAGE, lambda w, x: conv(x, w), None, ((0, 1, 2), (3,), ())),
    "conv_dilated": (
        (3, 2, 8, 5),
        IMAGE,
        lambda w, x: conv(x, w, window_strides=(2, 1), rhs_dilation=(1, 2)),
        None,
        ((0, 1, 2), (3,), ()),
    ),
    "conv_transposed": (
        (3, 3, 8, 5),
        IMAGE,
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME"),
        None,
        ((0, 1, 2), (3,), ()),
    ),
    "conv_torch": ((5, 7, 3, 2), IMAGE, torch_layout, None, ((1, 2, 3), (0,), ())),
    "depthwise": (
        (3, 3, 1, 16),
        IMAGE,
        lambda w, x: conv(x, w, feature_group_count=8),
        (3, 3, 1, 8, 2),
        ((0, 1, 2), (4,), (3,)),
    ),
    "grouped": (
        (1, 3, 2, 12),
        IMAGE,
        lambda w, x: conv(x, w, feature_group_count=4),
        (1, 3, 2, 4, 3),
        ((0, 1, 2), (4,), (3,)),
    ),
    "scanned": ((3, 8, 6), X, scanned, None, ((1,), (2,), (0,))),
    "looped": ((3, 8, 6), X, looped, None, ((1,), (2,), (0,))),
    "unstacked": (
        (3, 8, 6),
        X,
        lambda w, x: [jnp.tanh(i * x) @ v for i, v in enumerate(jnp.unstack(w))],
        None,
        ((1,), (2,), (0,)),
    ),
    "nested": ((2, 3, 8, 6), X, nested, None, ((2,), (3,), (0, 1))),
    "recurrent": ((8, 6), X, recurrent, None, ((0,), (1,), ())),
    "while": ((8, 6), X, while_loop, None, ((0,), (1,), ())),
    "remat": (
        (8, 6),
        X,
        jax.checkpoint(jax.jit(lambda w, x: jax.nn.relu(x) @ w)),
        None,
        ((0,), (1,), ()),
    ),
    "cond": (
        (8, 6),
        X,
        lambda w, x: lax.cond(x[0, 0] > 9, lambda: x @ w, lambda: (2 * x) @ w),
        None,
        ((0,), (1,), ()),
    ),
}


# Some groups of the ragged ones are empty.
@pytest.mark.filterwarnings("ignore:.*no row reached it")
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_rows_it_meets(name):
    shape, x, f, split, axes = CASES[name]
    w, change = normal(3, *shape), normal(4, *shape)
    apply_fn = lambda params, x: f(params["w"], x)
    trace = js.trace(apply_fn, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, x)
    assert not trace.unfollowed
    view = trace.kernels["w"].view
    assert view.split == (split or shape)
    assert view.axes == js.Axes(*axes)

    stats = js.calibration.run(trace, {"w": w}, [x], where="w")
    one = stats.of("w")
    run = jax.jit(lambda w: jax.tree.leaves(f(w, x)))
    before, after = jax.device_get([run(w), run(w + change)])
    seen = sum(np.sum((b - a) ** 2) for a, b in zip(before, after, strict=True))
    if name == "cast":  # what the change is after rounding
        cut = lambda v: v.astype(jnp.bfloat16).astype(np.float32)
        change = cut(w + change) - cut(w)
    matrices = js.tree.to_matrices(change, stats.view("w"))
    predicted = np.einsum(
        "...,...oi,...ij,...oj->...", one.count, matrices, one.gram, matrices
    ).sum()
    np.testing.assert_allclose(
        seen, predicted * (4 if name == "mask_and_scale" else 1), rtol=1e-4
    )
    if name == "mask_and_scale":
        assert trace.kernels["w"].via == ("mul",)


@pytest.mark.parametrize("name", ["dense", "conv", "tied", "experts"])
def test_flops_are_two_for_each_multiplication(name):
    shape, x, f, *_ = CASES[name]
    trace = js.trace(lambda p, x: f(p["w"], x), {"w": ones(*shape)}, x)
    rows = {"dense": 10, "conv": 84, "tied": 25, "experts": 10}[name]
    assert trace.flops == 2 * rows * int(np.prod(shape))


def test_joined_kernels_share_the_flops():
    params = {"a": ones(8, 6), "b": ones(8, 2), "s": ones(3, 8, 4)}

    def apply_fn(p, x):
        joined = x @ jnp.concatenate([p["a"], p["b"]], 1)
        return joined, lax.scan(lambda c, w: (c, c @ w), x, p["s"])[1]

    kernels = js.trace(apply_fn, params, X).kernels
    assert {k: v.flops for k, v in kernels.items()} == {"a": 960, "b": 320, "s": 1920}


def test_kernels_that_read_the_same_numbers_share_an_input():
    params = {k: ones(8, 6) for k in "qkvo"}

    def apply_fn(p, x):
        # Reshaped and cast by each of them, as layers of a library do.
        read = lambda w: x.reshape(-1, 8).astype(jnp.float32) @ w
        return read(p["q"]) + read(p["k"]) + read(p["v"]) + jnp.tanh(x) @ p["o"]

    kernels = js.trace(apply_fn, params, X).kernels
    assert [kernels[k].input for k in "qkvo"] == ["q", "q", "q", "o"]
    assert list(kernels) == ["q", "k", "v", "o"]
    assert "test_kernels.py" in kernels["q"].sources[0]


UNFOLLOWED = {
    "parts of its inputs": lambda w, x: x[:, :3] @ w[:3] + x[:, 3:] @ w[3:],
    "parts both ways": lambda w, x: jnp.tanh(x[:, :4]) @ w[:4, :4] + (x @ w)[:, 4:],
    "in two ways": lambda w, x: (x @ w) @ w.T,
    "a product with another parameter": lambda w, x: x @ (w @ jnp.ones((8, 8))),
    "elementwise": lambda w, x: jnp.max(x[:, :, None] * w[None], 1),
    "a sum of more": lambda w, x: jnp.sum(jnp.tanh(x[:, :, None] * w[None]), 1),
    "a traced index": lambda w, x: lax.fori_loop(
        0,
        jnp.argmax(x[0]),
        lambda i, c: c @ w.reshape(2, 4, 8)[i].T @ jnp.ones((4, 8)),
        x,
    ),
    "made complex": lambda w, x: (lax.complex(x, x) @ lax.complex(w, w)).real,
    "an unknown primitive": lambda w, x: x @ jnp.linalg.qr(w)[0],
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_what_it_cannot_follow_it_says(name):
    f = UNFOLLOWED[name]
    params = {"some/w": ones(8, 8)}
    trace = js.trace(lambda p, x: f(p["some/w"], x), params, X)
    assert not trace.kernels
    (lost,) = {u.paths for u in trace.unfollowed}
    assert lost == ("some/w",)
    reason = trace.unfollowed[0].reason
    assert "some/w" in reason
    assert "test_kernels.py" in reason
    assert "by hand" in reason
    with pytest.raises(ValueError, match=r"None of the selected.*some/w"):
        js.calibration.run(trace, params, [X])


def test_what_is_looked_up_is_no_kernel():
    params = {"w": ones(8, 6), "expert": ones(3, 8, 6), "at": ones(9, 8)}

    def apply_fn(p, x):
        x = x + p["at"][np.arange(len(x)) % 9]
        mine = p["expert"][jnp.argmax(x[:, :3], 1)]
        return x @ p["w"] + jnp.einsum("td,tdf->tf", x, mine)

    trace = js.trace(apply_fn, params, X)
    assert list(trace.kernels) == ["w"]
    assert set(trace.lookups) == {"at", "expert"}
    assert not trace.unfollowed
    assert js.calibration.run(trace, params, [X]).paths == ("w",)
    with pytest.raises(
        ValueError, match=r"expert is selected.*looked up at .*test_ker"
    ):
        js.calibration.run(trace, params, [X], where="expert|w")


def test_a_foreign_primitive_is_described_by_an_equation():
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    foreign = Primitive("their_matmul")
    foreign.def_abstract_eval(
        lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[0]), x.dtype)
    )
    foreign.def_impl(lambda x, w: x @ w.T)
    lower = mlir.lower_fun(lambda x, w: x @ w.T, multiple_results=False)
    mlir.register_lowering(foreign, lower)
    apply_fn = lambda p, x: foreign.bind(x, p["w"])
    params = {"w": normal(3, 6, 8)}
    lost = js.trace(apply_fn, params, X).unfollowed[0]
    assert (lost.primitive, lost.paths) == ("their_matmul", ("w",))
    assert "rules={'their_matmul'" in lost.reason

    trace = js.trace(apply_fn, params, X, rules={"their_matmul": "ti,oi->to"})
    assert trace.kernels["w"].view.axes == js.Axes(input=(1,), output=(0,))
    gram = js.calibration.run(trace, params, [X]).of("w").gram
    np.testing.assert_allclose(gram, X.T @ X / 10, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="does not fit"):
        js.trace(apply_fn, params, X, rules={"their_matmul": "ti,boi->to"})


def test_samples_are_weighted_wherever_their_rows_went():
    w = {"a": normal(3, 3, 3, 8, 5), "b": normal(4, 5, 4)}
    apply_fn = lambda p, x: (
        conv(x, p["a"]).transpose(1, 0, 2, 3).reshape(-1, 5) @ p["b"]
    )
    trace = js.trace(apply_fn, w, IMAGE)
    twice = np.concatenate([IMAGE, IMAGE[1:], IMAGE[1:]])
    by_hand = js.calibration.run(trace, w, [twice])
    weighted = js.calibration.run(
        trace, w, [IMAGE], weight=lambda x: np.array([1, 3], np.float32)
    )
    for path in w:
        a, b = by_hand.of(path), weighted.of(path)
        np.testing.assert_allclose(a.count, b.count)
        np.testing.assert_allclose(a.gram, b.gram, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a.variance, b.variance, rtol=1e-4, atol=1e-5)
    mixed = js.trace(lambda p, x: x.sum(0).reshape(-1, 8) @ p, normal(3, 8, 2), IMAGE)
    with pytest.raises(ValueError, match="one sample"):
        js.calibration.run(
            mixed, normal(3, 8, 2), [IMAGE], weight=lambda x: ones(2), where=""
        )


def test_each_expert_counts_its_own_tokens():
    params = {"router": normal(2, 8, 4), "expert": normal(3, 4, 8, 6)}

    def apply_fn(p, x):  # the fourth expert gets nothing
        at = jnp.argmax((x @ p["router"])[:, :3], 1)
        sent = jax.nn.one_hot(at, 4).T[:, :, None] * x[None]
        return jnp.einsum("etd,edf->etf", sent, p["expert"])

    trace = js.trace(apply_fn, params, X)
    with pytest.warns(
        UserWarning, match=r"^expert \(batch index .*3\): no row reached"
    ):
        stats = js.calibration.run(trace, params, [X])
    mine = np.argmax((X @ params["router"])[:, :3], 1)
    found = stats.of("expert")
    np.testing.assert_array_equal(found.count, [np.sum(mine == e) for e in range(4)])
    own = X[mine == mine[0]]
    np.testing.assert_allclose(found.gram[mine[0]], own.T @ own / len(own), rtol=1e-4)
    assert js.calibration.unseen(stats)["expert"] >= 1
    assert np.all(np.isfinite(found.gram))


def test_a_trace_is_made_anew_for_batches_of_another_shape():
    params = {"w": normal(3, 8, 6)}
    trace = js.trace(lambda p, x: x @ p["w"], params, X)
    whole = js.calibration.run(trace, params, [X]).of("w")
    parts = js.calibration.run(trace, params, [X[:7], X[7:]], host=True).of("w")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)
    with pytest.raises(ValueError, match="w: traced with shape"):
        js.calibration.run(trace, {"w": ones(9, 6)}, [X])
    with pytest.raises(ValueError, match="there are none"):
        js.calibration.run(trace, params, [])
