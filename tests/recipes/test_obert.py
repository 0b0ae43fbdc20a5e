import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.losses import distill
from jaxsparse.recipes import obert_downstream, obert_upstream

# What SparseML's recipes and the paper's tables say, in epochs.
DOWNSTREAM = [2.0, 6.0, 10.0, 14.0, 18.0, 22.0, 26.0]
SHORT = [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0]
UPSTREAM = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75]


def cubic(t, init, final, begin, end):
    """Zhu & Gupta's curve, and no pruning before it."""
    left = (1 - np.clip((t - begin) / (end - begin), 0, 1)) ** 3
    return np.where(t < begin, 0, final + (init - final) * left)


def falls(t, peak, end, first, cycle):
    """SparseML's `linear` in [0, first), then its `cyclic_linear`."""
    again = peak - (t - first) % cycle / (cycle - 1) * (peak - end)
    return np.where(t < first, peak + (end - peak) * t / max(first, 1), again)


def values(schedule, steps):
    """At many steps at once, in one program."""
    return np.asarray(jax.jit(schedule)(np.asarray(steps)))


def schedule_of(recipe):
    return js.prune_schedule(
        recipe.sparsity,
        every=recipe.every,
        pattern=recipe.pattern,
        where=recipe.where,
        total_steps=recipe.total_steps,
    )


# The schedules


@pytest.mark.parametrize(
    ("recipe", "cuts", "epochs", "final"),
    [
        (obert_downstream(100, final=0.97), DOWNSTREAM, 30, 0.97),
        (obert_downstream(100, epochs=10), SHORT, 10, 0.9),
        (obert_upstream(100, final=0.97), UPSTREAM, 3, 0.97),
    ],
    ids=["downstream", "ten epochs", "upstream"],
)
def test_it_cuts_when_and_as_far_as_the_paper_does(recipe, cuts, epochs, final):
    assert recipe.every.steps == tuple(round(100 * cut) for cut in cuts)
    assert recipe.total_steps == 100 * epochs
    t = np.arange(recipe.total_steps + 50)
    expected = cubic(t, 0.7, final, 100 * cuts[0], 100 * cuts[-1])
    np.testing.assert_allclose(values(recipe.sparsity, t), expected, atol=2e-7)
    assert recipe.sparsity(recipe.every.steps[0]) == np.float32(0.7)
    assert recipe.sparsity(recipe.every.last()) == np.float32(final)


def test_the_sparsities_of_the_published_recipe():
    recipe = obert_downstream(11_000, final=0.9)
    got = [float(recipe.sparsity(t)) for t in recipe.every.steps]
    # 0.9 - 0.2 * ((6 - k) / 6)^3
    expected = [0.7, 0.78426, 0.84074, 0.875, 0.89259, 0.89907, 0.9]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert float(recipe.sparsity(2 * 11_000 - 1)) == 0


def test_the_learning_rate_is_rewound_at_each_cut():
    recipe = obert_downstream(100)
    t = np.arange(recipe.total_steps)
    expected = falls(t, 8e-5, 8e-6, 200, 400)
    np.testing.assert_allclose(recipe.learning_rate(t), expected, rtol=2e-6)
    glue = obert_downstream(100, learning_rate=(5e-5, 5e-6))
    np.testing.assert_allclose(
        glue.learning_rate(t), falls(t, 5e-5, 5e-6, 200, 400), rtol=2e-6
    )
    recipe = obert_upstream(100)
    t = np.arange(recipe.total_steps)
    expected = falls(t, 5e-4, 5e-6, 0, 25)
    np.testing.assert_allclose(recipe.learning_rate(t), expected, rtol=2e-6)


def test_in_ten_epochs_it_is_rewound_once():
    recipe = obert_downstream(100, epochs=10)
    t = np.arange(recipe.total_steps)
    expected = falls(t, 8e-5, 3e-5, 800, 200)
    got = values(recipe.learning_rate, t)
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    peaks = t[got >= 7.999e-5]
    assert peaks.tolist() == [0, 800]


@pytest.mark.parametrize("make", [obert_downstream, obert_upstream])
@pytest.mark.parametrize("steps_per_epoch", [4, 5, 7, 11, 14_754])
@pytest.mark.parametrize("epochs", [3, 7.5, 10, 15, 30, 45])
def test_every_training_reaches_its_target(make, steps_per_epoch, epochs):
    recipe = make(steps_per_epoch, epochs=epochs)
    schedule_of(recipe)  # checks the horizon
    assert recipe.total_steps == int(epochs * steps_per_epoch + 0.5)
    longer = make(1000, epochs=epochs)  # no rounding
    cuts = np.array(longer.every.steps) / 1000
    got = np.array(recipe.every.steps) / steps_per_epoch
    assert np.abs(got - cuts).max() <= 0.5 / steps_per_epoch + 1e-3
    # The peak is at a cut, in whichever step that fell.
    fixed = np.resize(recipe.every.steps, 16)  # one shape for all: compiled once
    rates = np.asarray(recipe.learning_rate(fixed))[: len(cuts)]
    peaks = [t for t, r in zip(recipe.every.steps, rates, strict=True) if r > LEAST]
    short = make is obert_downstream and epochs == 10
    assert peaks == list(recipe.every.steps[-1:] if short else recipe.every.steps)


