"""What `js.solvers.obs` computes: dense optima, exact greedy OBS, the papers' flows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import second_order as oracle
from reference import selection
from solvers import problems
from solvers.problems import BLOCK, DAMPING, KERNELS, dense, rows, vector

import jaxsparse as js

GLOBAL = js.Unstructured("global")


@functools.cache
def gradients(seed=0):
    return problems.grads(seed)


@functools.cache
def block_fisher(size=BLOCK, pattern=GLOBAL, seed=0):
    return js.curvature.block_fisher(
        gradients(seed), block_size=size, damping=DAMPING, pattern=pattern
    )


def close(got, expected, rtol=2e-5):
    """Relative to the largest; everything but the weights themselves is in float64."""
    np.testing.assert_allclose(
        got, expected, atol=rtol * np.abs(expected).max(), rtol=0
    )


def removed_of(pruned):
    return ~vector(pruned.masks).astype(bool)


# The update.


@pytest.mark.parametrize("kind", ["block", "mfac", "mfac, blocks"])
def test_the_joint_update_is_the_optimum_of_the_dense_problem(kind):
    params, grads = problems.params(), gradients()
    fisher, expected = {
        "block": (block_fisher, dense(grads)),
        "mfac": (
            lambda: js.curvature.mfac(grads, damping=DAMPING),
            oracle.fisher(vector(grads), DAMPING),
        ),
        "mfac, blocks": (
            lambda: js.curvature.mfac(grads, damping=DAMPING, block_size=BLOCK),
            dense(grads),
        ),
    }[kind]
    pruned = js.solvers.obs(params, fisher(), 0.5, pattern=GLOBAL)
    close(
        vector(pruned.params),
        oracle.obs_joint(vector(params), expected, removed_of(pruned)),
    )


def only_a(tree):
    return {"a": {"kernel": tree["a"]["kernel"], "bias": None}}


@functools.partial(jax.jit, static_argnames=("size", "sparsity", "pattern", "greedy"))
def of_blocks(params, grads, *, size=BLOCK, sparsity=0.5, pattern, greedy=False):
    """The whole of it as one program."""
    fisher = js.curvature.block_fisher(
        grads, block_size=size, damping=DAMPING, pattern=pattern
    )
    return js.solvers.obs(params, fisher, sparsity, pattern=pattern, greedy=greedy)


def test_in_float64_to_nine_digits(x64):
    params = only_a(problems.params(dtype="float64"))
    grads = only_a(problems.grads(dtype="float64"))
    pruned, masks = of_blocks(params, grads, pattern=GLOBAL)
    got, w = pruned["a"]["kernel"], rows(params["a"]["kernel"])
    assert got.dtype == jnp.float64
    removed = ~rows(masks["a"]["kernel"]).astype(bool)
    assert removed.sum() == 48
    fisher = oracle.fisher(rows(grads["a"]["kernel"]), DAMPING)
    expected = oracle.obs_joint(w, problems.blocked(fisher), removed)
    close(rows(got), expected, rtol=1e-9)


def test_weights_in_float64_keep_their_digits_beside_a_matrix_in_float32():
    fisher = block_fisher()
    with jax.enable_x64(True):
        params = problems.params(dtype="float64")
        prune = jax.jit(lambda p, f: js.solvers.obs(p, f, 1 / 192, pattern=GLOBAL))
        changed = vector(prune(params, fisher).params) != vector(params)
    assert 1 <= changed.sum() <= BLOCK


def test_a_diagonal_matrix_changes_nothing_else():
    params = problems.params()
    fisher = js.curvature.diagonal_fisher(gradients(), damping=DAMPING)
    for update in ("joint", "independent", "none"):
        pruned = js.solvers.obs(params, fisher, 0.5, update=update)
        for k in KERNELS:
            kept = pruned.masks[k]["kernel"]
            expected = np.where(kept, params[k]["kernel"], 0)
            np.testing.assert_array_equal(pruned.params[k]["kernel"], expected)


def test_a_kronecker_matrix_adds_up_single_updates():
    params, grads = problems.params(), gradients()
    fisher = js.curvature.kronecker_fisher(grads, damping=DAMPING)
    pruned = js.solvers.obs(params, fisher, 0.25, update="independent")
    for k in KERNELS:
        g = np.swapaxes(np.asarray(grads[k]["kernel"], np.float64), 1, 2)
        inputs, outputs = np.einsum("mij,mik->jk", g, g), np.einsum("mij,mkj->ik", g, g)
        product = np.kron(outputs, inputs) / (problems.M * np.trace(inputs))
        inverse = np.linalg.inv(product + DAMPING * np.eye(96))
        w = rows(params[k]["kernel"])
        remove = ~oracle.lowest_removed(w**2 / np.diag(inverse), 0.25)
        np.testing.assert_array_equal(
            ~rows(pruned.masks[k]["kernel"]).astype(bool), remove
        )
        close(
            rows(pruned.params[k]["kernel"]),
            oracle.obs_independent(w, inverse, remove),
            rtol=1e-4,
        )


# The choice.


def test_without_update_and_greed_it_is_pruning_by_the_score():
    params, fisher = problems.params(), block_fisher()
    score = lambda p: js.scores.obs(p, js.curvature.inverse_diagonal(fisher))
    expected = js.prune(params, 0.5, score=score, pattern=GLOBAL)
    got = js.solvers.obs(params, fisher, 0.5, pattern=GLOBAL, update="none")
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_tiles_are_chosen_by_their_joint_loss_and_removed_together():
    pattern = js.Block((2, 2))
    params, grads = problems.params(), gradients()
    pruned = of_blocks(params, grads, pattern=pattern)

    def in_tiles(kernel):
        """Tiles of one pair of outputs are neighbours, and so are their weights."""
        kernel = np.asarray(kernel, np.float64)
        tiles = kernel.reshape(*kernel.shape[:-2], 6, 2, 4, 2)
        return np.moveaxis(tiles, (-2, -4, -1, -3), (-4, -3, -2, -1)).reshape(
            *kernel.shape[:-2], -1
        )

    for k in KERNELS:
        w = in_tiles(params[k]["kernel"])
        fisher = oracle.fisher(in_tiles(grads[k]["kernel"]), DAMPING)
        fisher = problems.blocked(fisher)
        losses = oracle.group_scores(
            w, np.linalg.inv(fisher), np.arange(96).reshape(-1, 4)
        )
        remove = ~oracle.lowest_removed(losses, 0.5).repeat(4)
        got = in_tiles(pruned.params[k]["kernel"])
        np.testing.assert_array_equal(got == 0, remove)
        close(got, oracle.obs_joint(w, fisher, remove))


def test_greedy_in_one_block_is_exact_obs():
    params = only_a(problems.params())
    pruned = of_blocks(
        params, only_a(gradients()), size=96, pattern=GLOBAL, greedy=True
    )
    fisher = oracle.fisher(rows(gradients()["a"]["kernel"]), DAMPING)
    expected, _ = oracle.obs_greedy(rows(params["a"]["kernel"]), fisher, 48)
    got = rows(pruned.params["a"]["kernel"])
    np.testing.assert_array_equal(got == 0, expected == 0)
    close(got, expected)


def traces(w, fisher):
    """For each block the order in which exact OBS removes, and the loss at each turn:
    the largest so far, as nobody can stop in a turn that is cheaper than an earlier."""
    found = []
    for block in oracle.blocks_of(len(w), BLOCK):
        part = fisher[block, block]
        _, order = oracle.obs_greedy(w[block], part, BLOCK)
        losses = []
        for k in range(1, BLOCK + 1):
            remove = np.isin(np.arange(BLOCK), order[:k])
            joint = oracle.obs_joint(w[block], part, remove)
            losses.append(oracle.loss_increase(joint - w[block], part))
        found.append((order, np.maximum.accumulate(np.diff([0.0, *losses]))))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_greedy_in_many_blocks_stops_each_where_the_others_are_cheaper(seed):
    params = problems.params(seed)
    fisher = dense(gradients(seed))
    w = vector(params)
    pruned = js.solvers.obs(
        params, block_fisher(seed=seed), 0.5, pattern=GLOBAL, greedy=True
    )
    found = traces(w, fisher)
    limit = np.sort(np.concatenate([losses for _, losses in found]))[95]
    counts, expected = [], []
    for (_, losses), block in zip(found, oracle.blocks_of(192, BLOCK), strict=True):
        counts.append(int((losses <= limit).sum()))
        part = fisher[block, block]
        expected.append(oracle.obs_greedy(w[block], part, counts[-1])[0])
    assert sum(counts) == 96
    assert len(set(counts)) > 2
    got = vector(pruned.params)
    np.testing.assert_array_equal(got == 0, np.concatenate(expected) == 0)
    close(got, np.concatenate(expected))


@pytest.mark.parametrize("most", [1, 2])
def test_greedy_nm_takes_the_cheapest_weight_of_a_group_that_is_not_full(most):
    pattern = js.NM(2, 4)
    params = problems.params()
    pruned = js.solvers.obs(
        params, block_fisher(pattern=pattern), most / 4, pattern=pattern, greedy=True
    )
    fisher = dense(gradients())
    got = vector(pruned.params)
    for block in oracle.blocks_of(192, BLOCK):
        w, part, order = vector(params)[block], fisher[block, block], []
        while len(order) < most * BLOCK // 4:
            full = [
                g for g in range(BLOCK // 4) if sum(q // 4 == g for q in order) == most
            ]
            costs = {}
            for q in set(range(BLOCK)) - set(order):
                if q // 4 not in full:
                    remove = np.isin(np.arange(BLOCK), [*order, q])
                    change = oracle.obs_joint(w, part, remove) - w
                    costs[q] = oracle.loss_increase(change, part)
            order.append(min(costs, key=lambda q: costs[q]))
        remove = np.isin(np.arange(BLOCK), order)
        np.testing.assert_array_equal(got[block] == 0, remove)
        close(got[block], oracle.obs_joint(w, part, remove))


# Losses.


@pytest.mark.parametrize("seed", range(4))
def test_what_is_more_exact_costs_less(seed):
    params, fisher = problems.params(seed), block_fisher(seed=seed)
    call = functools.partial(js.solvers.obs, params, fisher, 0.6, pattern=GLOBAL)
    cost = lambda pruned: problems.loss(dense(gradients(seed)), pruned.params, params)
    greedy, joint = cost(call(greedy=True)), cost(call())
    independent, none = cost(call(update="independent")), cost(call(update="none"))
    assert greedy < cost(call(steps=4)) < joint < min(independent, none)


# The papers' flows.


SPARSITIES = (0.25, 0.5, 0.75)


@pytest.mark.parametrize("group", [1, 4])
def test_the_gradual_flow_of_obert(group):
    """SparseML's: blocks of 36, the last one of 24; fresh gradients at each step.

    Without its epsilon, which it adds to denominators of single weights (1.2e-7, and
    the least diagonal is 1e-2 here) and which is not in its paper.
    """
    pattern = js.Block((4, 1)) if group == 4 else js.Unstructured()
    params = problems.params()
    steps = oracle.sparseml_block_flow(
        rows(params["a"]["kernel"]),
        [rows(gradients(seed)["a"]["kernel"]) for seed in range(3)],
        SPARSITIES,
        block_size=36,
        damping=DAMPING,
        group=group,
        eps=0.0,
    )
    masks = None
    for seed, (sparsity, step) in enumerate(zip(SPARSITIES, steps, strict=True)):
        params, masks = js.solvers.obs(
            params,
            block_fisher(36, pattern, seed),
            sparsity,
            pattern=pattern,
            where="a/kernel",
            masks=masks,
            update="independent",
        )
        np.testing.assert_array_equal(rows(masks["a"]["kernel"]), step.mask)
        close(rows(params["a"]["kernel"]), step.w)


def test_its_epsilon_changes_less_than_rounding_here():
    w, grads = rows(problems.params()["a"]["kernel"]), rows(gradients()["a"]["kernel"])
    flow = functools.partial(
        oracle.sparseml_block_flow, w, [grads], [0.5], block_size=36, damping=DAMPING
    )
    (with_it,), (without,) = flow(), flow(eps=0.0)
    np.testing.assert_array_equal(with_it.mask, without.mask)
    close(with_it.w, without.w)


def test_the_flow_of_the_mfac_pruner_with_one_matrix():
    params = problems.params()
    steps = oracle.mfac_pruner_flow(
        vector(params),
        [vector(gradients(seed)) for seed in range(3)],
        SPARSITIES,
        block_size=192,
        damping=DAMPING,
    )
    masks = None
    for seed, (sparsity, step) in enumerate(zip(SPARSITIES, steps, strict=True)):
        params, masks = js.solvers.obs(
            params,
            js.curvature.mfac(gradients(seed), damping=DAMPING),
            sparsity,
            pattern=GLOBAL,
            masks=masks,
            update="independent",
        )
        np.testing.assert_array_equal(rows_of(masks), step.mask)
        close(vector(params), step.w, rtol=1e-4)


def rows_of(masks):
    return vector(masks).astype(bool)


def test_the_flow_of_the_mfac_pruner_with_blocks_that_move():
    """Its blocks are those of the weights that are left, over all parameters: to have
    them, hand over these weights as one vector."""
    w = vector(problems.params())
    grads = [vector(gradients(seed)) for seed in range(2)]
    steps = oracle.mfac_pruner_flow(
        w, grads, SPARSITIES[:2], block_size=20, damping=DAMPING
    )
    kept, left = np.arange(192), w

    @functools.partial(jax.jit, static_argnums=2)
    def prune(w, grads, sparsity):
        fisher = js.curvature.mfac({"w": grads}, damping=DAMPING, block_size=20)
        return js.solvers.obs(
            {"w": w}, fisher, sparsity, where="w", update="independent"
        )

    for g, sparsity, step in zip(grads, SPARSITIES, steps, strict=False):
        now = selection.removed_count(sparsity, 192) - (192 - kept.size)
        single = [jnp.asarray(x, jnp.float32) for x in (left, g[:, kept])]
        pruned = prune(*single, now / kept.size)
        alive = np.asarray(pruned.masks["w"])
        kept, left = kept[alive], np.asarray(pruned.params["w"], np.float64)[alive]
        np.testing.assert_array_equal(np.isin(np.arange(192), kept), step.mask)
        close(left, step.w[step.mask], rtol=1e-4)


def test_the_flow_of_woodfisher():
    """Blocks of each layer, the last one ragged, and one budget for all layers. Its
    score lacks the 1/2, and has an epsilon of 1e-10: the order is the same."""
    params, grads = problems.params(), gradients()
    w = vector(params)
    inverse = np.zeros((192, 192))
    for layer, k in enumerate(KERNELS):
        flat = rows(grads[k]["kernel"])
        blocks = oracle.blocks_of(96, 36)
        for block in blocks:
            at = slice(96 * layer + block.start, 96 * layer + block.stop)
            inverse[at, at] = oracle.inverse_by_rank_one(flat[:, block], DAMPING)
    remove = ~oracle.lowest_removed(w**2 / (np.diag(inverse) + 1e-10) + 1e-10, 0.5)
    pruned = js.solvers.obs(
        params, block_fisher(36), 0.5, pattern=GLOBAL, update="independent"
    )
    np.testing.assert_array_equal(removed_of(pruned), remove)
    close(vector(pruned.params), oracle.obs_independent(w, inverse, remove))
