# %% [markdown]
# # A score of your own
#
# A score says how much each weight matters: a tree of arrays like the parameters, where
# larger means keep. A plain function of `(params, grads)` will do; a score that
# remembers is three functions in a `js.scores.Score`. Both go where
# `js.scores.magnitude` would.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import optax
import rich
from _common import arguments
from _data import digits
from rich.table import Table

import jaxsparse as js

args = arguments(
    "A user's own pruning scores.", small="few steps", out="out/custom_score"
)

STEPS, BATCH, SEEDS = (400 if args.small else 2_000), 64, 3
EVERY = STEPS // 40
SPARSITY = 0.95
data = digits()
x, y = jnp.asarray(data.x.reshape(len(data.x), -1)), jnp.asarray(data.y)
x_test, y_test = data.x_test.reshape(len(data.x_test), -1), data.y_test

# %% [markdown]
# ## A plain function
#
# What does the loss change by when a weight `w` is set to zero? With its gradient `g`,
# and `g^2` for the curvature: `-g w + g^2 w^2 / 2`. The gradient is that of one batch.


# %%
def loss_change(params, grads):
    one = lambda w, g: jnp.abs(-g * w + (g * w) ** 2 / 2)
    return jax.tree.map(one, params, grads)


# %% [markdown]
# ## With a memory
#
# One batch's gradient is noisy. `moving_average` makes any score smooth. And a score
# with a memory of its own: the running mean of squared gradients stands in for the
# curvature (the diagonal of the empirical Fisher matrix, roughly, since these are
# gradients of batches), which gives Optimal Brain Damage, `w^2 * mean(g^2)`.

# %%
smooth = js.scores.moving_average(loss_change, decay=0.95)


def start(params):
    return jax.tree.map(jnp.zeros_like, params)


def remember(grads, state, params):  # in every step
    del params
    return jax.tree.map(lambda f, g: 0.99 * f + 0.01 * g**2, state, grads)


def judge(params, grads, state):  # in steps that change masks
    del grads
    return jax.tree.map(lambda w, f: w**2 * f, params, state)


brain_damage = js.scores.Score(start, remember, judge)

# %% [markdown]
# Each of them prunes a small network to 95 % while it trains. Gradients of pruned
# weights are hidden from the optimizer, not from the score. Three seeds and 450 test
# images: differences of half a point are noise.


# %%
def init(key):
    sizes = (64, 256, 10)
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 2)
    return [
        {"kernel": draw(k, (m, n)), "bias": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss_fn(params, rows):
    logits = apply(params, x[rows])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()


@jax.jit
@jax.vmap
def draw(key):
    """What the runs of one seed have in common: where they start, and the batches."""
    rows = lambda key: jax.random.randint(key, (BATCH,), 0, len(x))
    return init(key), jax.vmap(rows)(jax.random.split(key, STEPS))


@partial(jax.jit, static_argnums=0)
def train(tx, params, batches):
    """Seed after seed: under `vmap` masks would be computed in every step."""
    return jax.lax.map(lambda seed: train_one(tx, *seed), (params, batches))


def train_one(tx, params, batches):
    def step(carry, rows):
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params, rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    accuracy = jnp.mean(jnp.argmax(apply(params, x_test), axis=-1) == y_test)
    return params, opt_state, accuracy


scores = {
    "magnitude": js.scores.magnitude,
    "loss_change, one batch": loss_change,
    "loss_change, averaged": smooth,
    "w^2 * mean(g^2)": brain_damage,
}
begin, end = 10 * EVERY, 30 * EVERY
results = Table(title=f"Test accuracy at {SPARSITY:.0%}, {SEEDS} seeds, {STEPS} steps")
results.add_column("score")
results.add_column("mean", justify="right")
results.add_column("each seed", justify="right")
adam = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
starts, tables = draw(jax.random.split(jax.random.key(0), SEEDS)), {}
_, _, dense = train(adam, *starts)
results.add_row("(dense)", f"{dense.mean():.2%}", "  ".join(f"{a:.2%}" for a in dense))
for name, score in js.report.progress(scores.items(), description="train"):
    prune_schedule = js.prune_schedule(
        js.schedules.polynomial(final=SPARSITY, begin=begin, end=end),
        every=js.schedules.every(EVERY, begin=begin, end=end),
        score=score,
        pattern=js.Unstructured(scope="global"),
        total_steps=STEPS,
    )
    params, opt_state, found = train(prune_schedule.wrap(adam), *starts)
    for seed in reversed(range(SEEDS)):  # `train` gives those of all seeds
        one = jax.tree.map(lambda x, seed=seed: x[seed], (opt_state, params))
        js.assert_sparse(*one)
        tables[name] = js.report.table(one[1], opt_state=one[0], title=name)
        assert abs(tables[name].pruned.reached - SPARSITY) < 1e-4
    results.add_row(name, f"{found.mean():.2%}", "  ".join(f"{a:.2%}" for a in found))
rich.print(results)

# %% [markdown]
# The scores also differ in how they share out the budget over the layers (seed 0).

# %%
js.report.plot(tables, path=args.out / "custom_score.png")
print(f"Wrote custom_score.png to {args.out}")
