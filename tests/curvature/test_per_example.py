"""Gradients one by one: the loss of training, differentiated at each example alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature import problems

import jaxsparse as js

per_example_grads = js.curvature.per_example_grads
N = 12
ALL = np.True_
KEPT = {"a": {"kernel": ALL, "bias": ALL}, "b": {"kernel": ALL}}


def loss(params, batch):
    x, y = batch["x"], batch["y"]
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.mean((hidden @ params["b"]["kernel"] - y) ** 2)


def model(dtype=jnp.float32):
    shapes = {"a": {"kernel": (4, 5), "bias": (5,)}, "b": {"kernel": (5, 2)}}
    draw = lambda shape: jax.device_put(problems.values(*shape).astype(dtype))
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def batch(n=N):
    return {"x": problems.values(n, 4), "y": problems.values(n, 2)}


@functools.cache
def expected(average=1):
    """`jax.grad` of each group, in a loop."""
    step = jax.jit(jax.grad(loss))
    groups = range(0, N, average)
    parts = [
        step(model(), jax.tree.map(lambda x, i=i: x[i : i + average], batch()))
        for i in groups
    ]
    return jax.tree.map(lambda *gs: np.stack(gs), *parts)


def assert_grads(got, want, paths=("a", "b")):
    """To some units in the last place of the largest entry."""
    for layer in paths:
        one = want[layer]["kernel"]
        atol = 2e-6 * np.max(np.abs(one))
        np.testing.assert_allclose(got[layer]["kernel"], one, rtol=0, atol=atol)


def test_each_example_has_its_own_gradient_and_the_rest_none():
    got = per_example_grads(loss, model(), batch())
    assert got["a"]["bias"] is None  # the default selection: kernels
    assert got["b"]["kernel"].shape == (N, 5, 2)
    assert_grads(got, expected())


def test_of_mini_batches():
    got = per_example_grads(loss, model(), batch(), average=4)
    assert got["a"]["kernel"].shape == (3, 4, 5)
    assert_grads(got, expected(4))
    mean = jax.tree.map(lambda g: np.mean(g.reshape(3, 4, *g.shape[1:]), 1), expected())
    assert_grads(got, mean)


@pytest.mark.parametrize("chunk", [4, 5, 100])
def test_chunks_bound_the_memory_and_change_nothing(chunk):
    got = per_example_grads(loss, model(), batch(), chunk=chunk)
    assert_grads(got, expected())


def test_a_chunk_holds_few_activations_at_once():
    """1024 activations of each example, for 4 parameters."""

    def wide(params, x):
        return jnp.mean(jnp.tanh((x * params["w"]) @ params["apart"]))

    ones = lambda *shape: np.ones(shape, np.float32)
    params = {"w": ones(1, 4), "apart": ones(4, 1024)}
    temporary = []
    for chunk in (None, 16):
        grads = functools.partial(per_example_grads, wide, where="w", chunk=chunk)
        compiled = jax.jit(grads).lower(params, ones(256, 4)).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[0] >= 256 * 1024 * 4
    assert temporary[1] <= 5 * 16 * 1024 * 4


def test_where_takes_parameters_and_the_others_are_constants():
    got = per_example_grads(loss, model(), batch(), where="a/")
    assert got["b"]["kernel"] is None
    assert_grads(got, expected(), ["a"])
    bias = expected()["a"]["bias"]
    np.testing.assert_allclose(got["a"]["bias"], bias, rtol=1e-5, atol=1e-6)


def test_parameters_that_cannot_be_differentiated_are_left_alone():
    params = model() | {"steps": jnp.int32(3), "nothing": None}
    got = per_example_grads(loss, params, batch())
    assert got["steps"] is None
    assert got["nothing"] is None
    assert_grads(got, expected())


def test_pruned_weights_have_no_gradient():
    masks = jax.tree.map(lambda w: np.asarray(w) > 0, model())
    masks["b"]["kernel"] = np.array([[True, False]])  # it broadcasts
    got = per_example_grads(loss, model(), batch(), masks=masks)
    for layer in ("a", "b"):
        g = np.asarray(got[layer]["kernel"])
        mask = np.broadcast_to(masks[layer]["kernel"], g.shape[1:])
        np.testing.assert_array_equal(g[:, ~mask], 0)
        want = expected()[layer]["kernel"][:, mask]
        np.testing.assert_allclose(g[:, mask], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 5])
def test_stored_in_another_type(chunk):
    got = per_example_grads(loss, model(), batch(), dtype=jnp.bfloat16, chunk=chunk)
    assert got["a"]["kernel"].dtype == jnp.bfloat16
    want = expected()["a"]["kernel"].astype(jnp.bfloat16)
    got = np.asarray(got["a"]["kernel"], np.float32)
    # Both are rounded to bfloat16: at most one unit in its last place, 2^-7, apart.
    np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=2**-7, atol=1e-6)


def test_parameters_in_bf16_have_gradients_in_bf16():
    x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch())
    got = per_example_grads(loss, model(jnp.bfloat16), x)
    assert got["a"]["kernel"].dtype == jnp.bfloat16
    want = expected()["a"]["kernel"]
    error = np.asarray(got["a"]["kernel"], np.float32) - want
    assert np.max(np.abs(error)) < 0.05 * np.max(np.abs(want))


@pytest.mark.usefixtures("float16")
def test_large_gradients_of_one_sign_are_no_infinity():
    """Their sum leaves the range of float16, they do not."""
    params = {"w": np.zeros((64, 64), np.float16)}
    f = lambda params, x: jnp.mean(x) * jnp.sum(params["w"])
    got = per_example_grads(f, params, np.full(32, 100, np.float16))
    np.testing.assert_array_equal(got["w"], np.full((32, 64, 64), 100))


def test_jitted_it_is_the_same_and_other_values_do_not_compile_again(compilations):
    grads = functools.partial(per_example_grads, loss, chunk=5)
    eager = grads(model(), batch())
    turned = jax.tree.map(lambda w: -np.asarray(w), model())
    other = jax.device_put(turned), jax.tree.map(np.negative, batch())
    with compilations() as found:
        grads(*other)
    assert not found.names
    jitted = jax.jit(grads)(model(), batch())
    assert_grads(jitted, jax.tree.map(np.asarray, eager))


# Streams.


def drawn(sizes):
    """Batches of these sizes, and a list that grows with each that is taken."""
    taken = []

    def batches():
        at = 0
        for n in sizes:
            taken.append(n)
            yield jax.tree.map(lambda x, at=at, n=n: x[at : at + n], batch())
            at += n

    return batches(), taken


def test_a_stream_gives_the_gradients_of_all_batches():
    batches, _ = drawn([5, 5, 2])
    parts = list(js.curvature.stream_grads(loss, model(), batches))
    assert [g["a"]["kernel"].shape[0] for g in parts] == [5, 5, 2]
    whole = jax.tree.map(lambda *gs: np.concatenate(gs), *parts)
    assert_grads(whole, expected())


def test_a_stream_is_cut_at_the_count_and_draws_no_further_batch():
    batches, taken = drawn([5, 5, 2])
    stream = js.curvature.stream_grads(loss, model(), batches, count=7)
    parts = list(stream)
    assert [g["a"]["kernel"].shape[0] for g in parts] == [5, 2]
    assert taken == [5, 5]
    whole = jax.tree.map(lambda *gs: np.concatenate(gs), *parts)
    assert_grads(whole, jax.tree.map(lambda g: g[:7], expected()))


def test_examples_that_fill_no_group_are_left_out():
    batches, _ = drawn([5, 1, 5])
    stream = js.curvature.stream_grads(loss, model(), batches, average=2)
    assert [g["a"]["kernel"].shape[0] for g in stream] == [2, 2]


def test_collected_gradients_lie_in_the_hosts_memory():
    batches, taken = drawn([5, 5, 2])
    stream = js.curvature.stream_grads(
        loss, model(), batches, dtype=jnp.bfloat16, masks=KEPT
    )
    got = js.curvature.collect_grads(stream, count=8)
    assert isinstance(got["a"]["kernel"], np.ndarray)
    assert got["a"]["bias"] is None
    assert got["b"]["kernel"].shape == (8, 5, 2)
    assert got["b"]["kernel"].dtype == jnp.bfloat16
    assert taken == [5, 5]
    want = expected()["a"]["kernel"][:8]
    # Rounded to bfloat16: half a unit in its last place.
    np.testing.assert_allclose(
        got["a"]["kernel"].astype(np.float32), want, rtol=2**-8 + 1e-5, atol=1e-6
    )
