"""Static M-FAC against the dense inverse over all weights, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature import problems
from curvature.problems import DENSE, SIZE, assert_each_near, assert_near, by_blocks
from reference import second_order as ref

import jaxsparse as js
from jaxsparse.linalg import chunks as _chunks

DAMPING = 1e-2
NAMES = ("conv", "kernel")
PAGE = 8 * 4 * problems.M  # eight columns: 30 weights leave a page not filled


@functools.cache
def problem():
    """Gradients, weights, and what is kept of them."""
    x = problems.weights(NAMES)
    kept = {k: np.asarray(w) > -0.5 for k, w in x.items()}
    return problems.tree(NAMES), x, kept


def on_host(grads):
    grads = {k: None if g is None else np.asarray(g) for k, g in grads.items()}
    return js.curvature.mfac(grads, damping=DAMPING, page_bytes=PAGE)


def flat(tree, extra=0):
    return np.concatenate([problems.flat(tree[k], extra) for k in NAMES], axis=-1)


def dense():
    return ref.fisher(flat(problem()[0], 1), float(np.float32(DAMPING)))


COEFFICIENTS = problems.values(problems.M, seed=2)


def everything(grads, x, kept, damping=DAMPING, fisher=None):
    if fisher is None:
        fisher = js.curvature.mfac(grads, damping=damping)
    small = js.curvature.restrict(fisher, kept)
    removed = jax.tree.map(jnp.logical_not, kept)
    return {
        "diagonal": js.curvature.inverse_diagonal(fisher),
        "product": js.curvature.ihvp(fisher, x | {"not looked at": None}),
        "span": js.curvature.span_ihvp(fisher, COEFFICIENTS),
        "restricted": js.curvature.inverse_diagonal(small),
        "change": js.curvature.eliminate(fisher, x, removed),
    }


@functools.cache
def results(where="device"):
    """Jitted, but for gradients in the host's memory."""
    if where == "device":
        return jax.jit(everything)(*problem())
    return everything(*problem(), fisher=on_host(problem()[0]))


both_places = pytest.mark.parametrize("where", ["device", "host"])


@both_places
def test_the_diagonal_and_products_are_those_of_the_dense_inverse(where):
    grads, x, _ = problem()
    inverse = np.linalg.inv(dense())
    diagonal, product = results(where)["diagonal"], results(where)["product"]
    for tree in (diagonal, product):
        assert set(tree) == {*grads}
        assert tree["apart"] is None
        for k in NAMES:
            assert isinstance(tree[k], jax.Array)
            assert (tree[k].shape, tree[k].dtype) == (x[k].shape, jnp.float32)
    assert_each_near(flat(diagonal), np.diag(inverse), 1e-6)
    assert_near(flat(product), inverse @ flat(x), 2e-6)


def test_the_recursion_of_the_paper_gives_the_same():
    static = ref.mfac_static(flat(problem()[0], 1), float(np.float32(DAMPING)))
    diagonal, product = results()["diagonal"], results()["product"]
    assert_each_near(flat(diagonal), ref.static_diagonal(static), 1e-6)
    assert_near(flat(product), ref.static_ihvp(static, flat(problem()[1])), 2e-6)


@both_places
def test_products_with_combinations_of_the_gradients(where):
    product = results(where)["span"]
    expected = np.linalg.solve(dense(), COEFFICIENTS @ flat(problem()[0], 1))
    assert_near(flat(product), expected, 1e-6)
    assert product["apart"] is None


@both_places
def test_restricted_it_is_the_matrix_of_the_weights_that_are_kept(where):
    mask = flat(problem()[2]).astype(bool)
    matrix = np.where(np.outer(mask, mask), dense(), DAMPING * np.eye(mask.size))
    diagonal = flat(results(where)["restricted"])
    assert_each_near(diagonal, np.diag(np.linalg.inv(matrix)), 1e-6)
    before = flat(results(where)["diagonal"])
    assert np.max(np.abs(before / diagonal - 1)) > 1e-3  # the first one stays


def test_restricted_gradients_stay_in_the_hosts_memory():
    small = js.curvature.restrict(on_host(problem()[0]), problem()[2])
    assert all(isinstance(g, np.ndarray) for g in small.grads)


@both_places
def test_eliminate_is_the_joint_update_of_the_dense_solution(where):
    w, change = flat(problem()[1]), flat(results(where)["change"])
    removed = ~flat(problem()[2]).astype(bool)
    assert_near(change, ref.obs_joint(w, dense(), removed) - w, 2e-6)
    np.testing.assert_array_equal((w + change)[removed], 0)


def test_eliminate_leaves_alone_what_was_pruned_before():
    grads, w, before = problem()
    w = {k: np.where(before[k], x, 0).astype(np.float32) for k, x in w.items()}
    kept = {k: np.asarray(x) > 0 for k, x in w.items()}
    removed = {k: before[k] & ~kept[k] for k in NAMES}

    @jax.jit
    def eliminate(grads):
        fisher = js.curvature.mfac(grads, damping=DAMPING)
        fisher = js.curvature.restrict(fisher, before)
        return js.curvature.eliminate(fisher, w, removed, kept=kept)

    change = flat(eliminate(grads))
    alive = flat(before).astype(bool)
    np.testing.assert_array_equal(change[~alive], 0)
    q = flat(removed).astype(bool)[alive]
    part = dense()[np.ix_(alive, alive)]
    expected = ref.obs_joint(flat(w)[alive], part, q) - flat(w)[alive]
    assert_near(change[alive], expected, 2e-6)


