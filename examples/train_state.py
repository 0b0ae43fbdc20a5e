# %% [markdown]
# # Flax Linen and `TrainState`: 2 of every 4
#
# 2:4 sparsity, which NVIDIA's sparse tensor cores understand, comes in gradually: 4 of
# 4 are kept, then 3, then 2. `TrainState` is flax's own; only its `tx` is another.

# %%
import jax
import numpy as np
import optax
import rich
from _common import arguments
from _convnet import Net, data, loss_fn
from _training import History, batches
from flax.training.train_state import TrainState

import jaxsparse as js

args = arguments("Prune 2:4.", small="few steps", out="out/train_state")
STEPS = 100 if args.small else 1_000
EVERY = STEPS // 50
net, images = Net(), data.x[:1]
params = net.init(jax.random.key(0), images)["params"]


@jax.jit
def train_step(state, batch):
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, _), grads = value_and_grad(state.params, None, batch)
    return state.apply_gradients(grads=grads), loss


def train(tx, name):
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    draws, history = batches(data.x, data.y), History(EVERY)
    for step in js.report.progress(range(STEPS), description=name):
        state, loss = train_step(state, next(draws))
        history.note(step, loss, state.params["Dense_0"])
    logits = net.apply({"params": state.params}, data.x_test)
    return state, history.found, np.mean(np.argmax(logits, -1) == data.y_test)


# %% [markdown]
# Groups of four lie along the inputs of a kernel. The trace of the model says which of
# its axes these are. The first convolution has 9 inputs, which 4 does not divide.
# jaxsparse says so, with the path, and does not skip it; `where` leaves it out.

# %%
trace = js.trace(lambda params, x: net.apply({"params": params}, x), params, images)
half = js.schedules.polynomial(final=0.5, begin=10 * EVERY, end=35 * EVERY)
when = js.schedules.every(EVERY, begin=10 * EVERY, end=35 * EVERY)
groups = {"pattern": js.NM(keep=2, of=4), "axes": trace.axes}
adam = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
try:
    js.prune_schedule(half, every=when, **groups).wrap(adam).init(params)
except ValueError as error:
    print("All kernels:", error, sep="\n  ")
where = r"^(Conv_1|Dense_.)/kernel$"
prune_schedule = js.prune_schedule(half, every=when, where=where, **groups)
_, dense_history, dense = train(adam, "dense")
sparse_adam = js.enforce(optax.chain(prune_schedule, adam))
state, history, sparse = train(sparse_adam, "2:4")

# %%
masks = js.masks_of(state.opt_state)
js.assert_sparse(state.opt_state, state.params)
js.patterns.verify(masks, state.params, where=where, **groups)
table = js.report.table(state.params, masks, asked=0.5, title="2:4 along the inputs")
rich.print(table)
print(f"test accuracy, one seed:\n  dense {dense:.2%}\n  2:4   {sparse:.2%}")
histories = {"dense": dense_history, "2:4": history}
js.report.plot({"2:4": table}, history=histories, path=args.out / "train_state.png")
print(f"Wrote train_state.png to {args.out}")
