"""Digits: small damping beside large curvature, where single precision has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature import problems
from curvature.problems import assert_each_near, assert_near
from reference import second_order as ref

import jaxsparse as js

DAMPING = 1e-7
BLOCKS, SIZE = 3, 50


def iso(m, b, size):
    """Of each block all directions alike: the mean eigenvalue is `size^2`."""
    return size * problems.values(m, b, BLOCKS, dtype=np.float64)


def decaying(m, b, size):
    """Standard deviations from 1 to 1e-3 along directions that are no axes."""
    turn = np.linalg.qr(problems.values(b, b, dtype=np.float64))[0]
    scale = size * np.logspace(0, -3, b)
    return np.einsum("mik,i,ij->mjk", iso(m, b, 1), scale, turn)


def graded(m, b, size):
    """Every second weight has gradients 1e-4 of the others', and goes with them."""
    turn = np.eye(b) + problems.values(b, b, dtype=np.float64) / 2
    scale = size * np.where(np.arange(b) % 2, 1, 1e-4)
    return np.einsum("mik,ij,j->mjk", iso(m, b, 1), turn, scale)


# Largest eigenvalue over damping: some 1e3, 1e5, 1e7.
REGIMES = {
    "full rank, 1e3": (iso, 256, SIZE, 1e-2),
    "full rank, 1e5": (iso, 256, SIZE, 1e-1),
    "full rank, 1e7": (iso, 256, SIZE, 1.0),
    "m < b, 1e5": (iso, 24, SIZE, 1e-1),
    "m < b, 1e7": (iso, 24, SIZE, 1.0),
    "decaying spectrum": (decaying, 256, SIZE, 1e-1),
    "decaying spectrum, m near b": (decaying, 48, SIZE, 1.0),
    "small beside large": (graded, 256, SIZE, 1.0),
}
regimes = pytest.mark.parametrize("regime", REGIMES)


@functools.cache
def problem(regime):
    """Gradients in float32, and the inverse of each column's block in float64."""
    make, *sizes = REGIMES[regime]
    grads = make(*sizes).astype(np.float32)
    inverses = [inverse_of(grads[..., k]) for k in range(BLOCKS)]
    return {"w": jax.device_put(grads)}, np.stack(inverses)


def inverse_of(g):
    """From singular values: those of zero are exactly the damping."""
    g = g.astype(np.float64)
    # All right vectors; of all left ones a tall `g` would have far too many.
    _, s, rows = np.linalg.svd(g, full_matrices=g.shape[0] < g.shape[1])
    values = np.full(g.shape[1], float(np.float32(DAMPING)))
    values[: len(s)] += s**2 / len(g)
    return (rows.T / values) @ rows


@functools.cache
def fisher_of(regime):
    grads, inverses = problem(regime)
    fisher = js.curvature.block_fisher(grads, block_size=SIZE, damping=DAMPING)
    return fisher, inverses


@regimes
def test_the_diagonal_of_a_block_fisher_has_all_digits_in_every_regime(regime):
    fisher, inverses = fisher_of(regime)
    diagonal = np.asarray(js.curvature.inverse_diagonal(fisher)["w"])
    assert (diagonal > 0).all()
    expected = np.diagonal(inverses, axis1=1, axis2=2).T
    assert_each_near(diagonal, expected, 1e-6)


@regimes
def test_products_and_blocks_of_the_inverse_have_them_too(regime):
    """Of each column, relative to the diagonal: small entries are right as well."""
    fisher, inverses = fisher_of(regime)
    root = np.sqrt(np.diagonal(inverses, axis1=1, axis2=2))
    scale = root[:, :, None] * root[:, None, :]
    blocks = np.asarray(js.curvature.inverse_blocks(fisher)["w"], np.float64)
    blocks = blocks.reshape(inverses.shape)
    assert np.max(np.abs(blocks - inverses) / scale) < 1e-6
    for q in (0, 1, SIZE - 1):
        one = np.zeros((SIZE, BLOCKS), np.float32)
        one[q] = 1
        product = np.asarray(js.curvature.ihvp(fisher, {"w": one})["w"], np.float64)
        error = np.abs(product.T - inverses[..., q]) / scale[..., q]
        assert np.max(error) < 2e-6


def test_single_precision_alone_would_not_do():
    grads, _ = problem("decaying spectrum, m near b")
    damping = 10 * DAMPING  # with less it finds no factor
    fisher = js.curvature.block_fisher(
        grads, block_size=SIZE, damping=damping, accurate=False
    )
    diagonal = np.asarray(js.curvature.inverse_diagonal(fisher)["w"])
    rows = np.asarray(grads["w"], np.float64).transpose(2, 0, 1)
    inverses = [np.linalg.inv(ref.fisher(g, damping)) for g in rows]
    expected = np.diagonal(inverses, axis1=1, axis2=2).T
    assert np.max(np.abs(diagonal / expected - 1)) > 1e-3


