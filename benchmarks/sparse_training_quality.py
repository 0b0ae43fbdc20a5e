"""Accuracy of sparse training on Fashion-MNIST: methods in one setting, three seeds.

    python benchmarks/sparse_training_quality.py             # 15 minutes on two cores
    python benchmarks/sparse_training_quality.py --only masks
    python benchmarks/sparse_training_quality.py --small     # a smoke run, not written

No pytest file: it measures quality, not speed, and needs images that are not part of
jaxsparse (see `examples/_data.py`). It writes
`benchmarks/results/sparse_training_quality.json`; what did not run anew stays in it.

A perceptron 196-300-100-10 on images averaged to 14 x 14, SGD 0.1 with momentum 0.9,
weight decay 1e-4, a cosine, 2,500 steps of 128. `masks` trains sparse; `cram` prunes
once after training, nothing trained afterwards; `exchange` trains on four workers that
send few entries of their gradients; `recovery` trains a pruned network on 1,000 images.
Straight-through begins dense and reaches its sparsity after half of the steps; from a
constant sparsity of 98 % and above it falls apart within the first steps.
"""

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
import optax

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from _data import find  # noqa: E402
from _rows import Rows  # noqa: E402

import jaxsparse as js  # noqa: E402
from jaxsparse import exchange, masking, transforms  # noqa: E402

RESULTS = HERE / "results" / "sparse_training_quality.json"
SEEDS, BATCH, WORKERS = 3, 128, 4
EVERYWHERE = js.Unstructured("global")


@functools.cache
def data() -> dict[str, jax.Array]:
    (path,) = find("images/fashion_mnist.npz")
    with np.load(path) as file:
        x, y, x_test, y_test = (
            file[k] for k in ("x_train", "y_train", "x_test", "y_test")
        )
    small = lambda x: x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196) / 255
    mean, deviation = small(x).mean(), small(x).std()
    put = lambda x: jnp.asarray((small(x) - mean) / deviation, jnp.float32)
    labels = lambda y: jnp.asarray(y, jnp.int32)
    return {
        "x": put(x),
        "y": labels(y),
        "x_test": put(x_test),
        "y_test": labels(y_test),
    }


def init(seed: int) -> dict:
    sizes, draw = (196, 300, 100, 10), jax.nn.initializers.he_normal()
    key = jax.random.key(seed)
    return {
        f"dense_{i}": {
            "kernel": draw(jax.random.fold_in(key, i), sizes[i : i + 2]),
            "bias": jnp.zeros(sizes[i + 1]),
        }
        for i in range(3)
    }


def apply(params: dict, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


def loss_fn(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(params: dict) -> jax.Array:
    right = jnp.argmax(apply(params, data()["x_test"]), -1) == data()["y_test"]
    return 100 * jnp.mean(right)


def sgd(steps: int) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(0.1, steps)
    decay = optax.add_decayed_weights(1e-4)
    return optax.chain(decay, optax.sgd(rate, momentum=0.9))


def train(
    params: dict,
    tx: optax.GradientTransformation,
    steps: int,
    seed: int,
    value_and_grad: Callable[..., Any] | None = None,
    images: int | None = None,
    gradient_at: Callable[[Any], Any] | None = None,
) -> tuple[dict, Any]:
    """The parameters and the optimizer's state after a training."""
    x, y = data()["x"][:images], data()["y"][:images]
    plain = jax.value_and_grad(loss_fn)
    gradient = value_and_grad or (lambda params, x, y, key: plain(params, x, y))
    in_step = gradient_at or (lambda _: gradient)

    def step(carry, given):
        (params, state), (key, number) = carry, given
        rows = jax.random.randint(key, (BATCH,), 0, len(x))
        _, grads = in_step(number)(params, x[rows], y[rows], key=key)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1_000 + seed), steps)
    given = keys, jnp.arange(steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, given)[0])
    return run((params, tx.init(params)))


