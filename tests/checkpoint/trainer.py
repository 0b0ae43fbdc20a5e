"""Trains a small sparse network and saves after each step; run by `test_kill.py`.

`python trainer.py DIRECTORY STEPS CACHE METHOD` goes on from the latest checkpoint in
DIRECTORY and prints a hash of every bit of the final parameters, masks and optimizer
state.
"""

import functools
import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js


def init_params():
    rng = np.random.default_rng(0)
    kernel = lambda *shape: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)
    return {
        "dense_0": {"kernel": kernel(16, 128), "bias": jnp.zeros(128)},
        "dense_1": {"kernel": kernel(128, 4), "bias": jnp.zeros(4)},
    }


def gradual(total_steps):
    end = total_steps - 5
    return js.prune_schedule(
        js.schedules.polynomial(final=0.8, begin=0, end=end),
        every=js.schedules.every(1, begin=0, end=end),
        where=r"kernel$",
    )


def moving(method, total_steps):
    """Masks that change in every other step, with all that such a state may hold."""
    return method(
        0.8,
        every=js.schedules.every(2, begin=2, end=total_steps - 3),
        key=jax.random.key(3),
        drop_fraction=optax.cosine_decay_schedule(0.3, total_steps),
        where=r"kernel$",
        track=True,
    )


METHODS = {
    "gradual": gradual,
    "rigl": functools.partial(moving, js.transforms.rigl),
    "set_": functools.partial(moving, js.transforms.set_),
    "snfs": functools.partial(moving, js.transforms.snfs),
    "acdc": lambda total_steps: js.transforms.acdc(
        0.8, begin=2, end=total_steps - 3, sparse=2, dense=2, where=r"kernel$"
    ),
}


def make_tx(total_steps, method):
    # The noise has a typed key in its state; the learning rate is an array in it; the
    # momentum is of columns that are drawn anew.
    noise = optax.add_noise(eta=1e-3, gamma=0.55, key=jax.random.key(7))
    momentum = js.transforms.frugal(
        *(optax.trace(0.5), optax.identity()),
        density=0.5,
        every=3,
        key=jax.random.key(5),
    )
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    members = [METHODS[method](total_steps), noise, adam]
    if method == "rigl":
        members.insert(1, momentum)
    return js.enforce(optax.chain(*members))


def batch_of(step):
    """Data by step: a run that is resumed sees what it would have seen."""
    rng = np.random.default_rng([1, step])
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return draw(32, 16), draw(32, 4)


def loss_fn(params, batch):
    x, y = batch
    hidden, out = params["dense_0"], params["dense_1"]
    x = jnp.tanh(x @ hidden["kernel"] + hidden["bias"])
    return jnp.mean((x @ out["kernel"] + out["bias"] - y) ** 2)


def hash_of(*trees):
    digest = hashlib.sha256()
    for path, x in js.tree.leaves_with_paths(trees):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        digest.update(f"{path} {x.shape} {x.dtype} {x.weak_type}".encode())
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()


def train(directory, total_steps, method, *, until=None, save_at=None):
    """Goes on from the latest checkpoint, and saves; in all steps if none are named.

    With `until` it ends there, as if it was killed. Returns the step where it began,
    the number of times that masks changed, and a hash of where it ended.
    """
    tx = make_tx(total_steps, method)

    @jax.jit
    def train_step(params, opt_state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = js.init_sparse(tx, init_params())
    first, changes = 0, 0
    if js.checkpoint.latest_step(directory) is not None:
        restored = js.checkpoint.restore(directory, params=params, opt_state=opt_state)
        params, opt_state, first = restored.params, restored.opt_state, restored.step
        assert restored.extra == {"data": first * 32}
    for step in range(first, total_steps if until is None else until):
        before = hash_of(js.masks_of(opt_state))
        params, opt_state = train_step(params, opt_state, batch_of(step))
        changes += hash_of(js.masks_of(opt_state)) != before
        if save_at is None or step + 1 in save_at:
            js.checkpoint.save(
                directory,
                step=step + 1,
                params=params,
                opt_state=opt_state,
                extra={"data": (step + 1) * 32},
                keep=2,
            )
    if until is None:
        js.assert_sparse(opt_state, params)
    return first, changes, hash_of(params, js.masks_of(opt_state), opt_state)


def main(directory, total_steps, method):
    first, _, found = train(directory, total_steps, method)
    print("began at", first)
    print("hash", found)


if __name__ == "__main__":
    # One that is killed may leave half an entry.
    if sys.argv[3] == "read":
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[4])
