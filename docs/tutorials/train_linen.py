# %% [markdown]
# # Train sparse with Flax Linen
#
# The same with Linen, flax's `TrainState` and the 2:4 pattern: two of every four
# neighboring weights stay. Hardware with sparse matrix units multiplies such kernels
# at twice the rate.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import jaxsparse as js

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
x_train, y_train, x_test, y_test = x[:1347], y[:1347], x[1347:], y[1347:]
STEPS = 300

model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])
params = model.init(jax.random.key(0), x_train[:1])["params"]
print(list(jax.tree.leaves(js.tree.map_with_path(lambda path, w: path, params))))

# %% [markdown]
# ## Which layers
#
# `where` is a regular expression on these paths. The last layer stays dense. N:M
# groups run along the inputs of a kernel, and the trace knows which axis that is.

# %%
trace = js.trace(lambda p, x: model.apply({"params": p}, x), params, x_train[:1])
prune_schedule = js.prune_schedule(
    js.schedules.polynomial(final=0.5, begin=40, end=200),
    every=js.schedules.every(20, begin=40, end=200),
    pattern=js.NM(keep=2, of=4),
    where=r"^layers_[02]/kernel$",
    axes=trace.axes,
    total_steps=STEPS,
)
tx = js.enforce(optax.chain(prune_schedule, optax.adam(2e-3)))
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

# %% [markdown]
# ## The training loop
#
# `TrainState.apply_gradients` calls the optimizer and adds the update. Nothing
# changes.


# %%
@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


rng = np.random.default_rng(0)
for _ in range(STEPS):
    rows = rng.integers(0, len(x_train), 64)
    state = train_step(state, x_train[rows], y_train[rows])

logits = model.apply({"params": state.params}, x_test)
accuracy = float(jnp.mean(jnp.argmax(logits, -1) == y_test))
print(f"2:4 in two layers: test accuracy {accuracy:.1%}")

# %% [markdown]
# ## Check the pattern
#
# `verify` raises an error if one group of four breaks the pattern.

# %%
js.assert_sparse(state.opt_state, state.params)
masks = js.masks_of(state.opt_state)
js.patterns.verify(
    {name: masks[name] for name in ("layers_0", "layers_2")},
    {name: state.params[name] for name in ("layers_0", "layers_2")},
    pattern=js.NM(keep=2, of=4),
    axes=js.Axes(input=(0,), output=(1,)),
)
js.report.table(state.params, masks, title="Linen, 2:4")
