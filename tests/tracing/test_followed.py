"""Kernels that are reversed, sliced by a counter, summed by hand or read in parts.

As in `test_kernels.py`: a contraction is linear in its kernel, so the outputs change by
what the statistics say, if every row and column is where it belongs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxsparse as js


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(0, 10, 8)
IMAGE = normal(1, 2, 5, 5, 4)


def turned(w, x):
    """A transposed convolution, which flips its window."""
    layout = ("NHWC", "HWIO", "NHWC")
    options = {"transpose_kernel": True, "dimension_numbers": layout}
    return lax.conv_transpose(x, w, (2, 2), "SAME", **options)


def indexed(w, x):
    """`w[i]` in a loop that counts."""
    keep = lambda i, out: out.at[i].set(jnp.tanh(i * x) @ w[i])
    return lax.fori_loop(0, 3, keep, jnp.zeros((3, 10, 6)))


def backwards(w, x):
    turn = lambda i, _: (i + 1, jnp.tanh((i + 1.0) * x) @ w[2 - i])
    return lax.scan(turn, 0, None, length=3)[1]


def in_pieces(w, x):
    """Pieces of an axis by their first index."""
    cut = lambda i: lax.dynamic_slice(w, (0, 2 * i), (8, 2))
    return lax.scan(lambda i, _: (i + 1, jnp.sin(i + x) @ cut(i)), 0, length=3)[1]


def twice_indexed(w, x):
    """The inner loop's index is taken first."""
    inner = lambda i: lambda j, _: (j + 1, jnp.cos(x + i + 2 * j) @ w[:, j][i])
    outer = lambda i, _: (i + 1, lax.scan(inner(i), 0, length=2)[1])
    return lax.scan(outer, 0, length=3)[1]


def gated(w, x):
    """A cell that slices its kernel; the state does not depend on it here."""

    def cell(h, turn):
        first = h @ w[:, :4]
        return jnp.sin(h), (first, (turn * h) @ w[:, 4:])

    return lax.scan(cell, x, jnp.arange(1.0, 4.0))[1]


def recurrent(p, x):
    turn = lambda h, x: (jnp.tanh(x @ p["in"] + h @ p["state"]), None)
    return lax.scan(turn, x[0], x)[0]


def gated_layers(w, x):
    layer = lambda c, wi: (jnp.sin(c), (c @ wi[:, :4], jnp.tanh(c) @ wi[:, 4:]))
    return lax.scan(layer, x, w)[1]