LEAST = 0.99 * 8e-5


def test_other_lengths_are_the_thirty_epochs_scaled():
    cuts = obert_downstream(20, epochs=15).every.steps
    assert cuts == tuple(round(10 * cut) for cut in DOWNSTREAM)
    assert obert_upstream(10, epochs=6).every.steps == tuple(range(0, 60, 5))


@pytest.mark.parametrize(
    ("make", "least", "epochs"),
    [(obert_upstream, 4, 3), (obert_downstream, 2, 10), (obert_downstream, 1, 7.5)],
)
def test_the_fewest_steps_are_as_the_message_says(make, least, epochs):
    recipe = make(least, epochs=epochs)
    assert np.all(np.diff((*recipe.every.steps, recipe.total_steps)) >= 1)
    if least > 1:
        with pytest.raises(ValueError, match=f"It takes {least} steps an epoch"):
            make(1, epochs=epochs)


# The settings


def test_the_settings_are_those_of_the_published_recipes():
    recipe = obert_downstream(100)
    fisher = (recipe.block_size, recipe.damping, recipe.gradients)
    assert fisher == (50, 1e-7, 1024)
    assert recipe.examples_per_gradient == 8
    assert (recipe.temperature, recipe.hardness) == (2.0, 1.0)
    assert (recipe.pattern, recipe.weight_decay) == (js.Unstructured("global"), 0.0)
    recipe = obert_upstream(100)
    fisher = (recipe.block_size, recipe.damping, recipe.gradients)
    assert fisher == (50, 1e-7, 1024)
    assert recipe.examples_per_gradient == 16
    assert (recipe.temperature, recipe.hardness) == (5.5, 1.0)
    assert (recipe.pattern, recipe.weight_decay) == (js.Unstructured("global"), 0.01)
    assert recipe._replace(temperature=2.0).temperature == 2.0


def test_blocks_of_four_have_a_fisher_that_four_divides():
    recipe = obert_downstream(100, pattern=js.Block((4, 1), scope="global"))
    assert (recipe.block_size, recipe.pattern.shape) == (32, (4, 1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"final": 0.5}, ValueError, r"final=0.5 is below init=0.7"),
        ({"final": 90}, ValueError, r"final must lie in \[0, 1\).*write 0.9"),
        ({"init": -0.1}, ValueError, r"init must lie in"),
        ({"epochs": 0}, ValueError, "epochs must be positive"),
        ({"epochs": "30"}, TypeError, "epochs must be a number"),
        ({"steps_per_epoch": 2.5}, TypeError, "steps_per_epoch must be an integer"),
        ({"learning_rate": 8e-5}, TypeError, r"a pair \(peak, end\)"),
        ({"learning_rate": (8e-6, 8e-5)}, ValueError, "0 <= end <= peak"),
    ],
)
@pytest.mark.parametrize("make", [obert_downstream, obert_upstream])
def test_what_makes_no_recipe_is_refused(make, change, error, message):
    with pytest.raises(error, match=message):
        make(**{"steps_per_epoch": 100} | change)


# What is pruned

