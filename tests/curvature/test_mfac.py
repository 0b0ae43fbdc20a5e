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
from jaxsparse.curvature import _chunks, _mfac_products

DAMPING = 1e-2
NAMES = ("conv", "kernel")
PAGE = 8 * 4 * problems.M  # eight columns: 30 weights leave a page not filled


@functools.cache
def problem():
    return problems.tree(NAMES), problems.weights(NAMES)


@functools.cache
def fisher_of(where="device"):
    grads = problem()[0]
    if where == "host":
        grads = {k: None if g is None else np.asarray(g) for k, g in grads.items()}
        return js.curvature.mfac(grads, damping=DAMPING, page_bytes=PAGE)
    return js.curvature.mfac(grads, damping=DAMPING)


def flat(tree, extra=0):
    return np.concatenate([problems.flat(tree[k], extra) for k in NAMES], axis=-1)


def masks(threshold):
    return {k: w > threshold for k, w in problem()[1].items()}


def dense():
    return ref.fisher(flat(problem()[0], 1), float(np.float32(DAMPING)))


both_places = pytest.mark.parametrize("where", ["device", "host"])


@both_places
def test_the_diagonal_and_products_are_those_of_the_dense_inverse(where):
    grads, x = problem()
    fisher, inverse = fisher_of(where), np.linalg.inv(dense())
    diagonal = js.curvature.inverse_diagonal(fisher)
    product = js.curvature.ihvp(fisher, x | {"not looked at": None})
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
    diagonal = js.curvature.inverse_diagonal(fisher_of())
    assert_each_near(flat(diagonal), ref.static_diagonal(static), 1e-6)
    x = problem()[1]
    product = js.curvature.ihvp(fisher_of(), x)
    assert_near(flat(product), ref.static_ihvp(static, flat(x)), 2e-6)


@both_places
def test_products_with_combinations_of_the_gradients(where):
    c = problems.values(problems.M, seed=2)
    product = js.curvature.span_ihvp(fisher_of(where), jnp.asarray(c))
    g = flat(problem()[0], 1)
    assert_near(flat(product), np.linalg.solve(dense(), c @ g), 1e-6)
    assert product["apart"] is None


@both_places
def test_restricted_it_is_the_matrix_of_the_weights_that_are_kept(where):
    kept = masks(-0.5)
    fisher = js.curvature.restrict(fisher_of(where), kept)
    assert isinstance(fisher.grads[0], np.ndarray) == (where == "host")
    mask = flat(kept).astype(bool)
    matrix = np.where(np.outer(mask, mask), dense(), DAMPING * np.eye(mask.size))
    diagonal = flat(js.curvature.inverse_diagonal(fisher))
    assert_each_near(diagonal, np.diag(np.linalg.inv(matrix)), 1e-6)
    before = flat(js.curvature.inverse_diagonal(fisher_of(where)))
    assert np.max(np.abs(before / diagonal - 1)) > 1e-3  # the first one stays


@both_places
def test_eliminate_is_the_joint_update_of_the_dense_solution(where):
    w = problem()[1]
    removed = jax.tree.map(jnp.logical_not, masks(-0.5))
    change = js.curvature.eliminate(fisher_of(where), w, removed)
    expected = ref.obs_joint(flat(w), dense(), flat(removed).astype(bool)) - flat(w)
    assert_near(flat(change), expected, 2e-6)
    for k in NAMES:
        np.testing.assert_array_equal((w[k] + change[k])[removed[k]], 0)


def test_eliminate_leaves_alone_what_was_pruned_before():
    before, kept = masks(-0.5), masks(0.0)
    w = {k: jnp.where(before[k], x, 0) for k, x in problem()[1].items()}
    removed = {k: before[k] & ~kept[k] for k in NAMES}
    fisher = js.curvature.restrict(fisher_of(), before)
    change = flat(js.curvature.eliminate(fisher, w, removed, kept=kept))
    alive = flat(before).astype(bool)
    np.testing.assert_array_equal(change[~alive], 0)
    q = flat(removed).astype(bool)[alive]
    part = dense()[np.ix_(alive, alive)]
    expected = ref.obs_joint(flat(w)[alive], part, q) - flat(w)[alive]
    assert_near(change[alive], expected, 2e-6)


def test_gradients_are_kept_as_they_were_given_and_not_copied():
    grads = problem()[0]
    assert [g is grads[k] for g, k in zip(fisher_of().grads, NAMES, strict=True)]
    host = {"w": problems.values(3, 4)}
    fisher = js.curvature.mfac(host, damping=1.0)
    assert fisher.grads[0] is host["w"]


def test_relative_damping_follows_the_mean_diagonal():
    fisher = js.curvature.mfac(problem()[0], rel_damping=0.1)
    expected = 0.1 * np.mean(flat(problem()[0], 1) ** 2)
    np.testing.assert_allclose(fisher.damping, expected, rtol=1e-6)


