"""Block Fisher matrices against dense inverses of their blocks, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature import problems
from curvature.problems import DENSE, SIZE, M, assert_each_near, assert_near, by_blocks
from reference import second_order as ref

import jaxsparse as js
from jaxsparse.curvature import block_sums as _block_sums
from jaxsparse.curvature.layout import to_blocks
from jaxsparse.linalg import chunks as _chunks

DAMPING = 1e-3
ONE = ("kernel",)
fisher_of = functools.partial(
    js.curvature.block_fisher, block_size=SIZE, axes=problems.AXES
)


@functools.cache
def block_fisher():
    """Of the kernel alone."""
    return fisher_of(problems.tree(ONE), damping=DAMPING, axes=None)


def kernel():
    """Gradients, weights and a mask of the kernel with a ragged last block."""
    grads, w = problems.tree(ONE), problems.weights(ONE)
    return grads, w, {"kernel": np.asarray(w["kernel"]) > -0.5}


def on_blocks(f, *arrays):
    return by_blocks(kernel()[0]["kernel"], DENSE, SIZE, DAMPING, f, *arrays)


def restricted(fisher, mask):
    """`F` without rows and columns of pruned weights, which get the damping."""
    return np.where(np.outer(mask, mask), fisher, DAMPING * np.eye(len(mask)))


# The inverse.


def test_the_diagonal_and_products_are_those_of_the_dense_inverse():
    grads, x = problems.tree(), problems.weights()

    @jax.jit
    def run(grads, x):
        fisher = fisher_of(grads, damping=DAMPING)
        product = js.curvature.ihvp(fisher, x | {"apart": None, "not looked at": None})
        return js.curvature.inverse_diagonal(fisher), product

    diagonal, product = run(grads, x)
    assert set(diagonal) == set(product) == {*grads}
    assert diagonal["apart"] is None
    assert product["apart"] is None
    for name, (shape, axes) in problems.SHAPES.items():
        assert diagonal[name].shape == product[name].shape == shape
        assert diagonal[name].dtype == product[name].dtype == jnp.float32
        oracle = functools.partial(by_blocks, grads[name], axes, SIZE, DAMPING)
        assert_each_near(diagonal[name], oracle(problems.inverse_diagonal), 2e-6)
        assert_near(product[name], oracle(np.linalg.solve, x[name]), 2e-6)


def test_blocks_of_the_inverse_and_their_groups():
    fisher = block_fisher()
    whole = np.asarray(js.curvature.inverse_blocks(fisher)["kernel"])
    groups = np.asarray(js.curvature.inverse_blocks(fisher, size=4)["kernel"])
    assert whole.shape == (4, 8, 8)
    assert groups.shape == (4, 2, 4, 4)
    blocks = problems.dense(kernel()[0]["kernel"], DENSE, SIZE, DAMPING)
    for got, parts, (_, block) in zip(whole, groups, blocks, strict=True):
        expected = np.eye(SIZE) / DAMPING  # where the last block is not filled
        n = len(block)
        expected[:n, :n] = np.linalg.inv(block)
        assert_near(got, expected, 1e-6)
        assert_near(parts[0], expected[:4, :4], 1e-6)
        assert_near(parts[1], expected[4:, 4:], 1e-6)


def test_the_recursion_of_the_papers_gives_the_same():
    grads = np.asarray(kernel()[0]["kernel"])
    rows = np.moveaxis(grads, -1, 1).reshape(M, -1)
    inverses = ref.block_inverses(rows, DAMPING, SIZE)
    expected = np.concatenate([np.diag(x) for x in inverses]).reshape(5, 6).T
    diagonal = js.curvature.inverse_diagonal(block_fisher())["kernel"]
    assert_each_near(diagonal, expected, 2e-6)


def test_masked_weights_are_apart_and_do_not_count_for_relative_damping():
    grads, _, masks = kernel()
    masked = np.where(masks["kernel"], grads["kernel"], 0).astype(np.float32)
    fisher = fisher_of({"kernel": jax.device_put(masked)}, rel_damping=0.1, axes=None)
    kept = masked[:, masks["kernel"]].astype(np.float64)
    np.testing.assert_allclose(fisher.damping, 0.1 * np.mean(kept**2), rtol=1e-6)
    diagonal = np.asarray(js.curvature.inverse_diagonal(fisher)["kernel"])
    apart = diagonal[~masks["kernel"]]
    np.testing.assert_allclose(apart, 1 / fisher.damping, rtol=1e-6)
    expected = by_blocks(masked, DENSE, SIZE, fisher.damping, problems.inverse_diagonal)
    assert_each_near(diagonal, expected, 2e-6)


def test_less_accurate_is_right_where_the_damping_is_large():
    grads = {"kernel": kernel()[0]["kernel"]}
    fisher = fisher_of(grads, damping=1.0, axes=None, accurate=False)
    expected = by_blocks(grads["kernel"], DENSE, SIZE, 1.0, problems.inverse_diagonal)
    assert_each_near(js.curvature.inverse_diagonal(fisher)["kernel"], expected)
    # In another precision, or the argument does nothing.
    accurate = fisher_of(grads, damping=1.0, axes=None)
    assert np.any(np.asarray(fisher.roots[0].diagonal) == 0)
    assert np.any(np.asarray(accurate.roots[0].diagonal) != 0)


# Sums.


def test_streamed_or_merged_gradients_give_the_sums_of_one_call():
    grads = np.asarray(kernel()[0]["kernel"])
    estimator = js.curvature.block_estimator(block_size=SIZE)
    params = {"kernel": grads[0], "bias": np.ones(3, np.float32)}
    start, update = jax.jit(estimator.init)(params), jax.jit(estimator.update)
    add = lambda sums, part: update(sums, {"kernel": part})
    first = add(start, grads[:6])
    streamed = add(first, grads[6:])
    merged = estimator.merge(add(start, grads[6:]), first)
    assert [int(x.count) for x in (start, first, streamed, merged)] == [0, 6, M, M]

    @jax.jit
    def both(sums, damping):
        fisher = estimator.finalize(sums, damping=damping)
        once = fisher_of({"kernel": grads}, damping=damping, axes=None)
        return js.curvature.inverse_diagonal(fisher), js.curvature.inverse_diagonal(
            once
        )

    for sums in (streamed, merged):
        for damping in (DAMPING, 0.1):  # from the same sums
            got, once = both(sums, damping)
            assert got["bias"] is None
            assert_each_near(got["kernel"], once["kernel"], 3e-7)


def test_an_estimator_takes_what_where_selects():
    estimator = js.curvature.block_estimator(block_size=4, where="bias")
    ones = lambda *shape: np.ones(shape, np.float32)
    sums = estimator.init({"kernel": ones(4, 4), "bias": ones(7)})
    assert sums.paths == ("bias",)
    assert [s.square.shape for s in sums.sums] == [(2, 4, 4)]


@pytest.mark.parametrize(
    ("shape", "axes", "pattern", "size"),
    [
        ((2, 6, 5), problems.STACKED, js.Unstructured(), 4),
        ((6, 8), DENSE, js.Block((2, 2)), 8),
    ],
    ids=["layers", "tiles"],
)
def test_in_many_small_parts_it_is_the_same(shape, axes, pattern, size, monkeypatch):
    """Two rows, and one block, at a time: what large parameters go through."""
    monkeypatch.setattr(_chunks, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(_block_sums, "SLAB_BYTES", 1)
    grads = {"w": problems.values(10, *shape)}
    x = {"w": problems.values(*shape, seed=1)}
    removed = {"w": x["w"] > 0.3}

    @jax.jit
    def run(grads, x, removed):
        fisher = js.curvature.block_fisher(
            grads, block_size=size, damping=DAMPING, axes=axes, pattern=pattern
        )
        kept = js.curvature.restrict(fisher, jax.tree.map(jnp.logical_not, removed))
        return fisher, (
            js.curvature.inverse_diagonal(fisher)["w"],
            js.curvature.ihvp(fisher, x)["w"],
            js.curvature.eliminate(fisher, x, removed)["w"],
            js.curvature.inverse_diagonal(kept)["w"],
        )

    fisher, got = run(grads, x, removed)
    index = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    order = np.asarray(to_blocks(index + 1, fisher.layouts[0])).reshape(-1, size)
    g, w = problems.flat(grads["w"], 1), problems.flat(x["w"])
    q = problems.flat(removed["w"]).astype(bool)
    expected = np.zeros((4, w.size))
    for block in order:
        at = block[block > 0].astype(int) - 1
        f = ref.fisher(g[:, at], float(np.float32(DAMPING)))
        expected[0, at] = problems.inverse_diagonal(f)
        expected[1, at] = np.linalg.solve(f, w[at])
        expected[2, at] = ref.obs_joint(w[at], f, q[at]) - w[at]
        expected[3, at] = problems.inverse_diagonal(restricted(f, ~q[at]))
    for values, want in zip(got, expected, strict=True):
        assert_near(values, want.reshape(shape), 2e-6)


# Pruning.


def test_restricted_it_is_the_matrix_of_the_weights_that_are_kept():
    _, x, masks = kernel()
    fisher = js.curvature.restrict(block_fisher(), masks)
    f = lambda block, mask: np.diag(np.linalg.inv(restricted(block, mask)))
    expected = on_blocks(f, masks["kernel"])
    got = js.curvature.inverse_diagonal(fisher)["kernel"]
    assert_each_near(got, expected, 2e-6)
    f = lambda block, mask, x: np.linalg.solve(restricted(block, mask), x)
    expected = on_blocks(f, masks["kernel"], x["kernel"])
    assert_near(js.curvature.ihvp(fisher, x)["kernel"], expected, 2e-6)
    everything = {"kernel": np.ones((), bool)}
    same = js.curvature.restrict(block_fisher(), everything)
    before = js.curvature.inverse_diagonal(block_fisher())["kernel"]
    assert_each_near(js.curvature.inverse_diagonal(same)["kernel"], before, 1e-6)


def test_eliminate_is_the_joint_update_of_the_dense_solution():
    _, w, masks = kernel()
    w = {"kernel": np.asarray(w["kernel"])}
    removed = {"kernel": ~masks["kernel"] & (w["kernel"] < -1)}
    change = js.curvature.eliminate(block_fisher(), w, removed)["kernel"]
    assert 0 < np.sum(removed["kernel"]) < np.sum(~masks["kernel"])
    w, q = w["kernel"], removed["kernel"]
    f = lambda block, w, q: ref.obs_joint(w.astype(np.float64), block, q) - w
    change = np.asarray(change)
    assert_near(change, on_blocks(f, w, q), 2e-6)
    np.testing.assert_array_equal((w + change)[q], 0)


def test_eliminate_leaves_alone_what_was_pruned_before():
    _, w, masks = kernel()
    before = masks["kernel"]
    w = {"kernel": np.where(before, w["kernel"], 0).astype(np.float32)}
    removed = {"kernel": before & (w["kernel"] > 0.5)}
    kept = {"kernel": before & ~removed["kernel"]}
    fisher = js.curvature.restrict(block_fisher(), masks)
    change = js.curvature.eliminate(fisher, w, removed, kept=kept)["kernel"]
    np.testing.assert_array_equal(np.asarray(change)[~before], 0)

    def f(block, w, q, k):
        dw = -np.where(q, w, 0).astype(np.float64)
        cross = block[np.ix_(k, q)] @ w[q]
        dw[k] = np.linalg.solve(block[np.ix_(k, k)], cross)
        return dw

    expected = on_blocks(f, w["kernel"], removed["kernel"], kept["kernel"])
    assert_near(change, expected, 2e-6)


# Units of a pattern, and one weight after another.

NM = js.NM(2, 4)
UNITS = {"kernel": jax.device_put(problems.values(M, 8, 3))}
UNIT_WEIGHTS = {"kernel": jax.device_put(problems.values(8, 3, seed=1))}


@functools.cache
def unit_fisher():
    fisher = fisher_of(UNITS, damping=DAMPING, axes=None, pattern=NM)
    assert fisher.layouts[0].unit == 4
    return fisher


def on_columns(f):
    """`f(F, w)` for each column of the kernel, which is a block."""
    w = np.asarray(UNIT_WEIGHTS["kernel"], np.float64)
    blocks = problems.dense(UNITS["kernel"], DENSE, SIZE, DAMPING)
    return np.stack([f(b, w[:, k]) for k, (_, b) in enumerate(blocks)], axis=1)


def test_units_are_scored_together():
    rho, solved = js.curvature.group_scores(unit_fisher(), UNIT_WEIGHTS)
    units = np.arange(8).reshape(2, 4)

    def scores(block, w):
        return ref.group_scores(w, np.linalg.inv(block), units).repeat(4)

    def pulls(block, w):
        inverse = np.linalg.inv(block)
        parts = [np.linalg.solve(inverse[np.ix_(q, q)], w[q]) for q in units]
        return np.concatenate(parts)

    assert_each_near(rho["kernel"], on_columns(scores), 1e-5)
    assert_near(solved["kernel"], on_columns(pulls), 1e-5)


def test_single_weights_are_units_of_one():
    w = problems.weights(ONE)
    rho, _ = js.curvature.group_scores(block_fisher(), w)
    d = np.asarray(js.curvature.inverse_diagonal(block_fisher())["kernel"])
    expected = np.asarray(w["kernel"]) ** 2 / (2 * d)
    assert_each_near(rho["kernel"], expected, 1e-5)


def losses(fisher, w, alive=None, most=None):
    """What `greedy_scores` has to be: the loss of each removal, made to rise."""
    alive = np.ones(len(w), bool) if alive is None else np.array(alive)
    left = np.full(2, 4 if most is None else most) - (4 - alive.reshape(2, 4).sum(1))
    scores, last = np.full(len(w), np.inf), 0.0
    while np.any(free := alive & (left > 0).repeat(4)):
        inverse = np.zeros_like(fisher)
        inverse[np.ix_(alive, alive)] = np.linalg.inv(fisher[np.ix_(alive, alive)])
        loss = np.full(len(w), np.inf)
        loss[free] = w[free] ** 2 / (2 * np.diag(inverse)[free])
        q = int(np.argmin(loss))
        scores[q] = last = max(last, loss[q])
        w = np.where(alive, w - inverse[:, q] * w[q] / inverse[q, q], 0)
        alive[q] = False
        left[q // 4] -= 1
    return scores


def test_greedy_scores_are_the_losses_of_exact_obs_one_by_one():
    scores = js.curvature.greedy_scores(unit_fisher(), UNIT_WEIGHTS)["kernel"]
    assert_each_near(scores, on_columns(losses), 1e-5)
    orders = on_columns(lambda block, w: np.array(ref.obs_greedy(w, block, 8)[1]))
    by_scores = np.argsort(np.asarray(scores), axis=0, kind="stable")
    rising = np.all(np.diff(np.sort(scores, axis=0), axis=0) > 0, axis=0)
    assert rising.any()  # where two are equal the order is not in the scores
    np.testing.assert_array_equal(by_scores[:, rising], orders[:, rising])


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_lowest_greedy_scores_and_eliminate_are_greedy_obs(count):
    scores = js.curvature.greedy_scores(unit_fisher(), UNIT_WEIGHTS)["kernel"]
    rank = np.argsort(np.argsort(np.asarray(scores), axis=0, kind="stable"), axis=0)
    change = js.curvature.eliminate(
        unit_fisher(), UNIT_WEIGHTS, {"kernel": rank < count}
    )
    got = np.asarray(UNIT_WEIGHTS["kernel"]) + np.asarray(change["kernel"])
    expected = on_columns(lambda block, w: ref.obs_greedy(w, block, count)[0])
    rising = np.all(np.diff(np.sort(scores, axis=0), axis=0) > 0, axis=0)
    assert_near(got[:, rising], expected[:, rising], 1e-5)


def test_greedy_scores_of_a_pattern_leave_enough_of_each_unit():
    greedy = functools.partial(js.curvature.greedy_scores, unit_fisher(), UNIT_WEIGHTS)
    scores = np.asarray(greedy(most=2)["kernel"])
    expected = on_columns(functools.partial(losses, most=2))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(scores), finite)
    assert (finite.reshape(2, 4, 3).sum(axis=1) == 2).all()
    assert_each_near(scores[finite], expected[finite], 1e-5)


def test_greedy_scores_of_what_is_still_there():
    mask = np.ones((8, 3), bool)
    mask[[0, 5], [1, 2]] = False
    masks = {"kernel": jax.device_put(mask)}
    fisher = js.curvature.restrict(unit_fisher(), masks)
    scores = js.curvature.greedy_scores(fisher, UNIT_WEIGHTS, masks=masks, most=2)
    w = np.asarray(UNIT_WEIGHTS["kernel"], np.float64)
    blocks = problems.dense(UNITS["kernel"], DENSE, SIZE, DAMPING)
    for k, (_, block) in enumerate(blocks):
        expected = losses(block, w[:, k] * mask[:, k], mask[:, k], 2)
        got = np.asarray(scores["kernel"])[:, k]
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        assert_each_near(got[finite], expected[finite], 1e-5)


# What every function of the library keeps.


def everything(grads, w, masks, damping):
    fisher = fisher_of(grads, damping=damping, axes=None, pattern=NM)
    kept = js.curvature.restrict(fisher, masks)
    removed = jax.tree.map(jnp.logical_not, masks)
    return (
        js.curvature.inverse_diagonal(fisher),
        js.curvature.inverse_diagonal(kept),
        js.curvature.ihvp(fisher, w),
        js.curvature.group_scores(fisher, w),
        js.curvature.eliminate(fisher, w, removed),
    )


def test_jitted_it_is_the_same_and_other_values_do_not_compile_again(compilations):
    masks = {"kernel": jax.device_put(np.asarray(UNIT_WEIGHTS["kernel"]) > -1)}
    eager = everything(UNITS, UNIT_WEIGHTS, masks, DAMPING)
    turned = lambda x: jax.device_put(np.asarray(x)[::-1])
    other = jax.tree.map(turned, (UNITS, UNIT_WEIGHTS, masks))
    with compilations() as found:
        everything(*other, 0.1)
    assert not found.names
    jitted = jax.jit(everything)(UNITS, UNIT_WEIGHTS, masks, jnp.float32(DAMPING))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, jitted, eager)


def test_a_fisher_matrix_is_a_tree_of_arrays():
    fisher = block_fisher()
    leaves, treedef = jax.tree.flatten(fisher)
    again = jax.tree.unflatten(treedef, leaves)
    assert again.layouts == fisher.layouts
    assert again.paths == fisher.paths == ("kernel",)
    double = jax.jit(lambda f: dataclasses.replace(f, damping=2 * f.damping))(fisher)
    np.testing.assert_allclose(double.damping, 2 * DAMPING, rtol=1e-6)


def test_of_bf16_weights_the_change_is_in_float32():
    _, w, masks = kernel()
    w = {"kernel": np.asarray(w["kernel"]).astype(jnp.bfloat16)}
    removed = {"kernel": ~masks["kernel"]}
    change = js.curvature.eliminate(block_fisher(), w, removed)["kernel"]
    f = lambda block, w, q: ref.obs_joint(w, block, q) - w
    expected = on_blocks(f, np.asarray(w["kernel"], np.float64), removed["kernel"])
    assert change.dtype == jnp.float32
    assert_near(change, expected, 2e-6)
