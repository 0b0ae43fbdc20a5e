# %% [markdown]
# # M-FAC as an optimizer
#
# The curvature that says which weights may go also says where to go: M-FAC multiplies
# each gradient by the inverse Fisher matrix of the last few gradients, and needs no
# matrix for it. Against SGD with momentum and Adam on real digits, each with the best
# of its learning rates, in steps and in seconds.

# %%
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, show
from _mlp import accuracy, init
from _mlp import train as scan
from _pictures import draw_losses

import jaxsparse as js

args = arguments("M-FAC.", small="few steps, few rates", out="out/mfac_optimizer")
RECORDS, SEEDS = (6, 3) if args.small else (50, 5)
EVERY = 10
STEPS = RECORDS * EVERY

# %% [markdown]
# A training run is a function of the learning rate and of a key, so all rates and all
# seeds of an optimizer are one `vmap`. M-FAC is an optax transformation like the
# others; its window of gradients is part of the state. A damping of 0.1 was the best of
# 0.1, 0.01, 1e-3 and 1e-5: with fewer gradients than weights most directions are known
# by nothing else, and the step there is rate / damping times the gradient.

# %%
mfac = functools.partial(js.transforms.mfac, window=64, damping=0.1, momentum=0.9)
OPTIMIZERS = {
    "SGD, momentum 0.9": functools.partial(optax.sgd, momentum=0.9),
    "Adam": optax.adam,
    "M-FAC, window 64": mfac,
}


def train(make, rate, key):
    start = init(key, (64, 128, 64, 10))
    found = scan(make(rate), start, key, steps=STEPS, every=EVERY)
    return found.losses, accuracy(found.params)


# %% [markdown]
# The rate is chosen on one seed, by the training loss at the end; the results are those
# of other seeds.

# %%
exponents = np.arange(-3.0, -0.5) if args.small else np.arange(-4.0, 1.0, 0.5)
rates = jnp.asarray(10.0**exponents, jnp.float32)
tuning, *keys = jax.random.split(jax.random.key(0), 1 + SEEDS)
keys, curves, rows = jnp.stack(keys), {}, []
for name, make in OPTIMIZERS.items():
    one = functools.partial(train, make)
    run = jax.jit(jax.vmap(one))
    losses, _ = run(rates, jnp.broadcast_to(tuning, rates.shape))
    last = np.nan_to_num(losses[:, -1], nan=np.inf)
    rate = jnp.broadcast_to(rates[int(np.argmin(last))], SEEDS)
    losses, accuracies = run(rate, keys)
    timed = functools.partial(jax.jit(one), rate[0], keys[0])
    if args.small:  # all seeds together, which need not be compiled again
        timed = functools.partial(run, rate, keys)
    jax.block_until_ready(timed())  # compiles
    begin = time.perf_counter()
    jax.block_until_ready(timed())
    seconds = (time.perf_counter() - begin) / STEPS
    curves[name] = np.asarray(losses), seconds
    found = (f"{losses[:, -1].mean():.5f}", f"{accuracies.mean():.2%}")
    rows.append((name, f"{rate[0]:.1g}", *found, f"{1e3 * seconds:.3f}"))
columns = ("", "rate", "training loss", "test accuracy", "ms a step")
show(f"{STEPS} steps of 64 digits, {SEEDS} seeds", columns, rows)
draw_losses(curves, EVERY, args.out / "mfac_optimizer.png")