PRUNED = [
    # transformers' Flax models: BERT, RoBERTa, DistilBERT, ViT, GPT-2, T5, LLaMA
    *(
        f"bert/encoder/layer/11/{name}/kernel"
        for name in (
            *("attention/self/query", "attention/self/key", "attention/self/value"),
            *("attention/output/dense", "intermediate/dense", "output/dense"),
        )
    ),
    "roberta/encoder/layer/0/attention/self/query/kernel",
    "distilbert/transformer/layer/5/attention/q_lin/kernel",
    "distilbert/transformer/layer/5/ffn/lin1/kernel",
    "vit/encoder/layer/3/attention/attention/query/kernel",
    "transformer/h/0/attn/c_attn/kernel",
    "transformer/h/0/mlp/c_proj/kernel",
    "encoder/block/0/layer/1/DenseReluDense/wi/kernel",
    "model/layers/0/self_attn/q_proj/kernel",
    # Linen, NNX, Equinox; numbered or stacked by a scan
    "layer_0/attn/query/kernel",
    "encoder/layer_10/attention/output/kernel",
    "encoder/layer_0/intermediate/kernel",
    "encoder/layer_0/output/kernel",
    "Transformer/encoderblock_3/MultiHeadDotProductAttention_0/out/kernel",
    "Encoder1DBlock_3/MlpBlock_0/Dense_1/kernel",
    "params/TransformerBlock_1/Dense_0/kernel",
    "blocks/0/mlp/linear1/kernel",
    "layers/0/attention/query_proj/weight",
    "transformer/layers/attn/query/kernel",
    "transformer/layers/0/self_attn/in_proj_weight",
]
DENSE = [
    "bert/embeddings/word_embeddings/embedding",
    "bert/embeddings/position_embeddings/kernel",
    "bert/embeddings/LayerNorm/scale",
    "bert/encoder/layer/0/attention/self/query/bias",
    "bert/encoder/layer/0/attention/output/LayerNorm/scale",
    "bert/encoder/layer/0/attention/output/LayerNorm/weight",
    "bert/encoder/layer/0/output/dense/bias",
    "bert/pooler/dense/kernel",
    "classifier/kernel",
    "qa_outputs/kernel",
    "cls/predictions/transform/dense/kernel",
    "cls/predictions/decoder/kernel",
    "vit/embeddings/patch_embeddings/projection/kernel",
    "transformer/wte/embedding",
    "transformer/h/0/ln_1/scale",
    "transformer/h/0/ln_1/weight",
    "transformer/ln_f/weight",
    "model/layers/0/input_layernorm/weight",
    "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding",
    "lm_head/kernel",
    "layers/0/kernel",
    "dense_layer_1/kernel",
    "output_layer/dense/kernel",
    "LayerNorm_0/scale",
    "Dense_0/kernel",
    "Transformer/posembed_input/pos_embedding",
    "encoder/layer_0/attention/norm/scale",
]


@pytest.mark.parametrize("path", PRUNED)
def test_the_kernels_of_the_blocks_are_pruned(path):
    assert re.search(obert_downstream(100).where, path)


@pytest.mark.parametrize("path", DENSE)
def test_everything_else_stays_dense(path):
    assert not re.search(obert_upstream(100).where, path)


# The whole of it


def bert(seed, width=8):
    """The six kernels of a layer, under the names of transformers' Flax model."""
    rng = np.random.default_rng(seed)
    draw = lambda *s: np.float32(rng.standard_normal(s) / s[0] ** 0.5)
    dense = lambda *shape: {"kernel": draw(*shape)}
    attention = {
        "self": {name: dense(width, width) for name in ("query", "key", "value")},
        "output": {
            "dense": dense(width, width),
            "LayerNorm": {"scale": np.ones(8, "f4")},
        },
    }
    layer = {
        "attention": attention,
        "intermediate": {"dense": dense(width, 2 * width)},
        "output": {"dense": dense(2 * width, width)},
    }
    return {
        "embeddings": {"word_embeddings": {"embedding": draw(16, width)}},
        "encoder": {"layer": {"0": layer}},
        "classifier": {"kernel": 4 * draw(width, 4), "bias": np.zeros(4, "f4")},
    }


def logits_of(params, ids):
    """A network of a few lines that needs all of them."""
    layer = params["encoder"]["layer"]["0"]
    attention, out = layer["attention"]["self"], layer["attention"]["output"]
    x = params["embeddings"]["word_embeddings"]["embedding"][ids].sum(1)
    q, k, v = (x @ attention[name]["kernel"] for name in ("query", "key", "value"))
    x = x + (jnp.tanh(q * k) * v) @ out["dense"]["kernel"] * out["LayerNorm"]["scale"]
    y = jnp.tanh(x @ layer["intermediate"]["dense"]["kernel"])
    x = x + y @ layer["output"]["dense"]["kernel"]
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def train(recipe, params, teacher):
    """One jitted step; the masks' counts and the parameters after each."""
    adamw = optax.adamw(recipe.learning_rate, weight_decay=recipe.weight_decay)
    tx = js.enforce(optax.chain(schedule_of(recipe), adamw))

    def loss(params, ids):
        given = {"temperature": recipe.temperature, "hardness": recipe.hardness}
        return distill(logits_of(params, ids), logits_of(teacher, ids), **given).mean()

    @jax.jit
    def step(params, state, ids):
        value, grads = jax.value_and_grad(loss)(params, ids)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = jax.jit(functools.partial(js.init_sparse, tx))(params)
    pruned, losses = [], []
    rng = np.random.default_rng(7)
    for _ in range(recipe.total_steps):
        ids = rng.integers(16, size=(16, 6))
        params, state, value = step(params, state, ids)
        losses.append(float(value))
        masks = jax.tree.leaves(js.masks_of(state))
        pruned.append(sum(int((~np.asarray(m)).sum()) for m in masks))
    return params, state, np.array(pruned), np.array(losses)