def masks_of_methods(sparsity: float, steps: int, seed: int) -> dict[str, Callable]:
    """By name: a training to `sparsity`, which returns the sparse parameters."""
    params, key, tx = init(seed), jax.random.key(10_000 + seed), sgd(steps)
    erk = js.allocations.erk(params, sparsity)
    unit = steps // 50
    early, late = 5 * unit, 37 * unit  # a tenth, three quarters
    moving = {
        "every": js.schedules.every(2 * unit, begin=2 * unit, end=late),
        "drop_fraction": optax.cosine_decay_schedule(0.3, late),
        "key": key,
    }
    cubic = js.schedules.polynomial(final=sparsity, begin=early, end=late)
    gradual = js.prune_schedule(
        cubic,
        every=js.schedules.every(unit, begin=early, end=late),
        pattern=EVERYWHERE,
    )
    phase = steps // 20
    phases = js.schedules.alternating(
        sparsity, begin=2 * phase, end=15 * phase, sparse=phase, dense=phase
    )
    acdc = js.prune_schedule(
        phases,
        every=js.schedules.every(phase, begin=2 * phase, end=15 * phase),
        pattern=EVERYWHERE,
    )

    def sparse(method: transforms.PruneSchedule, **options: Any) -> dict:
        wrapped = method.wrap(tx, **options)
        start, state = js.init_sparse(wrapped, params)
        del state
        return train(start, wrapped, steps, seed)[0]

    def straight_through(sparsity_at: Callable[[Any], Any]) -> dict:
        prune = functools.partial(js.straight_through, pattern=EVERYWHERE)

        def gradient_at(step):
            masked = lambda p, x, y: loss_fn(prune(p, sparsity_at(step)), x, y)
            gradient = jax.value_and_grad(masked)
            return lambda params, x, y, key: gradient(params, x, y)

        trained = train(params, tx, steps, seed, gradient_at=gradient_at)[0]
        return prune(trained, sparsity)

    half = js.schedules.polynomial(final=sparsity, begin=0, end=steps // 2)
    constant = js.schedules.constant(sparsity)
    return {
        "straight-through": lambda: straight_through(half),
        "straight-through, constant": lambda: straight_through(constant),
        "GMP": lambda: sparse(gradual),
        "RigL": lambda: sparse(transforms.rigl(erk, **moving), skip_updates=True),
        "SNFS": lambda: sparse(transforms.snfs(erk, **moving), skip_updates=True),
        "SET": lambda: sparse(transforms.set_(erk, **moving), skip_updates=True),
        "AC/DC": lambda: sparse(acdc),
        "static": lambda: sparse(transforms.static(erk, key=key)),
    }


def measure_masks(rows: Rows, steps: int, seeds: int) -> None:
    for sparsity in (0.95, 0.98, 0.99):
        for name in masks_of_methods(sparsity, steps, 0):
            found = []
            for seed in range(seeds):
                params = masks_of_methods(sparsity, steps, seed)[name]()
                kernels = [params[k]["kernel"] for k in params]
                zeros = sum(int(jnp.sum(w == 0)) for w in kernels)
                assert zeros >= round(sparsity * sum(w.size for w in kernels)) - 3
                found.append(float(accuracy(params)))
            add(rows, found, what="masks", method=name, sparsity=sparsity)


def measure_cram(rows: Rows, steps: int, seeds: int) -> None:
    aware = masking.cram(loss_fn, sparsities=(0.5, 0.7, 0.9, 0.95))
    for name, gradient in (("SGD", None), ("CrAM+", aware)):
        trained = [
            train(init(seed), sgd(steps), steps, seed, gradient)[0]
            for seed in range(seeds)
        ]
        for sparsity in (0.0, 0.5, 0.7, 0.8, 0.9, 0.95):
            pruned = [
                js.prune(params, sparsity, pattern=EVERYWHERE).params
                for params in trained
            ]
            found = [float(accuracy(params)) for params in pruned]
            add(rows, found, what="one-shot", method=name, sparsity=sparsity)


def measure_exchange(rows: Rows, steps: int, seeds: int) -> None:
    steps = 2 * steps // 5
    at = {"axis_name": "data", "workers": WORKERS}
    rate = optax.cosine_decay_schedule(0.1, steps)
    plain, heavy = optax.sgd(rate), optax.sgd(rate, momentum=0.9)
    # Error feedback is plain SGD's: entries that waited come late, and momentum after
    # them carries them on for too long.
    fast = optax.sgd(optax.cosine_decay_schedule(0.5, steps))

    def top_k(fraction: float, after: Any, error_feedback: bool) -> Any:
        exchanged = exchange.top_k(fraction, error_feedback=error_feedback, **at)
        return optax.chain(exchanged, after)

    methods = {"dense": lambda fraction: heavy}
    for name, feedback in (("top-k", False), ("top-k, error feedback", True)):
        for after, how in ((heavy, ""), (fast, ", no momentum")):
            methods[name + how] = functools.partial(
                top_k, after=after, error_feedback=feedback
            )
    methods["DGC"] = lambda fraction: optax.chain(
        exchange.dgc(fraction, warmup_steps=steps // 5, **at), plain
    )
    methods["EF21"] = lambda fraction: optax.chain(exchange.ef21(fraction, **at), plain)
    for fraction in (0.01, 0.001):
        for name, make in methods.items():
            found, moved = zip(
                *[
                    exchanged(make(fraction), steps, seed, dense=name == "dense")
                    for seed in range(seeds)
                ],
                strict=True,
            )
            add(
                rows,
                found,
                what="exchange",
                method=name,
                fraction=fraction,
                bytes_a_step=round(moved[0]),
            )


def exchanged(
    tx: optax.GradientTransformation, steps: int, seed: int, *, dense: bool
) -> tuple[float, float]:
    """The accuracy, and the bytes that a worker sends in a step to each other one."""
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((WORKERS,), ("data",), axis_types=(auto,))
    P = jax.P
    params = init(seed)
    state = tx.init(params)
    split = exchange.specs(state, "data")
    x, y = data()["x"], data()["y"]

    def step(params, state, rows):
        local = jax.lax.pcast(params, "data", to="varying")
        grads = jax.grad(loss_fn)(local, x[rows], y[rows])
        if dense:
            grads = jax.lax.pmean(grads, "data")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), split, P("data")), out_specs=(P(), split)
    )

    def body(carry, key):
        rows = jax.random.randint(key, (BATCH,), 0, len(x))
        return step(*carry, rows), None

    keys = jax.random.split(jax.random.key(1_000 + seed), steps)
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, keys)[0])
    params, state = run((params, state))
    counted = [
        s.bytes_moved
        for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "bytes_moved"))
        if hasattr(s, "bytes_moved")
    ]
    size = 4 * sum(w.size for w in jax.tree.leaves(params))
    return float(accuracy(params)), float(counted[0]) / steps if counted else size


