"""The oracles of second-order pruning agree with each other and with np.linalg."""

import numpy as np
import pytest
from reference import second_order as so

DAMPING = 1e-3


def problem(m: int, d: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, d)), rng.standard_normal(d)


def close(got, want):
    """To ten digits of the largest: where entries cancel, BLAS kernels differ."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())


@pytest.mark.parametrize(("m", "d"), [(40, 12), (12, 12), (5, 12), (1, 12)])
def test_both_recursions_give_the_dense_inverse(m, d):
    grads, x = problem(m, d)
    expected = np.linalg.inv(so.fisher(grads, DAMPING))
    close(so.inverse_by_rank_one(grads, DAMPING), expected)
    static = so.mfac_static(grads, DAMPING)
    close(so.static_ihvp(static, x), expected @ x)
    close(so.static_diagonal(static), np.diag(expected))
    window = so.mfac_dynamic(m, d, DAMPING)
    for g in grads:
        window = so.dynamic_update(window, g)
    close(so.dynamic_ihvp(window, x), expected @ x)


def test_the_last_block_is_smaller_and_blocks_do_not_meet():
    grads, _ = problem(6, 10)
    inverses = so.block_inverses(grads, DAMPING, 4)
    assert [len(h) for h in inverses] == [4, 4, 2]
    np.testing.assert_allclose(
        inverses[2], np.linalg.inv(so.fisher(grads[:, 8:], DAMPING)), rtol=1e-9
    )


def test_the_window_wraps_and_counts_its_empty_rows():
    grads, _ = problem(7, 5)
    m, window = 3, so.mfac_dynamic(3, 5, DAMPING)
    for t, g in enumerate(grads):
        u, window = so.update_mul(window, g)
        held = np.zeros((m, 5))
        held[: min(t + 1, m)] = grads[max(0, t + 1 - m) : t + 1]
        np.testing.assert_allclose(
            u, np.linalg.solve(so.fisher(held, DAMPING), g), rtol=1e-9
        )
    assert window.last == 7 % m
    np.testing.assert_allclose(window.dots, window.grads @ window.grads.T, rtol=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_optimizer_follows_the_push_through_identity(sparse):
    """`F^-1 g_j = m G^T (m damping I + G G^T)^-1 e_j` for a row of the window."""
    noise, w = problem(9, 6)
    w[[1, 4]] = 0.0
    alive = w != 0 if sparse else np.ones(6, bool)
    target, scale = np.arange(6.0), np.linspace(0.5, 2, 6)
    gradient = lambda w, step: scale * (w - target) + 0.1 * noise[step]
    path = so.mfac_optimizer(
        gradient,
        w,
        steps=9,
        learning_rate=0.05,
        window=4,
        damping=DAMPING,
        momentum=0.9,
        weight_decay=0.1,
        sparse=sparse,
    )
    held, velocity, at = np.zeros((4, 6)), np.zeros(6), w.copy()
    for step in range(9):
        row = step % 4
        held[row] = np.where(alive, gradient(at, step) + 0.1 * at, 0.0)
        gram = 4 * DAMPING * np.eye(4) + held @ held.T
        u = 4 * held.T @ np.linalg.inv(gram)[:, row]
        velocity = 0.9 * velocity + 0.1 * u
        at = at - 0.05 * velocity
        close(path[step + 1], at)
    assert np.array_equal(path[-1] == 0, ~alive)
    # Far more than rounding: the steps did something.
    assert not np.allclose(path[-1][alive], w[alive], atol=0.01)


def test_the_joint_update_is_the_least_and_solves_the_constraint():
    grads, w = problem(30, 8)
    fisher = so.fisher(grads, DAMPING)
    inverse = np.linalg.inv(fisher)
    q = np.array([1, 2, 6])
    remove = np.isin(np.arange(8), q)
    joint = so.obs_joint(w, fisher, remove)
    assert np.all(joint[q] == 0)
    by_inverse = w - inverse[:, q] @ np.linalg.solve(inverse[np.ix_(q, q)], w[q])
    np.testing.assert_allclose(joint, by_inverse, atol=1e-12)
    increase = so.loss_increase(joint - w, fisher)
    np.testing.assert_allclose(so.group_scores(w, inverse, [q])[0], increase)
    for seed in range(20):
        other = 1e-3 * np.random.default_rng(seed).standard_normal(8)
        other[q] = 0
        assert so.loss_increase(joint + other - w, fisher) > increase


def test_a_single_weight_is_removed_alike_by_all():
    grads, w = problem(30, 8)
    fisher = so.fisher(grads, DAMPING)
    inverse = np.linalg.inv(fisher)
    greedy, order = so.obs_greedy(w, fisher, 1)
    scores = so.group_scores(w, inverse, [[i] for i in range(8)])
    np.testing.assert_allclose(scores, w**2 / (2 * np.diag(inverse)))
    assert order == [int(np.argmin(scores))]
    remove = np.isin(np.arange(8), order)
    np.testing.assert_allclose(greedy, so.obs_joint(w, fisher, remove), atol=1e-12)
    np.testing.assert_allclose(
        greedy, so.obs_independent(w, inverse, remove), atol=1e-12
    )


def test_greedy_takes_the_cheapest_next_weight_each_time():
    grads, w = problem(30, 8)
    fisher = so.fisher(grads, DAMPING)

    def cost(removed):
        joint = so.obs_joint(w, fisher, np.isin(np.arange(8), removed))
        return so.loss_increase(joint - w, fisher)

    _, order = so.obs_greedy(w, fisher, 5)
    for k, q in enumerate(order):
        costs = {j: cost([*order[:k], j]) for j in range(8) if j not in order[:k]}
        assert q == min(costs, key=lambda j: costs[j])


def test_joint_beats_independent_and_greedy_chooses_better_on_average():
    """On the same weights joint is never worse, whatever the choice."""
    totals = np.zeros(3)
    for seed in range(30):
        grads, w = problem(20, 12, seed)
        fisher = so.fisher(grads, DAMPING)
        inverse = np.linalg.inv(fisher)
        remove = ~so.lowest_removed(w**2 / np.diag(inverse), 0.5)
        independent = so.obs_independent(w, inverse, remove)
        joint = so.obs_joint(w, fisher, remove)
        greedy, order = so.obs_greedy(w, fisher, 6)
        # One after another with downdates is the joint update of what is removed.
        chosen = np.isin(np.arange(12), order)
        np.testing.assert_allclose(
            greedy, so.obs_joint(w, fisher, chosen), rtol=1e-8, atol=1e-10
        )
        losses = [so.loss_increase(v - w, fisher) for v in (greedy, joint, independent)]
        assert losses[1] <= losses[2] * (1 + 1e-12)
        totals += losses
    assert totals[0] < totals[1] < totals[2]


@pytest.mark.parametrize("group", [1, 4])
def test_the_block_flow_is_obs_in_each_block(group):
    """One step against single pieces: mask, update, exact zeros; later steps add."""
    grads, w = problem(3 * 9, 28)
    grads = grads.reshape(3, 9, 28)
    flow = so.sparseml_block_flow(
        w, grads, [0.3, 0.5, 0.7], block_size=8, damping=DAMPING, group=group, eps=0.0
    )
    inverse = np.zeros((28, 28))
    for block in so.blocks_of(28, 8):
        inverse[block, block] = np.linalg.inv(so.fisher(grads[0][:, block], DAMPING))
    groups = np.arange(28).reshape(-1, group)
    scores = so.group_scores(w, inverse, groups)
    first = np.sort(np.argsort(scores)[: np.floor(0.3 * len(groups) + 0.5).astype(int)])
    removed = groups[first].ravel()
    assert np.flatnonzero(~flow[0].mask).tolist() == removed.tolist()
    expected = w.copy()
    for q in groups[first]:
        pull = np.linalg.solve(inverse[np.ix_(q, q)], w[q])
        expected -= inverse[:, q] @ pull
    expected[removed] = 0
    np.testing.assert_allclose(flow[0].w, expected, rtol=1e-8, atol=1e-11)
    for before, after, sparsity in zip(flow, flow[1:], (0.5, 0.7), strict=False):
        assert not np.any(after.mask & ~before.mask)
        assert np.all(after.w[~after.mask] == 0)
        count = group * np.floor(sparsity * len(groups) + 0.5)
        assert (~after.mask).sum() == count


def test_the_pruner_of_mfac_takes_removed_weights_out_before_blocking():
    grads, w = problem(2 * 9, 20)
    grads = grads.reshape(2, 9, 20)
    flow = so.mfac_pruner_flow(w, grads, [0.3, 0.6], block_size=8, damping=DAMPING)
    assert [(~step.mask).sum() for step in flow] == [6, 12]
    # The second step is a first step of what the first has left.
    left = flow[0].mask
    again = so.mfac_pruner_flow(
        flow[0].w[left], grads[1:, :, left], [6 / 14], block_size=8, damping=DAMPING
    )
    np.testing.assert_array_equal(flow[1].w[left], again[0].w)
    assert np.all(flow[1].w[~flow[1].mask] == 0)
    # With nothing removed before, blocks and arithmetic are those of the other flow.
    other = so.sparseml_block_flow(
        w, grads[:1], [0.3], block_size=8, damping=DAMPING, eps=0.0
    )
    np.testing.assert_allclose(flow[0].w, other[0].w, rtol=1e-8, atol=1e-11)
    np.testing.assert_array_equal(flow[0].mask, other[0].mask)