def test_a_few_columns_of_16_bit_gradients_at_a_time(monkeypatch):
    """Nothing else is rounded: products are right to float32."""
    monkeypatch.setattr(_mfac_products, "SCRATCH_BYTES", 1)  # 512 columns, of 1200
    w = jnp.asarray(problems.values(30, 40, seed=1))
    grads = {"w": jnp.asarray(problems.values(10, 30, 40)).astype(jnp.bfloat16)}
    c, removed = problems.values(10, seed=2), {"w": w > 0}
    fisher = js.curvature.mfac(grads, damping=DAMPING)
    g, x = problems.flat(grads["w"], 1), problems.flat(w)
    matrix = ref.fisher(g, float(np.float32(DAMPING)))
    diagonal = js.curvature.inverse_diagonal(fisher)["w"]
    assert_each_near(problems.flat(diagonal), np.diag(np.linalg.inv(matrix)), 1e-6)
    joint = ref.obs_joint(x, matrix, problems.flat(removed["w"]).astype(bool)) - x
    for product, expected in (
        (js.curvature.ihvp(fisher, {"w": w}), np.linalg.solve(matrix, x)),
        (
            js.curvature.span_ihvp(fisher, jnp.asarray(c)),
            np.linalg.solve(matrix, c @ g),
        ),
        (js.curvature.eliminate(fisher, {"w": w}, removed), joint),
    ):
        assert product["w"].dtype == jnp.float32
        assert_near(problems.flat(product["w"]), expected, 2e-6)


def everything(grads, x, kept, damping):
    fisher = js.curvature.mfac(grads, damping=damping)
    removed = jax.tree.map(jnp.logical_not, kept)
    return (
        js.curvature.inverse_diagonal(fisher),
        js.curvature.inverse_diagonal(js.curvature.restrict(fisher, kept)),
        js.curvature.ihvp(fisher, x),
        js.curvature.span_ihvp(fisher, jnp.ones(problems.M)),
        js.curvature.eliminate(fisher, x, removed),
    )


def test_jitted_it_is_the_same_and_other_values_do_not_compile_again(compilations):
    first = {"kernel": problem()[0]["kernel"]}, {"kernel": problem()[1]["kernel"]}
    kept = {"kernel": first[1]["kernel"] > -0.5}
    eager = everything(*first, kept, DAMPING)
    other = jax.tree.map(lambda x: x[::-1], (*first, kept))
    with compilations() as found:
        everything(*other, 0.5)
    assert not found.names
    jitted = jax.jit(everything)(*first, kept, jnp.float32(DAMPING))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, jitted, eager)


# Block by block.


def test_in_blocks_it_is_the_block_fisher(monkeypatch):
    monkeypatch.setattr(_chunks, "SCRATCH_BYTES", 1)  # one block at a time
    grads, w = {"kernel": problem()[0]["kernel"]}, {"kernel": problem()[1]["kernel"]}
    kept = {"kernel": w["kernel"] > -0.5}
    on_blocks = functools.partial(by_blocks, grads["kernel"], DENSE, SIZE, DAMPING)
    fisher = js.curvature.mfac(grads, damping=DAMPING, block_size=SIZE)
    diagonal = js.curvature.inverse_diagonal(fisher)["kernel"]
    assert_each_near(diagonal, on_blocks(problems.inverse_diagonal), 2e-6)
    product = js.curvature.ihvp(fisher, w)["kernel"]
    assert_near(product, on_blocks(np.linalg.solve, w["kernel"]), 1e-5)

    def out(block, mask):
        apart = DAMPING * np.eye(len(mask))
        return np.where(np.outer(mask, mask), block, apart)

    f = lambda block, mask: np.diag(np.linalg.inv(out(block, mask)))
    small = js.curvature.inverse_diagonal(js.curvature.restrict(fisher, kept))
    assert_each_near(small["kernel"], on_blocks(f, kept["kernel"]), 2e-6)
    removed = {"kernel": ~kept["kernel"]}
    f = lambda block, w, q: ref.obs_joint(w.astype(np.float64), block, q) - w
    change = js.curvature.eliminate(fisher, w, removed)["kernel"]
    assert_near(change, on_blocks(f, w["kernel"], removed["kernel"]), 2e-6)


def test_in_blocks_relative_damping_follows_the_mean_diagonal():
    grads = {"kernel": problem()[0]["kernel"]}
    fisher = js.curvature.mfac(grads, rel_damping=0.1, block_size=SIZE)
    expected = 0.1 * np.mean(np.square(grads["kernel"], dtype=np.float64))
    np.testing.assert_allclose(fisher.damping, expected, rtol=1e-6)
