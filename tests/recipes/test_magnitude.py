"""Gradual and one-shot recipes: their numbers, and trainings through all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

# optax's cosine multiplies integers by floats.
pytestmark = pytest.mark.usefixtures("relaxed_promotion")

X = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
LABELS = np.int32(X[:, :4].argmax(-1))


def network(seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(np.float32(rng.standard_normal(s) / s[0] ** 0.5))
    return {"up": {"kernel": draw(8, 16)}, "down": {"kernel": draw(16, 4)}}


def logits_of(params):
    return jnp.tanh(X @ params["up"]["kernel"]) @ params["down"]["kernel"]


def trained(recipe, tx, params, opt_state, teacher=None):
    """Through the whole recipe in one program; the counts of zeros after each step."""

    def loss_fn(params):
        given = None if teacher is None else logits_of(teacher)
        return recipe.loss(logits_of(params), given, LABELS).mean()

    def step(carry, _):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        zeros = jnp.stack([jnp.sum(w == 0) for w in jax.tree.leaves(params)])
        return (params, opt_state), (zeros, loss)

    run = lambda carry: jax.lax.scan(step, carry, length=recipe.total_steps)
    return jax.jit(run)((params, opt_state))


def test_gmp_cuts_along_the_cubic_curve():
    recipe = js.recipes.gmp(1_000, final=0.8, init=0.2, begin=0.2, end=0.7, interval=50)
    t = np.arange(1_000)
    due = np.asarray(jax.vmap(recipe.every)(t))
    assert t[due].tolist() == list(range(200, 701, 50))
    left = (1 - np.clip((t - 200) / 500, 0, 1)) ** 3
    expected = np.where(t < 200, 0, 0.8 + (0.2 - 0.8) * left)
    got = np.asarray(jax.jit(recipe.sparsity)(t))
    np.testing.assert_allclose(got, expected, atol=2e-7)
    rate = np.asarray(jax.jit(recipe.learning_rate)(t))
    np.testing.assert_allclose(
        rate, 0.5e-3 * (1 + np.cos(np.pi * t / 1_000)), atol=1e-9
    )


@pytest.mark.parametrize("steps", [7, 100, 1_234, 10_000])
def test_the_last_cut_of_gmp_reaches_the_target(steps):
    recipe = js.recipes.gmp(steps, final=0.9)
    last = recipe.every.last()
    assert recipe.sparsity(last) == np.float32(0.9)
    assert last < steps
    recipe.optimizer()  # checks the horizon


def test_a_model_is_trained_through_gmp():
    recipe = js.recipes.gmp(60, final=0.75, learning_rate=(3e-2, 1e-3), interval=5)
    params = network()
    tx = recipe.optimizer()
    (params, state), (zeros, losses) = trained(recipe, tx, params, tx.init(params))
    js.assert_sparse(state, params)
    cuts = np.array(range(6, 46, 5))
    latest = np.searchsorted(cuts, np.arange(60), side="right") - 1
    asked = np.where(latest < 0, 0, np.asarray(recipe.sparsity(cuts))[latest])
    sizes = np.array([64, 128])  # of down and up
    np.testing.assert_array_equal(zeros, np.floor(asked[:, None] * sizes + 0.5))
    assert losses[-1] < 0.5 * losses[0]


def test_one_cut_and_fine_tuning_with_masks_of_any_pruner():
    recipe = js.recipes.one_shot(30, sparsity=0.5, learning_rate=(1e-2, 0.0))
    teacher = network()
    params, masks = js.prune(teacher, js.allocations.erk(teacher, 0.5))
    tx = recipe.optimizer(masks=masks)
    (params, state), (zeros, _) = trained(recipe, tx, params, tx.init(params))
    js.assert_sparse(state, params)
    kept = jax.tree.map(lambda m: int(m.sum()), masks)
    assert jax.tree.map(lambda w: int((w != 0).sum()), params) == kept
    assert len({tuple(row) for row in np.asarray(zeros)}) == 1


def test_one_shot_cuts_by_itself_before_the_first_step():
    recipe = js.recipes.one_shot(30, sparsity=0.5)
    tx = recipe.optimizer()
    params, state = js.init_sparse(tx, network())
    assert js.patterns.sparsity_of(js.masks_of(state), params) == {
        "up": {"kernel": 0.5},
        "down": {"kernel": 0.5},
    }


def test_sgd_in_the_place_of_adamw():
    recipe = js.recipes.gmp(20, final=0.5, interval=2, learning_rate=(0.1, 0.0))
    tx = recipe.optimizer(lambda rate: optax.sgd(rate, momentum=0.9))
    by_hand = js.prune_schedule(
        recipe.sparsity, every=recipe.every, total_steps=20
    ).wrap(optax.sgd(recipe.learning_rate, momentum=0.9))
    params = network()
    (one, _), _ = trained(recipe, tx, params, tx.init(params))
    (other, _), _ = trained(recipe, by_hand, params, by_hand.init(params))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_optimizer_of_obert_prunes_by_its_fisher_matrix():
    recipe = js.recipes.obert_downstream(4, epochs=7.5)._replace(where="kernel")
    params = network()
    by_hand = js.prune_schedule(
        recipe.sparsity,
        every=recipe.every,
        score=js.transforms.windowed_obs(
            window=1024,
            block_size=50,
            damping=1e-7,
            pattern=recipe.pattern,
            where="kernel",
            summed=True,
        ),
        pattern=recipe.pattern,
        where="kernel",
    ).wrap(optax.adamw(recipe.learning_rate, weight_decay=0.0))
    found = []
    for tx in (recipe.optimizer(), by_hand):
        start = jax.jit(functools.partial(js.init_sparse, tx))
        (got, state), _ = trained(recipe, tx, *start(params), teacher=params)
        js.assert_sparse(state, got)
        found.append(got)
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_loss_has_the_shares_of_the_recipe():
    student, teacher = (np.float32(X[:, i : i + 4]) for i in (0, 4))
    task = optax.softmax_cross_entropy_with_integer_labels(student, LABELS)
    alone = js.recipes.gmp(10)
    np.testing.assert_allclose(alone.loss(student, labels=LABELS), task, rtol=1e-6)
    both = js.recipes.one_shot(10, hardness=0.5, temperature=3.0)
    expected = js.losses.distill(
        student, teacher, LABELS, temperature=3.0, hardness=0.5
    )
    np.testing.assert_array_equal(both.loss(student, teacher, LABELS), expected)
    with pytest.raises(ValueError, match=r"teacher_logits: missing.*hardness 0\.5"):
        both.loss(student, labels=LABELS)


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        ("gmp", {"begin": 0.8}, ValueError, r"0 <= begin < end <= 1; got 0\.8 and"),
        ("gmp", {"begin": "a"}, TypeError, "begin"),
        ("gmp", {"final": 0.5, "init": 0.7}, ValueError, "weights would grow back"),
        ("gmp", {"interval": 90}, ValueError, "no two cuts fall between"),
        ("gmp", {"learning_rate": 1e-3}, TypeError, r"a pair \(peak, end\)"),
        ("gmp", {"learning_rate": (1e-4, 1e-3)}, ValueError, "learning_rate falls"),
        ("gmp", {"hardness": 1.5}, ValueError, "hardness"),
        ("one_shot", {"sparsity": 50}, ValueError, r"write 0\.5"),
        ("one_shot", {"weight_decay": -1.0}, ValueError, "weight_decay"),
        ("one_shot", {"temperature": 0.0}, ValueError, "temperature"),
        ("one_shot", {"total_steps": 0}, ValueError, "total_steps"),
    ],
)
def test_what_makes_no_recipe_is_refused(make, change, error, message):
    with pytest.raises(error, match=message):
        getattr(js.recipes, make)(**{"total_steps": 100} | change)


def test_an_optimizer_that_cannot_be_made_is_refused():
    recipe = js.recipes.one_shot(10)
    with pytest.raises(TypeError, match="inner"):
        recipe.optimizer(optax.adam(1e-3))
    masks = js.prune(network(), 0.5).masks
    with pytest.raises(ValueError, match="score: fixed masks are not scored"):
        recipe.optimizer(masks=masks, score=js.scores.magnitude)
