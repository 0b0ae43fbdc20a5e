"""GMP* beside oBERT: when it cuts, how far, and what the learning rate does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.recipes import gmp_star, obert_downstream


def values(schedule, steps):
    return np.asarray(jax.jit(schedule)(np.asarray(steps)))


def test_it_is_oberts_training_scored_by_magnitude():
    mine, theirs = gmp_star(100, final=0.97), obert_downstream(100, final=0.97)
    t = np.arange(mine.total_steps + 50)
    np.testing.assert_array_equal(values(mine.sparsity, t), values(theirs.sparsity, t))
    rates = (values(x.learning_rate, t) for x in (mine, theirs))
    np.testing.assert_array_equal(*rates)
    own = {"temperature": 5.5, "block_size": None, "damping": None}
    own |= {"gradients": None, "examples_per_gradient": None}
    for name in set(mine._fields) - {"sparsity", "learning_rate"}:
        assert getattr(mine, name) == own.get(name, getattr(theirs, name)), name
    assert (mine.hardness, theirs.temperature) == (1.0, 2.0)


@pytest.mark.parametrize(("epochs", "cuts"), [(30, 7), (10, 4), (60, 13), (7.5, 2)])
def test_the_learning_rate_is_rewound_at_each_cut(epochs, cuts):
    recipe = gmp_star(120, epochs=epochs, cuts=cuts, final=0.95)
    steps = np.array(recipe.every.steps)
    assert len(steps) == cuts
    total = recipe.total_steps
    assert (steps[0], steps[-1]) == (round(total / 15), round(26 * total / 30))
    assert np.ptp(np.diff(steps)) <= 1  # equally far apart, to the nearest step
    rates = values(recipe.learning_rate, np.arange(total))
    np.testing.assert_allclose(rates[steps], 8e-5, rtol=1e-6)
    np.testing.assert_allclose(rates[[*(steps[1:] - 1), total - 1]], 8e-6, rtol=1e-6)
    sparsities = values(recipe.sparsity, [steps[0] - 1, *steps, total - 1])
    np.testing.assert_allclose(sparsities[[0, 1, -2, -1]], [0, 0.7, 0.95, 0.95])
    left = (1 - np.arange(cuts) / (cuts - 1)) ** 3  # cubic, at equal distances
    np.testing.assert_allclose(sparsities[1:-1], 0.95 - 0.25 * left, atol=2e-3)


@pytest.mark.usefixtures("relaxed_promotion")
def test_it_prunes_the_kernels_of_the_blocks_in_one_ranking():
    rng = np.random.default_rng(0)
    kernel = lambda scale, *s: {"kernel": scale * rng.standard_normal(s).astype("f4")}
    params = {
        "embed": {"kernel": np.ones((6, 8), np.float32)},
        "layer_0": {"mlp": {"up": kernel(1.0, 8, 16), "down": kernel(0.1, 16, 8)}},
        "classifier": kernel(1.0, 8, 3),
    }
    recipe = gmp_star(1, epochs=30, final=0.9)
    tx = recipe.optimizer()
    step = jax.jit(tx.update)
    state = jax.jit(tx.init)(params)
    removed = {}
    for t in range(recipe.total_steps):
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, state = step(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        masks = dict(js.tree.leaves_with_paths(js.masks_of(state)))
        removed[t] = sum(int((~np.asarray(m)).sum()) for m in masks.values())
    cuts = recipe.every.steps
    assert cuts == (2, 6, 10, 14, 18, 22, 26)
    exact = 0.9 - 0.2 * (1 - np.arange(7) / 6) ** 3
    expected = np.floor(exact * 256 + 0.5)
    np.testing.assert_array_equal([removed[t] for t in cuts], expected)
    assert [removed[0], removed[5], removed[29]] == [0, expected[0], expected[-1]]
    # One ranking: the smaller matrix loses all but a few, what is no kernel nothing.
    small, large = (masks[f"layer_0/mlp/{k}/kernel"].mean() for k in ("down", "up"))
    assert float(small) < 0.05 < 0.15 < float(large)
    assert masks["classifier/kernel"].shape == masks["embed/kernel"].shape == ()


def test_its_loss_is_the_teachers_alone():
    recipe = gmp_star(100, temperature=2.0)
    student, teacher = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])
    p, q = (np.exp(x) / np.exp(x).sum() for x in (np.array([0, 0.5]), np.array([1, 0])))
    expected = 4 * np.sum(p * np.log(p / q))
    np.testing.assert_allclose(recipe.loss(student, teacher)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cuts": 1}, ValueError, "cuts must be at least 2"),
        ({"cuts": 2.5}, TypeError, "cuts must be an integer"),
        ({"final": 0.5}, ValueError, "final=0.5 is below init=0.7"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0"),
        ({"steps_per_epoch": 1, "cuts": 60}, ValueError, "too few"),
        ({"where": "kernel("}, ValueError, "no regular expression"),
        ({"learning_rate": 8e-5}, TypeError, r"a pair \(peak, end\)"),
    ],
)
def test_what_makes_no_recipe_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        gmp_star(**{"steps_per_epoch": 100} | change)
