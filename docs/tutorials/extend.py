# %% [markdown]
# # Write your own score, pattern or transformation
#
# The library's functions have no privileges: what they do, a function of yours can do
# in the same place.

# %%
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxsparse as js

draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)
params = {"a": {"kernel": draw(0, (16, 16))}, "b": {"kernel": draw(1, (16, 16))}}
x, y = draw(2, (256, 16)), draw(3, (256, 16))


def loss_fn(params):
    hidden = jax.nn.relu(x @ params["a"]["kernel"])
    return jnp.mean((hidden @ params["b"]["kernel"] - y) ** 2)


def train(tx, params, steps=30):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# %% [markdown]
# ## A score
#
# A score returns a tree like the parameters; larger means keep. A function of
# `(params, grads)` is enough. It may ask for `masks`, `step` and `sparsity` by name.


# %%
def loss_change(params, grads):
    """By how much the loss changes when a weight is removed, to second order."""
    change = lambda w, g: jnp.abs(-g * w + (g * w) ** 2 / 2)
    return jax.tree.map(change, params, grads)


prune_schedule = js.prune_schedule(0.8, every=js.schedules.at(5), score=loss_change)
trained, state = train(prune_schedule.wrap(optax.adam(1e-2)), params)
print(f"loss_change: {float(loss_fn(trained)):.3f}")

# %% [markdown]
# A score with memory is three functions: what it starts with, what it remembers in
# every step, and how it judges in steps that change masks. This one is Optimal Brain
# Damage with a running mean of squared gradients.

# %%
average = lambda f, g: 0.9 * f + 0.1 * g**2
saliency = lambda w, f: w**2 * f
brain_damage = js.scores.Score(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: jax.tree.map(average, state, grads),
    score=lambda params, grads, state: jax.tree.map(saliency, params, state),
)
prune_schedule = js.prune_schedule(0.8, every=js.schedules.at(5), score=brain_damage)
trained, state = train(prune_schedule.wrap(optax.adam(1e-2)), params)
print(f"brain_damage: {float(loss_fn(trained)):.3f}")

# %% [markdown]
# ## A pattern
#
# The library's patterns are values that every function reads. For a unit that it does
# not have, score your units, let `js.patterns.masks` choose among them, and spread
# the choice over the weights. Here a unit is a diagonal of a square kernel (a
# circulant pattern).


# %%
def diagonals(params, sparsity):
    size = jax.tree.leaves(params)[0].shape[0]
    which = (jnp.arange(size)[:, None] - jnp.arange(size)) % size
    total = lambda w: jax.ops.segment_sum(jnp.abs(w).ravel(), which.ravel(), size)
    units = jax.tree.map(total, params)
    chosen = js.patterns.masks(units, sparsity, where=lambda path, unit: True)
    return jax.tree.map(lambda kept: kept[which], chosen)


masks = diagonals(params, 0.5)
sparse = js.patterns.apply(params, masks)
tuned, state = train(optax.chain(optax.adam(1e-2), js.keep_sparse(masks)), sparse)
js.assert_sparse(state, tuned)
print(f"8 of 16 diagonals: {float(loss_fn(tuned)):.3f}")

# %% [markdown]
# ## A transformation
#
# A transformation is an optax pair of `init` and `update`; its state is a NamedTuple
# of arrays. This one lets pruned weights fade in place of cutting them at once. It
# stands last in the chain, where it sees the finished update.


# %%
class FadeState(NamedTuple):
    masks: dict


def fade(masks, rate):
    def update(updates, state, params):
        one = lambda kept, u, w: jnp.where(kept, u, -rate * w)
        return jax.tree.map(one, state.masks, updates, params), state

    return optax.GradientTransformation(lambda params: FadeState(masks), update)


soft, _ = train(optax.chain(optax.adam(1e-2), fade(masks, 0.2)), params, steps=100)
pruned = jnp.where(masks["a"]["kernel"], 0.0, soft["a"]["kernel"])
print(f"largest pruned weight after 100 steps: {float(jnp.abs(pruned).max()):.1e}")