N = 4 * 64 + 2 * 128  # the six kernels


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            obert_downstream(3, final=0.9, learning_rate=(2e-2, 2e-3)), id="downstream"
        ),
        pytest.param(
            obert_upstream(6, final=0.97), id="upstream", marks=pytest.mark.exhaustive
        ),
    ],
)
@pytest.mark.usefixtures("relaxed_promotion")
def test_a_model_is_trained_through_the_whole_recipe(recipe):
    teacher = jax.tree.map(jnp.asarray, bert(0))
    params, state, pruned, losses = train(recipe, teacher, teacher)
    # Exactly the count of the schedule at each cut, and no change between them.
    cuts = np.array(recipe.every.steps)
    t = np.arange(recipe.total_steps)
    latest = np.where(t < cuts[0], -1, np.searchsorted(cuts, t, side="right") - 1)
    asked = np.where(latest < 0, 0, np.float64(values(recipe.sparsity, cuts))[latest])
    np.testing.assert_array_equal(pruned, np.floor(asked * N + 0.5))
    assert np.unique(pruned).size >= len(cuts) - 3  # late cuts take few of 512
    js.assert_sparse(state, params)

    # Only the six kernels, and zeros that are exactly 0.
    masks = js.masks_of(state)
    kept = [path for path, mask in js.tree.leaves_with_paths(masks) if mask.ndim == 0]
    assert sum("kernel" in path for path in kept) == 1  # the classifier's
    assert sum(bool(np.all(mask)) for mask in jax.tree.leaves(masks)) >= len(kept)
    zeros = sum(
        int((np.asarray(w) == 0).sum())
        for path, w in js.tree.leaves_with_paths(params)
        if re.search(recipe.where, path)
    )
    assert zeros == pruned[-1] == int(np.floor(float(recipe.sparsity(10**6)) * N + 0.5))
    if cuts[0] > 0:
        shock = losses[cuts[0] + 1]  # the first loss of a pruned network
        assert shock > 2 * losses[: cuts[0] + 1].max()
        assert losses[-6:].mean() < shock / 2


def test_each_cut_and_its_rewound_learning_rate_come_in_one_step():
    recipe = obert_upstream(12)
    tx = js.enforce(optax.chain(schedule_of(recipe), optax.sgd(recipe.learning_rate)))
    kernel = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)
    params = {
        "layer_0": {"attn": {"query": {"kernel": kernel}}},
        "classifier": {"bias": np.zeros(1, np.float32)},
    }
    grads = jax.tree.map(np.ones_like, params)
    params, state = jax.jit(functools.partial(js.init_sparse, tx))(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    taken, pruned = [], []
    for _ in range(recipe.total_steps):
        params, state, updates = step(params, state)
        taken.append(-float(np.asarray(updates["classifier"]["bias"])[0]))
        kernel = np.asarray(params["layer_0"]["attn"]["query"]["kernel"])
        pruned.append(int((kernel == 0).sum()))
    rewound = [t for t in range(36) if taken[t] > 4.99e-4]
    assert rewound == list(recipe.every.steps) == list(range(0, 36, 3))
    changed = [0, *(t for t in range(1, 36) if pruned[t] != pruned[t - 1])]
    assert set(changed) <= set(rewound)
    assert len(changed) >= 10
    assert (pruned[0], pruned[-1]) == (140, 180)
    np.testing.assert_allclose(taken, falls(np.arange(36), 5e-4, 5e-6, 0, 3), rtol=2e-6)


def test_a_block_of_four_is_four_inputs_of_one_output():
    recipe = obert_upstream(4, pattern=js.Block((4, 1), scope="global"))
    kernel = np.random.default_rng(0).standard_normal((16, 20)).astype(np.float32)
    up = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(kernel[0])}
    params = {"layer_0": {"mlp": {"up": up}}}
    masks = js.patterns.masks(
        js.scores.magnitude(params),
        float(recipe.sparsity(recipe.every.last())),
        pattern=recipe.pattern,
        where=recipe.where,
    )
    kept = np.asarray(masks["layer_0"]["mlp"]["up"]["kernel"]).reshape(4, 4, 20).sum(1)
    assert set(kept.ravel().tolist()) == {0, 4}
    assert (kept == 0).sum() == 72  # 0.9 of 80
    assert np.all(masks["layer_0"]["mlp"]["up"]["bias"])
