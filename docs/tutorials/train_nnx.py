# %% [markdown]
# # Train sparse with Flax NNX
#
# A small network learns scikit-learn's digits twice: dense, and pruned to 80 % while
# it trains. One line differs: the optimizer.

# %%
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxsparse as js

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
x_train, y_train, x_test, y_test = x[:1347], y[:1347], x[1347:], y[1347:]
STEPS = 300


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


# %% [markdown]
# ## The training loop
#
# It knows nothing of sparsity.


# %%
@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model):
        loss = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return loss.mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


def train(tx):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(0, len(x_train), 64)
        train_step(model, optimizer, x_train[rows], y_train[rows])
    return model, optimizer


def accuracy(model):
    return float(np.mean(np.argmax(model(x_test), -1) == y_test))


# %% [markdown]
# ## The schedule
#
# Masks change every 20 steps between the steps 40 and 200. The sparsity rises quickly
# at first, when there are many weights to spare. The last third of the training is
# left to recover.

# %%
prune_schedule = js.prune_schedule(
    js.schedules.polynomial(final=0.8, begin=40, end=200),
    every=js.schedules.every(20, begin=40, end=200),
    pattern=js.Unstructured(scope="global"),
    total_steps=STEPS,
)
dense, _ = train(optax.adam(2e-3))
sparse, optimizer = train(js.enforce(optax.chain(prune_schedule, optax.adam(2e-3))))
print(f"dense {accuracy(dense):.1%}, 80 % sparse {accuracy(sparse):.1%}")

# %% [markdown]
# ## The result
#
# The masks are in the optimizer's state, under the paths of the model's parameters.
# The global scope decided how sparse each layer is.

# %%
params = nnx.as_pure(nnx.state(sparse, nnx.Param))
js.assert_sparse(optimizer.opt_state, params)
table = js.report.table(params, js.masks_of(optimizer.opt_state), title="NNX, 80 %")
table

# %% [markdown]
# `js.report.plot` draws it. It returns a figure, and writes a file if you pass
# `path=`.

# %%
js.report.plot(table)
