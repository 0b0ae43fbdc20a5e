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
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from _common import arguments
from _data import digits
from matplotlib.figure import Figure
from rich.table import Table

import jaxsparse as js

args = arguments(
    "M-FAC against SGD and Adam.",
    small="few steps, few rates",
    out="out/mfac_optimizer",
)

RECORDS, EVERY, BATCH = (6 if args.small else 50), 10, 64
SEEDS = 3 if args.small else 5
data = digits()
flat = lambda images: jnp.asarray(images.reshape(len(images), -1))
x, y = flat(data.x), jnp.asarray(data.y)
x_test, y_test = flat(data.x_test), jnp.asarray(data.y_test)


# %%
def init(key: jax.Array) -> dict:
    sizes = (64, 128, 64, 10)
    draw = jax.nn.initializers.he_normal()
    return {
        f"dense_{i}": {
            "kernel": draw(jax.random.fold_in(key, i), (sizes[i], sizes[i + 1])),
            "bias": jnp.zeros(sizes[i + 1]),
        }
        for i in range(3)
    }


def forward(params: dict, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


def loss_fn(params: dict, x, y) -> jax.Array:
    logits = forward(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# %% [markdown]
# A training run is a function of the learning rate and of a key, so all rates and all
# seeds of an optimizer are one `vmap`. M-FAC is an optax transformation like the
# others; its window of gradients is part of the state. A damping of 0.1 was the best of
# 0.1, 0.01, 1e-3 and 1e-5: with fewer gradients than weights most directions are known
# by nothing else, and the step there is rate / damping times the gradient.


# %%
def sgd(rate):
    return optax.sgd(rate, momentum=0.9)


def mfac(rate):
    return js.transforms.mfac(rate, window=64, damping=0.1, momentum=0.9)


OPTIMIZERS: dict[str, Callable] = {
    "SGD, momentum 0.9": sgd,
    "Adam": optax.adam,
    "M-FAC, window 64": mfac,
}


def train(make: Callable, rate: jax.Array, key: jax.Array):
    """The loss on all training images every few steps, and the test accuracy."""
    params, tx = init(key), make(rate)

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(loss_fn)(params, x[rows], y[rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def record(carry, rows):
        carry, _ = jax.lax.scan(step, carry, rows)
        return carry, loss_fn(carry[0], x, y)

    rows = jax.random.randint(key, (RECORDS, EVERY, BATCH), 0, len(x))
    (params, _), losses = jax.lax.scan(record, (params, tx.init(params)), rows)
    right = jnp.argmax(forward(params, x_test), -1) == y_test
    return losses, right.mean()


# %% [markdown]
# The rate is chosen on one seed, by the training loss at the end; the results are those
# of other seeds.

# %%
exponents = np.arange(-3.0, -0.5) if args.small else np.arange(-4.0, 1.0, 0.5)
rates = jnp.asarray(10.0**exponents, jnp.float32)
tuning, *keys = jax.random.split(jax.random.key(0), 1 + SEEDS)
keys = jnp.stack(keys)

results = Table(title=f"{RECORDS * EVERY} steps of {BATCH} digits, {SEEDS} seeds")
for column in ("", "rate", "training loss", "test accuracy", "ms a step"):
    results.add_column(column, justify="right" if column else "left")
curves = {}
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
    seconds = (time.perf_counter() - begin) / (RECORDS * EVERY)
    curves[name] = np.asarray(losses), seconds
    results.add_row(
        name,
        f"{rate[0]:.1g}",
        f"{losses[:, -1].mean():.5f}",
        f"{accuracies.mean():.2%}",
        f"{1e3 * seconds:.3f}",
    )
rich.print(results)

# %%
figure = Figure(figsize=(10, 4.2), layout="constrained")
by_step, by_second = figure.subplots(1, 2, sharey=True)
steps = EVERY * np.arange(1, RECORDS + 1)
for name, (losses, seconds) in curves.items():
    for axes, at in ((by_step, steps), (by_second, steps * seconds)):
        (line,) = axes.plot(at, losses.mean(0), label=name)
        low, high = losses.min(0), losses.max(0)
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
by_step.set(xlabel="steps", ylabel="training loss", yscale="log")
by_second.set(xlabel="seconds")
for axes in (by_step, by_second):
    axes.grid(alpha=0.3)
by_step.legend(fontsize=9)
figure.savefig(args.out / "mfac_optimizer.png", dpi=130)
print(f"Wrote mfac_optimizer.png to {args.out}")