def test_gradients_are_kept_as_they_were_given_and_not_copied():
    kernel = problem()[0]["kernel"]
    for g in (kernel, np.asarray(kernel)):
        fisher = js.curvature.mfac({"kernel": g, "apart": None}, damping=DAMPING)
        assert fisher.grads[0] is g


def test_relative_damping_follows_the_mean_diagonal():
    fisher = js.curvature.mfac(problem()[0], rel_damping=0.1)
    expected = 0.1 * np.mean(flat(problem()[0], 1) ** 2)
    np.testing.assert_allclose(fisher.damping, expected, rtol=1e-6)


def test_a_few_columns_of_16_bit_gradients_at_a_time(monkeypatch):
    """Nothing else is rounded: products are right to float32."""
    monkeypatch.setattr(_chunks, "SCRATCH_BYTES", 1)  # 512 columns, of 600
    w = problems.values(30, 20, seed=1)
    g = problems.values(problems.M, 30, 20).astype(jnp.bfloat16)
    run = jax.jit(lambda g, w, kept: everything({"w": g}, {"w": w}, {"w": kept}))
    got = run(g, w, w <= 0)
    g, x, kept = problems.flat(g, 1), problems.flat(w), problems.flat(w <= 0)
    matrix = ref.fisher(g, float(np.float32(DAMPING)))
    diagonal = got["diagonal"]["w"]
    assert_each_near(problems.flat(diagonal), np.diag(np.linalg.inv(matrix)), 1e-6)
    for name, expected in (
        ("product", np.linalg.solve(matrix, x)),
        ("span", np.linalg.solve(matrix, COEFFICIENTS @ g)),
        ("change", ref.obs_joint(x, matrix, ~kept.astype(bool)) - x),
    ):
        assert got[name]["w"].dtype == jnp.float32
        assert_near(problems.flat(got[name]["w"]), expected, 2e-6)


def test_eager_it_is_the_same_and_other_values_do_not_compile_again(compilations):
    args = [{"kernel": tree["kernel"]} for tree in problem()]
    eager = everything(*args)
    other = [{"kernel": jax.device_put(np.asarray(x["kernel"])[::-1])} for x in args]
    with compilations() as found:
        everything(*other, 0.5)
    assert not found.names
    g, w, kept = (problems.flat(args[i]["kernel"], int(i == 0)) for i in range(3))
    matrix, kept = ref.fisher(g, float(np.float32(DAMPING))), kept.astype(bool)
    small = np.where(np.outer(kept, kept), matrix, DAMPING * np.eye(kept.size))
    expected = {
        "diagonal": np.diag(np.linalg.inv(matrix)),
        "product": np.linalg.solve(matrix, w),
        "span": np.linalg.solve(matrix, COEFFICIENTS @ g),
        "restricted": np.diag(np.linalg.inv(small)),
        "change": ref.obs_joint(w, matrix, ~kept) - w,
    }
    for name, want in expected.items():
        assert_near(problems.flat(eager[name]["kernel"]), want, 2e-6)


# Block by block.


def test_in_blocks_it_is_the_block_fisher(monkeypatch):
    monkeypatch.setattr(_chunks, "SCRATCH_BYTES", 1)  # one block at a time
    grads, w, kept = ({"kernel": tree["kernel"]} for tree in problem())

    @jax.jit
    def run(grads, w, kept):
        fisher = js.curvature.mfac(grads, damping=DAMPING, block_size=SIZE)
        small = js.curvature.restrict(fisher, kept)
        removed = jax.tree.map(jnp.logical_not, kept)
        return (
            js.curvature.inverse_diagonal(fisher)["kernel"],
            js.curvature.ihvp(fisher, w)["kernel"],
            js.curvature.inverse_diagonal(small)["kernel"],
            js.curvature.eliminate(fisher, w, removed)["kernel"],
        )

    diagonal, product, small, change = run(grads, w, kept)
    on_blocks = functools.partial(by_blocks, grads["kernel"], DENSE, SIZE, DAMPING)
    assert_each_near(diagonal, on_blocks(problems.inverse_diagonal), 2e-6)
    assert_near(product, on_blocks(np.linalg.solve, w["kernel"]), 1e-5)

    def out(block, mask):
        apart = DAMPING * np.eye(len(mask))
        return np.where(np.outer(mask, mask), block, apart)

    f = lambda block, mask: np.diag(np.linalg.inv(out(block, mask)))
    assert_each_near(small, on_blocks(f, kept["kernel"]), 2e-6)
    f = lambda block, w, q: ref.obs_joint(w.astype(np.float64), block, q) - w
    assert_near(change, on_blocks(f, w["kernel"], ~kept["kernel"]), 2e-6)


def test_in_blocks_relative_damping_follows_the_mean_diagonal():
    grads = {"kernel": problem()[0]["kernel"]}
    fisher = js.curvature.mfac(grads, rel_damping=0.1, block_size=SIZE)
    expected = 0.1 * np.mean(problems.flat(grads["kernel"]) ** 2)
    np.testing.assert_allclose(fisher.damping, expected, rtol=1e-6)