def test_taking_weights_out_and_removing_them_keeps_the_digits():
    fisher, inverses = fisher_of("decaying spectrum, m near b")
    grads = np.asarray(problem("decaying spectrum, m near b")[0]["w"], np.float64)
    w = problems.values(SIZE, BLOCKS, seed=3)
    kept = w > -0.2
    small = js.curvature.restrict(fisher, {"w": kept})
    diagonal = np.asarray(js.curvature.inverse_diagonal(small)["w"])
    change = js.curvature.eliminate(fisher, {"w": w}, {"w": ~kept})["w"]
    for k in range(BLOCKS):
        keep = kept[:, k]
        inverse = inverse_of(np.where(keep, grads[..., k], 0))
        assert_each_near(diagonal[:, k], np.diag(inverse), 1e-6)
        full = np.linalg.inv(inverses[k])
        pull = inverse @ np.where(keep, full[:, ~keep] @ w[~keep, k], 0)
        assert_near(np.asarray(change)[keep, k], pull[keep], 1e-5)


# Over all weights at once.


@functools.cache
def wide_problem():
    """m = 48 gradients of 600 weights: eigenvalues 1e7 to 1e9 times the damping."""
    grads = problems.values(48, 30, 20)
    flat = grads.reshape(48, -1).astype(np.float64)
    left, s, rows = np.linalg.svd(flat, full_matrices=False)
    damping = float(np.float32(DAMPING))
    fisher = js.curvature.mfac({"w": jax.device_put(grads)}, damping=DAMPING)
    return fisher, flat, (left, s, rows, damping)


def test_the_diagonal_of_mfac_has_all_digits():
    fisher, _, (_, s, rows, damping) = wide_problem()
    shrunk = s**2 / (s**2 + 48 * damping)
    expected = (1 - shrunk @ rows**2) / damping
    diagonal = js.curvature.inverse_diagonal(fisher)["w"]
    assert_each_near(np.ravel(diagonal), expected, 1e-6)


def test_products_with_gradients_of_the_window_have_them_too():
    fisher, flat, (left, s, rows, damping) = wide_problem()
    for c in (np.eye(48)[5], np.full(48, 1 / 48)):
        solved = (48 * s / (s**2 + 48 * damping) * (left.T @ c)) @ rows
        product = js.curvature.span_ihvp(fisher, c.astype(np.float32))["w"]
        assert_near(np.ravel(product), solved, 1e-6)
    # What they are there for: without them nothing would be left.
    g = flat[5].reshape(30, 20).astype(np.float32)
    naive = np.ravel(js.curvature.ihvp(fisher, {"w": g})["w"])
    solved = (48 * s / (s**2 + 48 * damping) * left[5]) @ rows
    assert np.max(np.abs(naive - solved)) > 0.1 * np.max(np.abs(solved))


def test_products_with_other_vectors():
    fisher, _, (_, s, rows, damping) = wide_problem()
    x = problems.values(30, 20, seed=4)
    inner = rows @ x.reshape(-1).astype(np.float64)
    expected = (x.reshape(-1) - (s**2 / (s**2 + 48 * damping) * inner) @ rows) / damping
    product = js.curvature.ihvp(fisher, {"w": x})["w"]
    assert_near(np.ravel(product), expected, 1e-6)


def test_no_rounding_makes_a_diagonal_of_mfac_negative():
    """More gradients than weights: the diagonal is 1 minus nearly 1, over damping."""
    grads = problems.values(48, 10) * np.float32(1e3)
    fisher = js.curvature.mfac({"w": jax.device_put(grads)}, damping=3e-9)
    diagonal = np.asarray(js.curvature.inverse_diagonal(fisher)["w"])
    least = 1 / np.mean(grads.astype(np.float64) ** 2, axis=0)
    assert (diagonal >= least * (1 - 1e-6)).all()


# In float64.


@jax.jit
def in_double(grads, x, damping):
    size = grads["w"][0].size
    block = js.curvature.block_fisher(grads, block_size=size, damping=damping)
    full = js.curvature.mfac(grads, damping=damping)
    return {
        "diagonals": [js.curvature.inverse_diagonal(f) for f in (block, full)],
        "products": [js.curvature.ihvp(f, x) for f in (block, full)],
        "one": js.curvature.span_ihvp(full, jnp.eye(len(grads["w"]))[3]),
        "sums": js.curvature.diagonal_fisher(grads, damping=damping).diagonals[0],
    }


@pytest.mark.usefixtures("x64")
def test_in_double_precision_to_1e_9():
    m, d, damping = 12, 24, 1e-5
    grads = problems.values(m, 6, 4, dtype=np.float64)
    x = problems.values(6, 4, dtype=np.float64)
    flat = np.moveaxis(grads, -1, 1).reshape(m, d)
    order = lambda x: np.asarray(x["w"]).T.reshape(-1)
    static = ref.mfac_static(flat, damping)
    inverse = ref.inverse_by_rank_one(flat, damping)
    got = in_double({"w": grads}, {"w": x}, damping)
    for diagonal in got["diagonals"]:
        assert diagonal["w"].dtype == jnp.float64
        assert_each_near(order(diagonal), np.diag(inverse), 1e-9)
        assert_each_near(order(diagonal), ref.static_diagonal(static), 1e-9)
    for product in got["products"]:
        assert_near(order(product), inverse @ order({"w": x}), 1e-9)
        assert_near(order(product), ref.static_ihvp(static, order({"w": x})), 1e-9)
    assert_near(order(got["one"]), inverse @ flat[3], 1e-9)
    expected = np.mean(grads**2, axis=0) + damping
    np.testing.assert_allclose(got["sums"], expected, rtol=1e-12)
