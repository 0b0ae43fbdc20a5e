"""A training step of a 5-million-parameter MLP at batch 128, against plain adam.

Parameters and state are donated, as people train.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js

WIDTHS = [784, 1600, 1600, 784, 10]


def init(large: bool) -> dict:
    widths = [w * 4 if large and i < 4 else w for i, w in enumerate(WIDTHS)]
    key = jax.random.key(0)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(jax.random.fold_in(key, i), (a, b))
            / np.sqrt(a),
            "bias": jnp.zeros(b),
        }
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }


def loss(params, batch):
    x, labels = batch
    for i in range(len(params)):
        x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        if i + 1 < len(params):
            x = jax.nn.relu(x)
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def argsort_straight_through(params):
    def one(w):
        if w.ndim < 2:
            return w
        flat = jnp.ravel(jnp.abs(w))
        keep = flat.size - int(np.floor(0.9 * flat.size + 0.5))
        cut = flat[jnp.argsort(-flat)[keep - 1]]
        return w + jax.lax.stop_gradient(jnp.where(jnp.abs(w) >= cut, w, 0) - w)

    return jax.tree.map(one, params)


class Run:
    """A training that makes one step at each call."""

    def __init__(self, tx, batch, large, *, forward=lambda p: p, apply=None):
        apply = apply or (lambda p, u, _: optax.apply_updates(p, u))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state):
            grads = jax.grad(lambda p: loss(forward(p), batch))(params)
            updates, state = tx.update(grads, state, params)
            return apply(params, updates, state), state

        self.step = step
        self.pruned = bool(js.transforms.find_states(tx.init(init(large))))
        self.params = init(large)
        self.state = tx.init(self.params)

    def __call__(self):
        self.params, self.state = self.step(self.params, self.state)
        return self.params


def test_training_step(large, compare):
    adam = lambda: optax.adam(1e-3)
    d_in = WIDTHS[0] * (4 if large else 1)
    x = jax.random.normal(jax.random.key(1), (128, d_in))
    batch = (x, jnp.arange(128) % 10)
    # Masks change in the first step alone; what is timed comes later.
    once = js.prune_schedule(0.9, every=js.schedules.at(0))
    always = js.prune_schedule(0.9, every=1)
    globally = js.prune_schedule(0.9, every=1, pattern=js.Unstructured(scope="global"))
    masks = js.prune(init(large), 0.9).masks
    run = functools.partial(Run, batch=batch, large=large)
    runs = {
        "plain adam": run(adam()),
        "quiet step, enforce": run(once.wrap(adam())),
        "quiet step, literal chain": run(
            optax.chain(once, adam()), apply=js.apply_updates
        ),
        "fixed masks, keep_sparse last": run(
            optax.chain(adam(), js.keep_sparse(masks))
        ),
        "update step, per layer": run(always.wrap(adam())),
        "update step, global": run(globally.wrap(adam())),
        "straight-through top-k": run(
            adam(), forward=lambda p: js.straight_through(p, 0.9)
        ),
        "straight-through by argsort": run(adam(), forward=argsort_straight_through),
    }
    compare("training step, 5M MLP", runs)
    for name, trained in runs.items():
        if trained.pruned:
            js.assert_sparse(trained.state, trained.params)
            kernels = [p["kernel"] for p in trained.params.values()]
            zeros = sum(int(np.sum(np.asarray(w) == 0)) for w in kernels)
            size = sum(w.size for w in kernels)
            assert abs(zeros - 0.9 * size) <= len(kernels), (name, zeros, size)
