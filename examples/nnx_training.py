# %% [markdown]
# # Flax NNX: the optimizer changes, the model and the loop do not
#
# `nnx.Optimizer` takes any optax transformation, so it takes one that prunes.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from _common import arguments
from _data import digits
from flax import nnx

import jaxsparse as js

args = arguments(
    "Gradual pruning with flax NNX.", small="few steps", out="out/nnx_training"
)

STEPS, BATCH = (100 if args.small else 1_000), 64
EVERY = STEPS // 50
data = digits()


# %%
class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.down = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(1024, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.down(x))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.out(x)


def loss_fn(model: Net, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: Net, optimizer: nnx.Optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def predict(model: Net, x):
    return model(x)


def accuracy(model: Net) -> float:
    model.eval()
    found = np.mean(np.argmax(predict(model, data.x_test), -1) == data.y_test)
    model.train()
    return float(found)


# %% [markdown]
# Sparsity rises from 0 to 90 %, quickly at first. The first layer, 288 weights, stays
# dense: regular expressions on paths say who takes part.

# %%
begin, end = 10 * EVERY, 35 * EVERY
prune_schedule = js.prune_schedule(
    js.schedules.polynomial(final=0.9, begin=begin, end=end),
    every=js.schedules.every(EVERY, begin=begin, end=end),
    where=r"^(down|hidden|out)/kernel",
    pattern=js.Unstructured(scope="global"),
    total_steps=STEPS,
)
adam = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


def train(tx: optax.GradientTransformation, name: str):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    history = {"step": [], "sparsity": [], "loss": []}
    rng = np.random.default_rng(0)
    for step in js.report.progress(range(STEPS), description=name):
        rows = rng.integers(0, len(data.x), BATCH)
        loss = train_step(model, optimizer, data.x[rows], data.y[rows])
        if step % EVERY == 0:
            history["step"].append(step)
            pruned = (model.down, model.hidden, model.out)
            history["sparsity"].append(zeros([m.kernel[...] for m in pruned]))
            history["loss"].append(float(loss))
    return model, optimizer, history


@jax.jit
def _zeros(kernels):
    return sum(jnp.sum(w == 0) for w in kernels)


def zeros(kernels) -> float:
    return float(_zeros(kernels)) / sum(w.size for w in kernels)


dense, _, dense_history = train(adam, "dense")
model, optimizer, history = train(js.enforce(optax.chain(prune_schedule, adam)), "90 %")

# %% [markdown]
# The masks are in the optimizer's state, under the paths of the model's parameters.

# %%
params = nnx.as_pure(nnx.state(model, nnx.Param))
masks = js.masks_of(optimizer.opt_state)
js.assert_sparse(optimizer.opt_state, params)
assert (
    float(jnp.sum(jnp.where(masks["hidden"]["kernel"], 0, params["hidden"]["kernel"])))
    == 0
)

table = js.report.table(params, masks, title="90 % of three kernels together")
rich.print(table)
print(f"test accuracy, {len(data.y_test)} images, one seed:")
print(f"  dense {accuracy(dense):.2%}")
print(f"  90 %  {accuracy(model):.2%}")
js.report.plot(
    {"90 %": table},
    history={"dense": dense_history, "90 %": history},
    path=args.out / "nnx_training.png",
)
print(f"Wrote nnx_training.png to {args.out}")
