# %% [markdown]
# # Flax NNX: the optimizer changes, the model and the loop do not
#
# `nnx.Optimizer` takes any optax transformation, so it takes one that prunes.

# %%
import jax.numpy as jnp
import numpy as np
import optax
import rich
from _common import arguments
from _data import digits
from _training import History, batches, cross_entropy
from flax import nnx

import jaxsparse as js

args = arguments("Prune with NNX.", small="few steps", out="out/nnx_training")
STEPS, data = (100 if args.small else 1_000), digits()
EVERY = STEPS // 50


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.down = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(1024, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.down(nnx.relu(self.norm(self.conv(x)))))
        return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(x), y))(model)
    optimizer.update(model, grads)
    return loss


def train(tx, name):
    model, history = Net(nnx.Rngs(0)), History(EVERY)
    optimizer, draws = nnx.Optimizer(model, tx, wrt=nnx.Param), batches(data.x, data.y)
    for step in js.report.progress(range(STEPS), description=name):
        loss = train_step(model, optimizer, *next(draws))
        layers = (model.down, model.hidden, model.out)
        history.note(step, loss, [layer.kernel[...] for layer in layers])
    model.eval()
    accuracy = np.mean(np.argmax(nnx.jit(model)(data.x_test), -1) == data.y_test)
    return nnx.as_pure(nnx.state(model, nnx.Param)), optimizer, history.found, accuracy


# %% [markdown]
# The first layer stays dense: a regular expression on paths says who takes part. The
# masks are in the state of the optimizer, under the paths of the parameters.

# %%
when = {"begin": 10 * EVERY, "end": 35 * EVERY}
prune_schedule = js.prune_schedule(
    js.schedules.polynomial(final=0.9, **when),
    every=js.schedules.every(EVERY, **when),
    where=r"^(down|hidden|out)/kernel",
    pattern=js.Unstructured(scope="global"),
)
adam = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
_, _, dense_history, dense = train(adam, "dense")
sparse_adam = js.enforce(optax.chain(prune_schedule, adam))
params, optimizer, history, sparse = train(sparse_adam, "90 %")

# %%
masks = js.masks_of(optimizer.opt_state)
js.assert_sparse(optimizer.opt_state, params)
assert not jnp.any(params["hidden"]["kernel"][~masks["hidden"]["kernel"]])
table = js.report.table(params, masks, title="90 % of three kernels together")
rich.print(table)
print(f"test accuracy, one seed:\n  dense {dense:.2%}\n  90 %  {sparse:.2%}")
histories = {"dense": dense_history, "90 %": history}
js.report.plot({"90 %": table}, history=histories, path=args.out / "nnx_training.png")
