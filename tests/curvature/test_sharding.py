"""Sharded gradients: the numbers of one device, and neither they nor weights gathered.

One kernel is sharded along its outputs, one along its inputs so that blocks fit.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature import problems
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

M, SIZE = 6, 4
SHAPES = {"outputs": (64, 32), "inputs": (64, 32)}
SPECS = {"outputs": P(None, "x"), "inputs": P("x", None)}
EXCHANGES = r"all-gather|all-to-all|collective-permute"
kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


@functools.cache
def problem():
    """Gradients, weights, masks."""
    grads = {k: problems.values(M, *s) for k, s in SHAPES.items()}
    w = {k: problems.values(*s, seed=1) for k, s in SHAPES.items()}
    masks = jax.tree.map(lambda w: w > -0.5, w)
    return jax.tree.map(jnp.asarray, (grads, w, masks))


def sharded(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    lie = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    rows = {k: NamedSharding(mesh, P(None, *spec)) for k, spec in SPECS.items()}
    grads, w, masks = jax.tree.map(np.asarray, problem())
    put = jax.device_put
    return put(grads, rows), put(w, lie), put(masks, lie)


@jax.jit
def by_blocks(grads, w, masks):
    fisher = js.curvature.block_fisher(grads, block_size=SIZE, damping=1e-5)
    removed = jax.tree.map(jnp.logical_not, masks)
    return {
        "diagonal": js.curvature.inverse_diagonal(fisher),
        "product": js.curvature.ihvp(fisher, w),
        "update": js.curvature.eliminate(fisher, w, removed),
    }


@jax.jit
def at_once(grads, w, masks):
    fisher = js.curvature.mfac(grads, damping=1e-2)
    return {
        "diagonal": js.curvature.inverse_diagonal(fisher),
        "product": js.curvature.ihvp(fisher, w),
        "span": js.curvature.span_ihvp(fisher, jnp.ones(M)),
    }


alone = functools.cache(lambda f: f(*problem()))


def run(f, kind):
    """Results of sharded arguments, checked to lie as the weights do; and the HLO."""
    args = sharded(kind)
    compiled = f.lower(*args).compile()
    got = compiled(*args)
    for tree in got.values():
        for name, x in tree.items():
            assert x.sharding.is_equivalent_to(args[1][name].sharding, x.ndim)
    return got, compiled.as_text()


@kinds
def test_blocks_are_those_of_one_device_and_nothing_is_exchanged(kind):
    got, text = run(by_blocks, kind)
    near = functools.partial(problems.assert_near, tolerance=1e-6)
    jax.tree.map(near, got, alone(by_blocks))
    assert not re.findall(rf"{EXCHANGES}|all-reduce", text)


@kinds
def test_mfac_adds_up_its_small_matrix_and_nothing_else(kind):
    got, text = run(at_once, kind)
    expected = alone(at_once)
    jax.tree.map(lambda x, y: problems.assert_near(x, y, 1e-6), got, expected)
    assert not re.findall(EXCHANGES, text)
    added = re.findall(r"(\w+\[[\d,]*\])\S* all-reduce\(", text)
    assert set(added) <= {f"f64[{M},{M}]", f"f32[{M}]"}
    assert added


@kinds
def test_streamed_sums_lie_where_the_blocks_do_from_the_start(kind):
    grads, w, _ = sharded(kind)
    estimator = js.curvature.block_estimator(block_size=SIZE)
    start = estimator.init(w)
    update = jax.jit(estimator.update, donate_argnums=0)
    compiled = update.lower(start, grads).compile()
    assert not re.findall(rf"{EXCHANGES}|all-reduce", compiled.as_text())
    lie = [s.square.sharding for s in start.sums]
    assert not any(s.is_fully_replicated or len(s.device_set) == 1 for s in lie)
    sums = compiled(start, grads)
    for s, before in zip(sums.sums, lie, strict=True):
        assert s.square.sharding.is_equivalent_to(before, s.square.ndim)

    def finish(sums):
        fisher = estimator.finalize(sums, damping=1e-5)
        return js.curvature.inverse_diagonal(fisher)

    # Eager in one of the cases.
    diagonal = (finish if kind == AxisType.Auto else jax.jit(finish))(sums)
    near = functools.partial(problems.assert_near, tolerance=1e-6)
    jax.tree.map(near, diagonal, alone(by_blocks)["diagonal"])


def loss(params, x):
    hidden = jnp.tanh(x @ params["inputs"])
    return jnp.mean(hidden**2) + jnp.mean(x @ params["outputs"])


@functools.cache
def expected_gradients():
    x = problems.values(16, 64)
    return js.curvature.per_example_grads(loss, problem()[1], x)


@kinds
@pytest.mark.parametrize("chunk", [None, 8])
def test_gradients_lie_as_the_weights_and_as_the_data(kind, chunk):
    w, x = sharded(kind)[1], problems.values(16, 64)
    mesh = w["inputs"].sharding.mesh
    grads = functools.partial(js.curvature.per_example_grads, loss, chunk=chunk)
    expected = expected_gradients()
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    got = grads(w, jax.device_put(x, NamedSharding(mesh, P())))
    jax.tree.map(near, got, expected)
    for name, g in got.items():
        lie = NamedSharding(mesh, P(None, *SPECS[name]))
        assert g.sharding.is_equivalent_to(lie, 3)
    whole = jax.tree.map(np.asarray, problem()[1])
    whole = jax.device_put(whole, NamedSharding(mesh, P()))
    got = grads(whole, jax.device_put(x, NamedSharding(mesh, P("x"))))
    jax.tree.map(near, got, expected)
    for g in got.values():
        assert g.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 3)


@kinds
def test_a_chunk_that_does_not_divide_the_data_of_several_devices(kind):
    w, x = sharded(kind)[1], np.ones((16, 64), np.float32)
    mesh = w["inputs"].sharding.mesh
    x = jax.device_put(x, NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="chunk=5 does not divide the 16 gradients"):
        js.curvature.per_example_grads(loss, w, x, chunk=5)
