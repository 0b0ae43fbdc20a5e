# %% [markdown]
# # Prune with second-order information
#
# A network learns scikit-learn's digits. Then it loses 80 to 95 % of its weights in
# one shot: by magnitude, and by Optimal Brain Surgeon with the Fisher matrix of 512
# gradients.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxsparse as js

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
train, test = {"x": x[:1347], "y": y[:1347]}, {"x": x[1347:], "y": y[1347:]}


def apply_fn(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def loss_fn(params, batch):
    logits = apply_fn(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


@jax.jit
def accuracy(params):
    return jnp.mean(jnp.argmax(apply_fn(params, test["x"]), -1) == test["y"])


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


params = {
    "hidden": {"kernel": draw(0, (64, 64)), "bias": jnp.zeros(64)},
    "out": {"kernel": draw(1, (64, 10)), "bias": jnp.zeros(10)},
}
tx = optax.adam(5e-3)
opt_state = tx.init(params)


@jax.jit
def train_step(params, opt_state):
    updates, opt_state = tx.update(jax.grad(loss_fn)(params, train), opt_state)
    return optax.apply_updates(params, updates), opt_state


for _ in range(150):
    params, opt_state = train_step(params, opt_state)
print(f"dense: {float(accuracy(params)):.1%}")

# %% [markdown]
# ## Gradients and the Fisher matrix
#
# One gradient for each example. The Fisher matrix is kept in blocks of 32 neighboring
# weights of an output, and inverted once.

# %%
some = jax.tree.map(lambda leaf: leaf[:512], train)
grads = js.curvature.per_example_grads(loss_fn, params, some, chunk=128)
fisher = js.curvature.block_fisher(grads, block_size=32, rel_damping=0.1)

# %% [markdown]
# ## Prune
#
# `obs` chooses weights and updates those that remain. Greedy removes one weight after
# another in each block and sees what the removals before it did.

# %%
SPARSITIES = (0.8, 0.9, 0.95)
everywhere = js.Unstructured(scope="global")
obs = partial(js.solvers.obs, params, fisher, pattern=everywhere)
methods = {
    "magnitude": partial(js.prune, params, pattern=everywhere),
    "OBS, joint update": obs,
    "OBS, greedy": partial(obs, greedy=True),
}
curves = {
    name: [prune(s).params for s in SPARSITIES] for name, prune in methods.items()
}
for name, pruned in curves.items():
    print(f"{name:18}", *(f"{float(accuracy(p)):.1%}" for p in pruned))

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for (name, pruned), marker in zip(curves.items(), "o^s", strict=True):
    axes.plot(SPARSITIES, [accuracy(p) for p in pruned], marker=marker, label=name)
axes.set(xlabel="sparsity", ylabel="test accuracy")
axes.legend()
plt.show()

# %% [markdown]
# ## While a model trains
#
# `js.transforms.windowed_obs` scores by second order in a training: it collects the
# gradients of the last steps before each cut. oBERT's recipe, which prunes BERT to 90 %
# this way, is `js.recipes.obert_downstream(steps_per_epoch).optimizer()`: see
# [prune by a recipe](recipes.py). `examples/recipes_minilm.py` runs it on MiniLM.
