# %% [markdown]
# # Prune a trained network, in one line or in steps
#
# Which weights can go? Every score has its answer; the table below shows what the
# answers are worth when nothing is trained afterwards.

# %%
import jax
import jax.numpy as jnp
import optax
import rich
from _common import arguments
from _data import digits
from rich.table import Table

import jaxsparse as js

args = arguments(
    "One-shot pruning of a digits network.", small="few steps", out="out/oneshot"
)

STEPS, BATCH = (150 if args.small else 1_500), 64
data = digits()
x = jnp.asarray(data.x.reshape(len(data.x), -1))
y = jnp.asarray(data.y)
x_test, y_test = data.x_test.reshape(len(data.x_test), -1), data.y_test

# %% [markdown]
# Parameters are any pytree. Here: a dictionary, and a network that is three lines.


# %%
def init(key: jax.Array) -> dict:
    sizes = (64, 256, 128, 10)
    draw = jax.nn.initializers.he_normal()
    return {
        f"dense_{i}": {
            "kernel": draw(jax.random.fold_in(key, i), (sizes[i], sizes[i + 1])),
            "bias": jnp.zeros(sizes[i + 1]),
        }
        for i in range(3)
    }


def apply(params: dict, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


def loss_fn(params, x, y):
    logits = apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(params):
    return jnp.mean(jnp.argmax(apply(params, x_test), axis=-1) == y_test)


adam = optax.adam(optax.cosine_decay_schedule(1e-3, STEPS))


@jax.jit
def train(params: dict, key: jax.Array, masks: dict | None = None) -> dict:
    """Trains; `masks` hold, being the last member of the optimizer's chain."""
    tx = adam if masks is None else optax.chain(adam, js.keep_sparse(masks))

    def step(carry, key):
        params, opt_state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(x))
        grads = jax.grad(loss_fn)(params, x[rows], y[rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


start = init(jax.random.key(0))
params = train(start, jax.random.key(1))
print(f"dense: {accuracy(params):.2%} of {len(y_test)} test images")

# %% [markdown]
# In one line, and the same in steps, where each step can be looked at or replaced.

# %%
pruned = js.prune(params, 0.8)

scores = js.scores.magnitude(params)
masks = js.patterns.masks(scores, 0.8, pattern=js.Unstructured(), where=r"kernel$")
again = js.patterns.apply(params, masks)

assert jax.tree.all(jax.tree.map(jnp.array_equal, pruned.params, again))
rich.print(js.report.table(*pruned, asked=0.8, title="js.prune(params, 0.8)"))

# %% [markdown]
# Four scores, all in the global scope. Taylor and SNIP ask the gradient of the loss on
# all training images. A trained network has a gradient near zero, so to first order no
# weight matters much. SNIP is Taylor divided by one number for all weights, so the two
# choose alike.

# %%
grads = jax.jit(jax.grad(loss_fn))(params, x, y)
candidates = {
    "random": js.scores.random(params, key=jax.random.key(2)),
    "taylor": js.scores.taylor(params, grads),
    "snip": js.scores.snip(params, grads),
    "magnitude": js.scores.magnitude(params),
}
sparsities = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
everywhere = js.Unstructured(scope="global")


def show(title: str, rows: dict[str, list[float]]) -> None:
    table = Table(title=title)
    table.add_column("score")
    for sparsity in sparsities:
        table.add_column(f"{sparsity:.0%}", justify="right")
    for name, found in rows.items():
        table.add_row(name, *(f"{a:.1%}" for a in found))
    rich.print(table)


rows, tables = {}, {}
for name, scores in candidates.items():
    masks = [js.patterns.masks(scores, s, pattern=everywhere) for s in sparsities]
    rows[name] = [float(accuracy(js.patterns.apply(params, m))) for m in masks]
    pruned = js.patterns.apply(params, masks[3])
    tables[f"{name}, {sparsities[3]:.0%}"] = js.report.table(pruned, masks[3])
show("Test accuracy, pruned after training, not trained again", rows)
js.report.plot(tables, path=args.out / "oneshot.png")
print(f"Wrote oneshot.png to {args.out}: how each score shares out 80 %")

# %% [markdown]
# SNIP was made for another moment: before training, where gradients are large. The same
# scores of the untrained network, which then trains under a fixed mask. One seed:
# differences below a point mean nothing. Magnitudes of untrained weights only compare
# the scales that layers began with, and at 95 % the middle layer loses everything.

# %%
grads = jax.jit(jax.grad(loss_fn))(start, x, y)
candidates = {
    "random": js.scores.random(start, key=jax.random.key(2)),
    "snip": js.scores.snip(start, grads),
    "magnitude": js.scores.magnitude(start),
}
trained = {}
for name, scores in js.report.progress(candidates.items(), description="train"):
    trained[name] = []
    for sparsity in sparsities:
        masks = js.patterns.masks(scores, sparsity, pattern=everywhere)
        sparse = train(js.patterns.apply(start, masks), jax.random.key(1), masks)
        assert js.report.table(sparse, masks).total.leaked == 0
        trained[name].append(float(accuracy(sparse)))
    left = float(masks["dense_1"]["kernel"].mean())
    print(f"{name}: {left:.2%} of the middle layer is left at {sparsities[-1]:.0%}")
show(f"Test accuracy, pruned before training of {STEPS} steps", trained)
