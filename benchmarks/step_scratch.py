"""Scratch memory of a jitted, donated training step, in the parameters' bytes.

    .venv/bin/python benchmarks/step_scratch.py

It is what XLA plans beside the arguments and results; nothing runs. The first line is
the reference: adam alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js

WIDTH, LAYERS = 1024, 6


def loss(params, x):
    for w in params.values():
        x = jnp.tanh(x @ w)[:, :WIDTH]
    return jnp.sum(x**2)


def scratch(tx, params, x) -> float:
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), x)
    taken = lowered.compile().memory_analysis().temp_size_in_bytes
    return taken / sum(w.nbytes for w in jax.tree.leaves(params))


def main():
    rng = np.random.default_rng(0)
    wide = lambda i: 4 * WIDTH if i % 2 else WIDTH
    draw = lambda i: rng.standard_normal((WIDTH, wide(i))).astype(np.float32)
    params = {f"kernel_{i}": jax.device_put(draw(i)) for i in range(LAYERS)}
    x = jax.device_put(np.ones((4, WIDTH), np.float32))
    print(f"adam: {scratch(optax.adam(1e-3), params, x):.2f}")
    for scope in ("layer", "global"):
        prune_schedule = js.prune_schedule(
            js.schedules.polynomial(final=0.9, begin=0, end=100),
            every=js.schedules.every(10, begin=0, end=100),
            pattern=js.Unstructured(scope),
        )
        tx = prune_schedule.wrap(optax.adam(1e-3))
        print(f"enforce, {scope}: {scratch(tx, params, x):.2f}")


if __name__ == "__main__":
    main()
