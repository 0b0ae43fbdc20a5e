"""What sparse training costs: masks that move, CrAM, MaskLLM, the choice of entries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from test_training_step import WIDTHS, Run, init, loss

import jaxsparse as js
from jaxsparse import exchange, masking, transforms

NEVER = 10**6


def test_moving_masks(large, compare):
    """Quiet steps, and steps that move masks, against plain adam."""
    batch = _batch(large)
    adam = lambda: optax.adam(1e-3)
    run = functools.partial(Run, batch=batch, large=large)
    # Masks are there from the start, and first move long after what is timed.
    late = js.schedules.every(1, begin=NEVER)
    rigl = functools.partial(transforms.rigl, 0.9, key=jax.random.key(0))
    set_ = functools.partial(transforms.set_, 0.9, key=jax.random.key(0))
    runs = {
        "plain adam": run(adam()),
        "RigL, quiet step": run(rigl(every=late).wrap(adam(), skip_updates=True)),
        "RigL, update step": run(rigl(every=1).wrap(adam(), skip_updates=True)),
        "SET, update step": run(set_(every=1).wrap(adam(), skip_updates=True)),
        "CrAM": Aware(adam(), batch, large),
    }
    compare("sparse training, 5M MLP", runs)
    for trained in runs.values():
        if trained.pruned:
            kernels = [p["kernel"] for p in trained.params.values()]
            zeros = sum(int(np.sum(np.asarray(w) == 0)) for w in kernels)
            assert zeros >= 0.9 * sum(w.size for w in kernels) - len(kernels)


def test_split_updates(large, compare):
    """FRUGAL's steps at a density of a quarter, against plain adam."""
    late = js.schedules.every(1, begin=NEVER)
    key, rate = jax.random.key(0), optax.scale_by_learning_rate(1e-3)

    def frugal(unit, every=late):
        split = transforms.frugal(
            *(optax.scale_by_adam(), optax.scale_by_sign()),
            density=0.25,
            every=every,
            key=key,
            unit=unit,
        )
        return Run(optax.chain(split, rate), batch=_batch(large), large=large)

    runs = {
        "plain adam": Run(optax.adam(1e-3), batch=_batch(large), large=large),
        "FRUGAL, inputs": frugal(-2),
        "FRUGAL, inputs, drawn anew": frugal(-2, every=1),
        "FRUGAL, outputs": frugal(-1),
        "FRUGAL, entries": frugal("entries"),
        "FRUGAL, entries, drawn anew": frugal("entries", every=1),
    }
    compare("split updates, 5M MLP", runs)


def _batch(large):
    x = jax.random.normal(jax.random.key(1), (128, WIDTHS[0] * (4 if large else 1)))
    return x, jnp.arange(128) % 10


class Aware:
    """A training with CrAM's gradient that makes one step at each call."""

    pruned = False

    def __init__(self, tx, batch, large):
        value_and_grad = masking.cram(loss, sparsities=(0.5, 0.7, 0.9))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, key):
            grads = value_and_grad(params, batch, key=key)[1]
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step, self.key = step, jax.random.key(2)
        self.params = init(large)
        self.state = tx.init(self.params)

    def __call__(self):
        self.params, self.state = self.step(self.params, self.state, self.key)
        return self.params


def test_learned_patterns(large, compare):
    """A dense layer, and one under MaskLLM's soft masks, at 4,096 tokens."""
    d_in, d_out = (4096, 11008) if large else (768, 3072)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((d_in, d_out), np.float32))
    x = jnp.asarray(rng.standard_normal((4096, d_in), np.float32))
    key, pattern = jax.random.key(0), js.NM(2, 4)
    logits = masking.init_mask_logits({"w": w}, pattern=pattern, key=key)

    def masked(at_once, logits):
        soft = masking.masked_by_logits(
            {"w": w}, logits, pattern=pattern, key=key, groups_at_once=at_once
        )
        return x @ soft["w"]

    dense = jax.jit(lambda w: x @ w)
    whole = jax.jit(functools.partial(masked, None))
    parts = jax.jit(functools.partial(masked, 16))
    compare(
        f"MaskLLM's forward, {d_in} x {d_out}, 4,096 tokens",
        {
            "dense": lambda: dense(w),
            "all groups at once": lambda: whole(logits),
            "16 groups at a time": lambda: parts(logits),
        },
    )


def test_largest_entries(compare):
    """The choice of 0.1 % of 25 million entries, as `exchange.dgc` makes it."""
    x = jax.random.normal(jax.random.key(0), (25_000_000,))
    once = jax.jit(lambda x: jnp.sum(jnp.abs(x) > 3))
    sort = jax.jit(jnp.argsort)
    ours = jax.jit(exchange.largest, static_argnums=1)
    compare(
        "the largest 0.1 % of 25M entries",
        {
            "floor: one pass over the memory": lambda: once(x),
            "jaxsparse": lambda: ours(x, 25_000),
            "argsort": lambda: sort(x),
        },
        rounds=3,
    )
