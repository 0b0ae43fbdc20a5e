# %% [markdown]
# # Look at the result
#
# Masks are sets of weights: they can be united, intersected, compared and counted. And
# a picture often says more than an accuracy. A network learns scikit-learn's digits,
# two methods prune it, and this page looks at what they did.

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
x_train, y_train, x_test, y_test = x[:1347], y[:1347], x[1347:], y[1347:]
LAYERS = {"hidden_0": (64, 64), "hidden_1": (64, 32), "out": (32, 10)}


def apply_fn(params, x):
    for name, layer in params.items():
        x = x @ layer["kernel"] + layer["bias"]
        x = x if name == "out" else jax.nn.relu(x)
    return x


@jax.jit
def loss_fn(params):
    logits = apply_fn(params, x_train)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y_train).mean()


@jax.jit
def accuracy(params):
    return jnp.mean(jnp.argmax(apply_fn(params, x_test), -1) == y_test)


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


params = {
    name: {"kernel": draw(i, shape), "bias": jnp.zeros(shape[1])}
    for i, (name, shape) in enumerate(LAYERS.items())
}
tx = optax.adam(5e-3)
opt_state = tx.init(params)


@jax.jit
def train_step(params, opt_state):
    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


for _ in range(200):
    params, opt_state = train_step(params, opt_state)

# %% [markdown]
# ## Which parameters are sensitive?
#
# `js.allocations.sensitivity` prunes one parameter at a time and asks for the loss. A
# curve that rises early says: keep more of this one.

# %%
scores = js.scores.magnitude(params)
curves = js.allocations.sensitivity(params, scores, loss_fn, [0.2, 0.4, 0.6, 0.8, 0.9])
js.report.plot_sensitivity(curves)

# %% [markdown]
# ## Two methods
#
# Both remove 70 % of each kernel: the smallest weights, or those that a layer-wise pass
# over the training inputs chooses. The pass also changes the weights that remain.

# %%
by_size = js.prune(params, 0.7)
by_pass = js.oneshot.layerwise(apply_fn, params, [x_train], sparsity=0.7, show=False)
for name, pruned in {"magnitude": by_size, "layer by layer": by_pass}.items():
    print(f"{name:15} {float(accuracy(pruned.params)):.1%}")

# %% [markdown]
# ## Masks as sets
#
# The overlap is the number of weights that both keep over the number that either
# keeps. Two random masks at 70 % would overlap by 18 %.

# %%
overlap = js.patterns.overlap(by_size.masks, by_pass.masks, params)
print(f"overlap of all kernels: {overlap.total:.0%}")
for name in LAYERS:
    print(f"  {name}: {overlap.parameters[name]['kernel']:.0%}")

# %% [markdown]
# `intersection` keeps what both keep, `union` what either keeps. `count` and `indices`
# say how many weights that is, and which.

# %%
both = js.patterns.intersection(by_size.masks, by_pass.masks)
either = js.patterns.union(by_size.masks, by_pass.masks)
for name, masks in {"both": both, "either": either}.items():
    kept = js.patterns.count(masks, params)
    print(f"{name:7}", *(f"{layer}: {kept[layer]['kernel']:5}" for layer in LAYERS))
which = js.patterns.indices(both, params)["out"]["kernel"]
print("both keep in out/kernel:", *which[:8], "...")

# %% [markdown]
# ## Weights before and after
#
# Magnitude leaves a gap around zero. The pass leaves none: it keeps small weights whose
# inputs are large, and moves the others.

# %%
js.report.plot_weights(params, by_size.params)

# %%
js.report.plot_weights(params, by_pass.params)

# %% [markdown]
# ## Errors of the pass
#
# The hollow dot is the error of the mask alone; the filled dot is the error after the
# solver has changed the remaining weights.

# %%
js.report.plot_errors(by_pass.info)

# %% [markdown]
# `js.report.plot_sparsity` draws the sparsity of each layer over the steps of a
# training, and `js.report.plot_tradeoff` compares runs, as in
# [prune by a recipe](recipes.py). Each function returns a matplotlib figure, and writes
# a PNG if you pass `path=`.
