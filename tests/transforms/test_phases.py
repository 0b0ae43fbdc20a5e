"""AC/DC's phases and ISS-P's shrinkage by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import transforms


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (9, [20, 20, 5, 5, 5, 20, 20, 5, 5, 5, 5]),  # from within a sparse phase
        (12, [20, 20, 5, 5, 5, 20, 20, 5, 5, 5, 20, 20, 5, 5]),
        (11, [20, 20, 5, 5, 5, 20, 20, 5, 5, 5, 20, 5, 5]),
    ],
)
def test_phases(end, expected):
    method = transforms.acdc(0.75, begin=2, end=end, sparse=3, dense=2)
    tx = method.wrap(optax.sgd(0.1))
    params = {"w": jnp.asarray(numbers(0, 4, 5))}
    state, update = tx.init(params), jax.jit(tx.update)
    kept = []
    for t in range(len(expected)):
        updates, state = update(
            {"w": jnp.asarray(numbers([1, t], 4, 5))}, state, params
        )
        params = optax.apply_updates(params, updates)
        kept.append(int(js.masks_of(state)["w"].sum()))
        assert int(jnp.sum(params["w"] != 0)) == kept[-1]
    assert kept == expected


@pytest.mark.parametrize("factor", [0.9, 0.0])
def test_the_smallest_shrink_after_each_step(factor):
    tx = optax.chain(
        optax.sgd(0.1), transforms.soft_shrink({"kernel": 0.75}, factor=factor)
    )
    params = {"kernel": numbers(0, 6, 4), "bias": numbers(1, 4)}
    state, update = tx.init(params), jax.jit(tx.update)
    expected = params
    for t in range(3):
        grads = {"kernel": numbers([2, t], 6, 4), "bias": numbers([3, t], 4)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        moved = {k: expected[k] - 0.1 * grads[k] for k in expected}
        sizes = np.abs(moved["kernel"])
        small = sizes < np.sort(sizes.ravel())[-6]
        expected = {**moved, "kernel": np.where(small, factor, 1) * moved["kernel"]}
        for k in expected:
            np.testing.assert_allclose(params[k], expected[k], rtol=1e-5, atol=1e-7)


def test_errors():
    with pytest.raises(ValueError, match="factor"):
        transforms.soft_shrink(0.5, factor=1.5)
    with pytest.raises(ValueError, match="sparsity"):
        transforms.soft_shrink(1.5)
    with pytest.raises(ValueError, match="end"):
        transforms.acdc(0.5, begin=5, end=2, sparse=1, dense=1)
