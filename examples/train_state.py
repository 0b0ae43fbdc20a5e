# %% [markdown]
# # Flax Linen and `TrainState`: 2 of every 4
#
# 2:4 sparsity, which NVIDIA's sparse tensor cores understand, comes in gradually: 4 of
# 4 are kept, then 3, then 2. `TrainState` is flax's own; only its `tx` is another.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from _common import arguments
from _data import digits
from flax.training.train_state import TrainState

import jaxsparse as js

args = arguments(
    "Gradual 2:4 pruning with TrainState.", small="few steps", out="out/train_state"
)

STEPS, BATCH = (100 if args.small else 1_000), 64
EVERY = STEPS // 50
data = digits()


# %%
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="down")(x))
        x = nn.relu(nn.Dense(128, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="out")(x)


@jax.jit
def train_step(state: TrainState, x, y):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(tx: optax.GradientTransformation, name: str):
    net = Net()
    params = net.init(jax.random.key(0), data.x[:1])["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    rng = np.random.default_rng(0)
    history = {"step": [], "sparsity": [], "loss": []}
    for step in js.report.progress(range(STEPS), description=name):
        rows = rng.integers(0, len(data.x), BATCH)
        state, loss = train_step(state, data.x[rows], data.y[rows])
        if step % EVERY == 0:
            history["step"].append(step)
            history["sparsity"].append(
                float(jnp.mean(state.params["hidden"]["kernel"] == 0))
            )
            history["loss"].append(float(loss))
    return state, history


def accuracy(state: TrainState) -> float:
    logits = state.apply_fn({"params": state.params}, data.x_test)
    return float(np.mean(np.argmax(logits, -1) == data.y_test))


# %% [markdown]
# Groups of four lie along the inputs of a kernel. The trace of the model says which of
# its axes these are. The first convolution has 9 inputs, which 4 does not divide.
# jaxsparse says so, with the path, and does not skip it silently:

# %%
net = Net()
images = data.x[:1]
params = net.init(jax.random.key(0), images)["params"]
trace = js.trace(lambda params, x: net.apply({"params": params}, x), params, images)
half = js.schedules.polynomial(final=0.5, begin=10 * EVERY, end=35 * EVERY)
when = js.schedules.every(EVERY, begin=10 * EVERY, end=35 * EVERY)
pattern = js.NM(keep=2, of=4)
adam = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
try:
    everywhere = js.prune_schedule(half, every=when, pattern=pattern, axes=trace.axes)
    train(everywhere.wrap(adam), "all")
except ValueError as error:
    print("All kernels:", error, sep="\n  ")

# %% [markdown]
# `where` leaves it out.

# %%
where = r"^(down|hidden|out)/kernel$"
prune_schedule = js.prune_schedule(
    half,
    every=when,
    pattern=pattern,
    where=where,
    axes=trace.axes,
    total_steps=STEPS,
)
dense, dense_history = train(adam, "dense")
state, history = train(js.enforce(optax.chain(prune_schedule, adam)), "2:4")

masks = js.masks_of(state.opt_state)
js.assert_sparse(state.opt_state, state.params)
js.patterns.verify(masks, state.params, pattern=pattern, where=where, axes=trace.axes)

# %%
table = js.report.table(state.params, masks, asked=0.5, title="2:4 along the inputs")
rich.print(table)
print(f"test accuracy, {len(data.y_test)} images, one seed:")
print(f"  dense {accuracy(dense):.2%}")
print(f"  2:4   {accuracy(state):.2%}")
js.report.plot(
    {"2:4": table},
    history={"dense": dense_history, "2:4": history},
    path=args.out / "train_state.png",
)
print(f"Wrote train_state.png to {args.out}")
