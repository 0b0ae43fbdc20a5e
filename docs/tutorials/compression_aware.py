# %% [markdown]
# # Train once, prune at any sparsity
#
# A network that was trained as usual loses much accuracy when it is pruned in one
# shot. CrAM takes its gradients at pruned points, so that the network bears pruning at
# several sparsities, with nothing trained afterwards. We compare both on scikit-learn's
# digits.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxsparse as js

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
x_train, y_train = jnp.asarray(x[:1347]), jnp.asarray(y[:1347])
x_test, y_test = x[1347:], y[1347:]
STEPS, SIZES = 800, (64, 256, 128, 10)


def init(key):
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 3)
    return [draw(k, SIZES[i : i + 2]) for i, k in enumerate(keys)]


def apply(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params[0]) @ params[1]) @ params[2]


def loss_fn(params, rows):
    logits, labels = apply(params, x_train[rows]), y_train[rows]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(params):
    return float(np.mean(np.argmax(apply(params, x_test), -1) == y_test))


# %% [markdown]
# ## The gradient
#
# `js.masking.cram` stands in the place of `jax.value_and_grad`. In each step it draws a
# sparsity, climbs a little, prunes, and takes a second gradient there. The optimizer is
# any.

# %%
how = {"where": lambda path, leaf: True, "axes": js.Axes(input=(0,), output=(1,))}
anywhere = js.Unstructured(scope="global")
aware = js.masking.cram(loss_fn, sparsities=(0.5, 0.7, 0.9, 0.95), **how)
plain = jax.value_and_grad(loss_fn)
gradients = {"plain": lambda p, rows, key: plain(p, rows), "CrAM": aware}
tx = optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9)


def train(value_and_grad, params):
    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(x_train))
        grads = value_and_grad(params, rows, key=key)[1]
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0][0])
    return run((params, tx.init(params)))


# %% [markdown]
# ## One shot
#
# One network each, pruned at six sparsities.

# %%
sparsities = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
curves = {}
for name, value_and_grad in gradients.items():
    trained = train(value_and_grad, init(jax.random.key(0)))
    pruned = [js.prune(trained, s, pattern=anywhere, **how) for s in sparsities]
    curves[name] = list(sparsities), [accuracy(p.params) for p in pruned]
    print(f"{name:6}", " ".join(f"{a:.1%}" for a in curves[name][1]))
js.report.plot_tradeoff(curves, xlabel="sparsity")

# %% [markdown]
# A step of CrAM takes two gradients and chooses masks once, so it takes two to three
# times as long. Networks with BatchNorm estimate its statistics again after pruning, by
# `js.calibration.batch_statistics`. [Results](../results.md#train-sparse) has the
# same on Fashion-MNIST.
