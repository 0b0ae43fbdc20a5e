# %% [markdown]
# # A score of your own
#
# A score is a function of `(params, grads)`, or with a memory three functions in a
# `js.scores.Score`. Both go where `js.scores.magnitude` would.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import optax
from _common import arguments, percent, show
from _mlp import accuracy, init
from _mlp import train as scan

import jaxsparse as js

args = arguments("Score your way.", small="few steps", out="out/custom_score")
STEPS, SPARSITY = (400 if args.small else 2_000), 0.95
keys = jax.random.split(jax.random.key(0), 3)

# %% [markdown]
# Without a weight `w` of gradient `g` the loss changes by `-g w + g^2 w^2 / 2` (`g^2`
# stands for the curvature). `moving_average` smooths noisy scores. With the mean of
# `g^2` as its memory a score is Optimal Brain Damage.


# %%
def loss_change(params, grads):
    one = lambda w, g: jnp.abs(-g * w + (g * w) ** 2 / 2)
    return jax.tree.map(one, params, grads)


average = lambda f, g: 0.99 * f + 0.01 * g**2
saliency = lambda w, f: w**2 * f
brain_damage = js.scores.Score(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: jax.tree.map(average, state, grads),
    score=lambda params, grads, state: jax.tree.map(saliency, params, state),
)
scores = {
    "magnitude": js.scores.magnitude,
    "loss_change, one batch": loss_change,
    "loss_change, averaged": js.scores.moving_average(loss_change, decay=0.95),
    "w^2 * mean(g^2)": brain_damage,
}

# %% [markdown]
# Each of them prunes a small network to 95 % while it trains, three times. Half a point
# is noise. The plot shows the layers' sparsities (seed 0).


# %%
@partial(jax.jit, static_argnums=0)
def train(tx):
    """Seed after seed: under `vmap` masks would be computed in every step."""
    run = lambda key: scan(tx, init(key, (64, 256, 10)), key, steps=STEPS)
    return jax.lax.map(run, keys)


adam = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
when = {"begin": STEPS // 4, "end": 3 * STEPS // 4}
final = js.schedules.polynomial(final=SPARSITY, **when)
every, everywhere = js.schedules.every(STEPS // 40, **when), js.Unstructured("global")
found, tables = jax.vmap(accuracy)(train(adam).params), {}
rows = [("(dense)", f"{found.mean():.2%}", percent(found))]
for name, score in js.report.progress(scores.items(), description="train"):
    prune = js.prune_schedule(final, every=every, pattern=everywhere, score=score)
    params, opt_state, _ = train(prune.wrap(adam))
    found = jax.vmap(accuracy)(params)
    rows.append((name, f"{found.mean():.2%}", percent(found)))
    params, opt_state = jax.tree.map(lambda x: x[0], (params, opt_state))
    js.assert_sparse(opt_state, params)
    tables[name] = js.report.table(params, opt_state=opt_state, title=name)
title = f"Test accuracy at {SPARSITY:.0%}, 3 seeds, {STEPS} steps"
show(title, ("score", "mean", "each seed"), rows)
js.report.plot(tables, path=args.out / "custom_score.png")
print(f"Wrote custom_score.png to {args.out}")
