# %% [markdown]
# # Train sparse from the first step
#
# Gradual pruning begins with a dense network. Dynamic sparse training never has one:
# the masks are sparse from the start, and move. Four ways to spend a few weights on
# scikit-learn's digits.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxsparse as js

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
x_train, y_train = jnp.asarray(x[:1347]), jnp.asarray(y[:1347])
x_test, y_test = x[1347:], y[1347:]
STEPS, SIZES = 600, (64, 256, 128, 10)


def init(key):
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 3)
    return [draw(k, SIZES[i : i + 2]) for i, k in enumerate(keys)]


def apply(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params[0]) @ params[1]) @ params[2]


def loss_fn(params, rows):
    logits, labels = apply(params, x_train[rows]), y_train[rows]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %% [markdown]
# ## The training
#
# `js.init_sparse` masks the parameters from the very start. `skip_updates=True` lets
# the optimizer rest in the steps that move masks, as in RigL's paper.


# %%
def train(method, params):
    tx = method.wrap(optax.sgd(0.1, momentum=0.9), skip_updates=True)
    params, state = js.init_sparse(tx, params)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(x_train))
        updates, state = tx.update(jax.grad(loss_fn)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])((params, state))


def accuracy(params):
    return float(np.mean(np.argmax(apply(params, x_test), -1) == y_test))


# %% [markdown]
# ## The methods
#
# RigL drops the smallest weights and grows those with the largest gradients; SET grows
# at random; static masks stay. These have the densities of Erdos-Renyi-Kernel, higher
# in small layers. Gradual magnitude pruning is the dense start.

# %%
params, key = init(jax.random.key(0)), jax.random.key(2)
moving = {
    "every": js.schedules.every(20, begin=20, end=440),
    "drop_fraction": optax.cosine_decay_schedule(0.3, 440),
    "key": key,
    "where": lambda path, leaf: True,
}
everything = {"where": moving["where"]}


def methods(sparsity):
    erk = js.allocations.erk(params, sparsity, **everything)
    gradual = js.schedules.polynomial(final=sparsity, begin=60, end=440)
    every = js.schedules.every(20, begin=60, end=440)
    return {
        "gradual": js.prune_schedule(gradual, every=every, **everything),
        "RigL": js.transforms.rigl(erk, **moving),
        "SET": js.transforms.set_(erk, **moving),
        "static": js.transforms.static(erk, key=key, **everything),
    }


sparsities = (0.9, 0.95, 0.98)
runs = {name: (list(sparsities), []) for name in methods(0.9)}
for sparsity in sparsities:
    for name, method in methods(sparsity).items():
        runs[name][1].append(accuracy(train(method, params)[0]))
    print(sparsity, {name: f"{found[-1]:.1%}" for name, (_, found) in runs.items()})
js.report.plot_tradeoff(runs, xlabel="sparsity")

# %% [markdown]
# ## RigL by hand
#
# A score that sees the masks is enough: what stays comes first, then what has the
# largest gradients. `first` scores the masks of the start. The result is that of
# `js.transforms.rigl`, bit for bit.


# %%
def rigl_score(params, grads, state, *, masks, step, sparsity):
    def one(w, g, mask, s):
        kept = mask.size - js.patterns.removed_count(s, mask.size)
        drops = jnp.floor(moving["drop_fraction"](step) * kept)
        sizes = jnp.where(mask, jnp.abs(w), -1.0)
        fewer = 1 - (kept - drops) / mask.size
        stays = js.patterns.masks(sizes, fewer, **everything)
        return jnp.where(stays, jnp.inf, jnp.abs(g))

    return jax.tree.map(one, params, grads, masks, sparsity)


score = js.scores.Score(
    init=lambda params: (),
    update=lambda grads, state, params: state,
    score=rigl_score,
    first=lambda params: js.scores.random(params, key=key),
)
erk = js.allocations.erk(params, 0.9, **everything)
own = js.prune_schedule(erk, every=moving["every"], score=score, **everything)
mine, ours = train(own, params), train(js.transforms.rigl(erk, **moving), params)
assert jax.tree.all(jax.tree.map(jnp.array_equal, mine[0], ours[0]))
print(f"RigL by hand: {accuracy(mine[0]):.1%}")