def measure_recovery(rows: Rows, steps: int, seeds: int) -> None:
    steps_after = 400
    for sparsity in (0.95, 0.98):
        losses = {"cross-entropy": None, "KD 1": 1.0, "KD 2": 2.0, "KD 5.5": 5.5}
        found: dict[str, list[float]] = {name: [] for name in ("one-shot", *losses)}
        for seed in range(seeds):
            dense = train(init(seed), sgd(steps), steps, seed)[0]
            pruned, masks = js.prune(dense, sparsity, pattern=EVERYWHERE)
            found["one-shot"].append(float(accuracy(pruned)))
            for name, temperature in losses.items():
                tx = optax.chain(sgd(steps_after), js.keep_sparse(masks))
                gradient = taught(dense, temperature)
                after = train(pruned, tx, steps_after, seed, gradient, images=1_000)[0]
                found[name].append(float(accuracy(after)))
        for name, values in found.items():
            add(rows, values, what="recovery", method=name, sparsity=sparsity)


def taught(teacher: dict, temperature: float | None) -> Callable[..., Any]:
    """The gradient of distillation from a teacher, or of cross-entropy."""

    def loss(params, x, y):
        if temperature is None:
            return loss_fn(params, x, y)
        given = apply(params, x), apply(teacher, x), y
        distilled = js.losses.distill(*given, temperature=temperature, hardness=1.0)
        return distilled.mean()

    gradient = jax.value_and_grad(loss)
    return lambda params, x, y, key: gradient(params, x, y)


def add(rows: Rows, found: Any, **what: Any) -> None:
    rows.measure(
        None, what | {"accuracy": round(float(np.mean(found)), 2)}, sd=spread(found)
    )


def spread(found: Any) -> float:
    return round(float(np.std(found)), 2)


PARTS = {
    "masks": measure_masks,
    "cram": measure_cram,
    "exchange": measure_exchange,
    "recovery": measure_recovery,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="few steps, one seed")
    args = parser.parse_args()
    target = pathlib.Path("out") / RESULTS.name if args.small else RESULTS
    key = ("what", "method", "sparsity", "fraction")
    for name, part in PARTS.items():
        if args.only in (None, name):
            rows = Rows(target, "196-300-100-10", {}, key)
            part(rows, 200 if args.small else 2_500, 1 if args.small else SEEDS)


if __name__ == "__main__":
    main()
