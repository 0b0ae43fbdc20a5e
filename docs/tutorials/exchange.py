# %% [markdown]
# # Send few entries of a gradient
#
# Workers that train together exchange their gradients in every step. Here eight of
# them, simulated on one processor, exchange a hundredth or a thousandth of each: the
# values and indices of the largest entries. We count bytes and look at the accuracy.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P
from sklearn.datasets import load_digits

import jaxsparse as js

jax.config.update("jax_num_cpu_devices", 8)
WORKERS, STEPS, SIZES = 8, 300, (64, 256, 128, 10)
x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
x_train, y_train = jnp.asarray(x[:1347]), jnp.asarray(y[:1347])
x_test, y_test = x[1347:], y[1347:]


def init(key):
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 3)
    return [draw(k, SIZES[i : i + 2]) for i, k in enumerate(keys)]


def apply(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params[0]) @ params[1]) @ params[2]


def loss_fn(params, rows):
    logits, labels = apply(params, x_train[rows]), y_train[rows]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %% [markdown]
# ## A step
#
# Each worker takes the gradient of its own rows; `pcast` keeps JAX from adding up the
# gradients of all workers. The exchange is the first member of the optimizer's chain.
# Its state has a part for each worker; `js.exchange.specs` tells `shard_map` which.

# %%
mesh = jax.make_mesh((WORKERS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def train(tx, dense=False):
    params = init(jax.random.key(0))
    opt_state = tx.init(params)
    split = js.exchange.specs(opt_state, "data")

    def step(params, opt_state, rows):
        here = jax.lax.pcast(params, "data", to="varying")
        grads = jax.grad(loss_fn)(here, rows)
        grads = jax.lax.pmean(grads, "data") if dense else grads
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    specs = {"in_specs": (P(), split, P("data")), "out_specs": (P(), split)}
    step = jax.shard_map(step, mesh=mesh, **specs)

    def body(carry, key):
        return step(*carry, jax.random.randint(key, (64,), 0, len(x_train))), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, keys)[0])
    return run((params, opt_state))


# %% [markdown]
# ## Bytes against accuracy
#
# Without memory, small entries are never sent. Error feedback remembers what a worker
# has not sent; it is made for SGD without momentum, at a higher rate. Deep Gradient
# Compression accumulates momentum before it chooses, so plain SGD follows it, too.

# %%
rate = optax.cosine_decay_schedule(0.1, STEPS)
heavy, plain = optax.sgd(rate, momentum=0.9), optax.sgd(rate)
fast = optax.sgd(optax.cosine_decay_schedule(0.5, STEPS))
at = {"axis_name": "data", "workers": WORKERS}
methods = {
    "top-k": lambda f: optax.chain(
        js.exchange.top_k(f, error_feedback=False, **at), heavy
    ),
    "error feedback": lambda f: optax.chain(js.exchange.top_k(f, **at), fast),
    "DGC": lambda f: optax.chain(js.exchange.dgc(f, **at), plain),
}
accuracy = lambda p: float(np.mean(np.argmax(apply(p, x_test), -1) == y_test))
params, _ = train(heavy, dense=True)
size = 4 * sum(w.size for w in params)
print(f"dense: {accuracy(params):.1%} with {size:,} bytes a step")
runs = {}
for name, make in methods.items():
    points = []
    for fraction in (0.001, 0.01):
        params, opt_state = train(make(fraction))
        points.append((float(opt_state[0].bytes_moved) / STEPS, accuracy(params)))
        print(f"{name}, {fraction:.1%}: {points[-1][1]:.1%} with {points[-1][0]:,.0f}")
    runs[name] = tuple(zip(*points, strict=True))
js.report.plot_tradeoff(runs, xlabel="bytes a step")
