# %% [markdown]
# # Remove channels and export the model
#
# A convolutional network learns scikit-learn's digits, loses half of its channels,
# and runs at the new widths: fewer weights, fewer operations, less time. No module is
# rebuilt.

# %%
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxsparse as js

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
x = x.reshape(-1, 8, 8, 1)
x_train, y_train, x_test, y_test = x[:1347], y[:1347], x[1347:], y[1347:]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = x + nn.Conv(16, (3, 3))(nn.relu(nn.Conv(32, (3, 3))(x)))
        return nn.Dense(10)(nn.relu(x).reshape(len(x), -1))


model = Net()
params = model.init(jax.random.key(0), x_train[:1])["params"]
apply_fn = lambda params, x: model.apply({"params": params}, x)


def make_step(apply_fn, tx):
    def loss_fn(params, x, y):
        logits = apply_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, grads

    return step


def train(apply_fn, params, opt_state, steps, seed=0):
    step, rng = make_step(apply_fn, tx), np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(x_train), 64)
        params, opt_state, grads = step(params, opt_state, x_train[rows], y_train[rows])
    return params, opt_state, grads


def accuracy(apply_fn, params):
    return float(jnp.mean(jnp.argmax(apply_fn(params, x_test), -1) == y_test))


tx = optax.adam(3e-3)
params, opt_state, grads = train(apply_fn, params, tx.init(params), 150)
print(f"dense: {accuracy(apply_fn, params):.1%}")

# %% [markdown]
# ## Which channels belong together
#
# The residual connection couples the outputs of two convolutions and the input of the
# last layer. The trace finds them. `print(groups)` also shows the axes that may not be
# pruned, with the line of the model that says so.

# %%
trace = js.trace(apply_fn, params, x_train[:64])
groups = js.coupling.groups(trace)
for name, group in groups.prunable.items():
    print(name, group.size, [member.path for member in group.members])

# %% [markdown]
# ## Choose, compensate, narrow
#
# Channels are scored by OBS: the least error of the layers that read them.
# `obs_refit` finds the weights with which these layers compensate.

# %%
stats = js.calibration.run(trace, params, [x_train[:64], x_train[64:128]])
drop = js.channels.obs_greedy(groups, params, stats, 0.5)
refitted = js.channels.obs_refit(groups, params, stats, drop)
small = js.narrowing.narrow(trace, refitted, drop)
print("before", js.narrowing.cost(trace))
print("after ", js.narrowing.cost(trace, drop))
print(f"narrowed: {accuracy(small.apply_fn, small.params):.1%}")

# %% [markdown]
# ## Train a little more
#
# The optimizer's state is cut as the parameters are.

# %%
opt_state = js.narrowing.narrow_like(trace, opt_state, drop)
tuned, _, _ = train(small.apply_fn, small.params, opt_state, 50, seed=1)
print(f"tuned: {accuracy(small.apply_fn, tuned):.1%}")

# %% [markdown]
# ## Export
#
# One file of plain arrays, with a note of what was dropped. The original model's code
# and this file are all that the small model needs.

# %%
path = f"{tempfile.mkdtemp()}/small.npz"
js.checkpoint.export(path, tuned, drop=drop)
read = js.checkpoint.load_export(path)
restored = jax.tree.unflatten(jax.tree.structure(params), read.params.values())
run = js.narrowing.narrow(trace, params, read.drop).apply_fn
assert np.array_equal(run(restored, x_test), run(tuned, x_test))