CASES = {
    "an axis of many pieces": (
        (80, 2),
        normal(2, 10, 80),
        lambda w, x: x @ w[::-1],
        (80, 2),
        ((0,), (1,), ()),
    ),
    "reversed": ((8, 6), X, lambda w, x: x @ w[::-1, ::-1], (8, 6), ((0,), (1,), ())),
    "a transposed convolution": (
        (3, 3, 6, 4),
        IMAGE,
        turned,
        (3, 3, 6, 4),
        ((0, 1, 3), (2,), ()),
    ),
    "an index that counts": ((3, 8, 6), X, indexed, (3, 8, 6), ((1,), (2,), (0,))),
    "counted backwards": ((3, 8, 6), X, backwards, (3, 8, 6), ((1,), (2,), (0,))),
    "pieces of an axis": ((8, 6), X, in_pieces, (8, 3, 2), ((0,), (2,), (1,))),
    "two counters": (
        (3, 2, 8, 4),
        X,
        twice_indexed,
        (3, 2, 8, 4),
        ((2,), (3,), (0, 1)),
    ),
    "parts of the outputs": (
        (8, 6),
        X,
        lambda w, x: (x @ w[:, :4], jnp.tanh(x) @ w[:, 4:]),
        (8, 3, 2),
        ((0,), (2,), (1,)),
    ),
    "parts of the inputs": (
        (8, 6),
        X,
        lambda w, x: (x[:, :4] @ w[:4], jnp.tanh(x[:, 4:]) @ w[4:]),
        (2, 4, 6),
        ((1,), (2,), (0,)),
    ),
    "parts of both": (
        (8, 6),
        X,
        lambda w, x: (
            x[:, :4] @ w[:4],
            jnp.tanh(x[:, :4]) @ w[4:, :2],
            jnp.sin(x[:, 4:]) @ w[4:, 2:],
        ),
        (2, 4, 3, 2),
        ((1,), (3,), (0, 2)),
    ),
    "a gated cell": ((8, 6), X, gated, (8, 3, 2), ((0,), (2,), (1,))),
    "parts in layers": (
        (2, 8, 6),
        X,
        gated_layers,
        (2, 8, 3, 2),
        ((1,), (3,), (0, 2)),
    ),
    "a sum of products": (
        (2, 4),
        X,
        lambda w, x: jnp.sum(x.reshape(10, 2, 4) * w[None], -1),
        (2, 4),
        ((1,), (), (0,)),
    ),
    "a sum for each output": (
        (8, 6),
        X,
        lambda w, x: jnp.sum(x[:, :, None] * w[None], 1),
        (8, 6),
        ((0,), (1,), ()),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_rows_it_meets(name):
    shape, x, f, split, axes = CASES[name]
    w, change = normal(3, *shape), normal(4, *shape)
    apply_fn = lambda params, x: f(params["w"], x)
    trace = js.trace(apply_fn, {"w": w}, x)
    assert not trace.unfollowed
    view = trace.kernels["w"].view
    assert (view.split, view.axes) == (split, js.Axes(*axes))
    one = js.calibration.run(trace, {"w": w}, [x], where="w").of("w")
    run = jax.jit(lambda w: jax.tree.leaves(f(w, x)))
    before, after = jax.device_get([run(w), run(w + change)])
    seen = sum(np.sum((b - a) ** 2) for a, b in zip(before, after, strict=True))
    matrices = js.tree.to_matrices(change, view)
    predicted = np.einsum(
        "...,...oi,...ij,...oj->...", one.count, matrices, one.gram, matrices
    ).sum()
    np.testing.assert_allclose(seen, predicted, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("two counters", "parts in layers"),
        pytest.param("a gated cell", marks=pytest.mark.exhaustive),
        pytest.param("parts of both", marks=pytest.mark.exhaustive),
    ],
)
def test_layerwise_sees_the_same(name):
    shape, x, f, *_ = CASES[name]
    params, apply_fn = {"w": normal(3, *shape)}, lambda p, x: f(p["w"], x)
    trace = js.trace(apply_fn, params, x)
    stats = js.calibration.run(trace, params, [x])
    options = {"sparsity": 0.5, "solver": js.solvers.magnitude, "show": False}
    found = js.oneshot.layerwise(apply_fn, params, [x], **options)
    masks = js.tree.to_matrices(np.asarray(found.masks["w"]), trace.kernels["w"].view)
    w = js.tree.to_matrices(params["w"], trace.kernels["w"].view)
    lost = np.where(masks, 0, w)
    gram = np.asarray(stats.of("w").gram)
    energy = lambda v: np.einsum("...oi,...ij,...oj->...", v, gram, v)
    np.testing.assert_allclose(
        found.info["w"].relative_error, energy(lost) / energy(w), rtol=1e-4
    )


def test_kernels_of_one_loop_with_as_many_inputs_are_solved_apart():
    params = {"in": normal(1, 8, 8), "state": normal(2, 8, 8)}
    x = normal(3, 5, 4, 8)
    trace = js.trace(recurrent, params, x)
    stats = js.calibration.run(trace, params, [x])
    options = {"sparsity": 0.5, "solver": js.solvers.magnitude, "show": False}
    found = js.oneshot.layerwise(recurrent, params, [x], sequential=False, **options)
    for path, w in params.items():
        gram = np.asarray(stats.of(path).gram)
        lost = np.where(np.asarray(found.masks[path]), 0, w)
        energy = lambda v, gram=gram: np.einsum("io,ij,jo->", v, gram, v)
        expected = energy(lost) / energy(w)
        np.testing.assert_allclose(found.info[path].relative_error, expected, rtol=1e-4)


def test_a_sum_of_products_costs_what_the_contraction_does():
    params = {"up": normal(1, 8, 6), "out": normal(2, 6, 3)}
    summed = lambda p, x: jnp.sum(jnp.tanh(x @ p["up"])[:, :, None] * p["out"][None], 1)
    plain = lambda p, x: jnp.tanh(x @ p["up"]) @ p["out"]
    traces = [js.trace(f, params, X) for f in (summed, plain)]
    costs = [js.narrowing.cost(t, {"up[1]": [0, 3, 4]}) for t in traces]
    assert costs[0] == costs[1]
    assert costs[0].flops * 2 == traces[0].flops == traces[1].flops


def test_what_is_also_used_otherwise_is_no_contraction():
    def apply_fn(p, x):
        scaled = x[:, None, :] * p["w"][None]
        return scaled.sum(-1), jnp.tanh(scaled)

    trace = js.trace(apply_fn, {"w": normal(1, 4, 8)}, X)
    assert not trace.kernels
    assert trace.unfollowed[0].primitive == "mul"
