"""Accuracy of pruned real networks: second order against magnitude, in full.

    python benchmarks/second_order_quality.py              # an hour on two cores
    python benchmarks/second_order_quality.py --only resnet

No pytest file: it measures quality, not speed, and needs weights, images and texts that
are not part of jaxsparse (see `examples/_data.py`, `examples/_minilm.py`). It writes
`benchmarks/results/second_order_quality.json`, one row for each method and sparsity;
methods that did not run anew stay as they were.

One-shot: nothing is trained after pruning. Settings were chosen on the first 2,000 test
images and the first 500 pairs of STS-B's dev set; results are on all 8,000 images, all
1,500 pairs of dev and, what was never looked at, the test half.
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import _minilm as minilm  # noqa: E402
import _resnet as resnet  # noqa: E402
from _data import decode, find  # noqa: E402
from _rows import Rows  # noqa: E402

import jaxsparse as js  # noqa: E402

# On few cores jaxlib's batched Cholesky factorisation can wait for itself when two run
# at once: one computation at a time.
jax.config.update("jax_cpu_enable_async_dispatch", False)

TARGET = HERE / "results" / "second_order_quality.json"
MFAC = 100.0  # relative damping of the full matrix
DAMPING = 0.1  # and of blocks, for MiniLM
GLOBAL, LAYER = js.Unstructured(scope="global"), js.Unstructured()
Prune = Callable[[float], js.Pruned]
Refresh = Callable[[Any, Any], js.curvature.Fisher]


def rows_of(model: str, metrics: dict[str, Callable[[Any], float]]) -> Rows:
    return Rows(TARGET, model, metrics, key=("model", "method"))


def add(
    rows: Rows, method: str, sparsities: Iterable[float], prune: Prune, **about
) -> None:
    """Prunes to each sparsity and measures."""
    for sparsity in sparsities:
        begin = time.perf_counter()
        params = jax.block_until_ready(prune(sparsity).params)
        seconds = round(time.perf_counter() - begin, 1)
        what = {"method": method, "sparsity": sparsity}
        rows.measure(params, what, seconds=seconds, **about)


def along(
    rows: Rows,
    method: str,
    cuts: dict[float, int],
    params: Any,
    refresh: Refresh,
    greedy: bool = False,
    **about,
) -> None:
    """One gradual run, measured whenever it passes a sparsity."""
    pruned = js.Pruned(params, None)
    for sparsity, steps in cuts.items():
        begin = time.perf_counter()
        pruned = js.solvers.obs(
            pruned.params,
            refresh(*pruned),
            sparsity,
            pattern=GLOBAL,
            masks=pruned.masks,
            greedy=greedy,
            steps=steps,
            refresh=refresh,
        )
        seconds = round(time.perf_counter() - begin, 1)
        about["cuts"] = about.get("cuts", 0) + steps
        what = {"method": method, "sparsity": sparsity}
        rows.measure(pruned.params, what, seconds=seconds, **about)


# ResNet-20 on CIFAR-10


SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8)


def prepare_resnet() -> tuple[Any, Any, Rows]:
    """Parameters, `gradients(params, masks, count, average)`, and where rows go."""
    name = "resnet20_cifar10_jpeg_adapted"
    weights, test, train = map(
        np.load,
        find(
            f"weights/{name}.npz",
            "images/cifar10_jpeg_test8k.npz",
            "images/cifar10_jpeg_train.npz",
        ),
    )
    params, stats = resnet.load(weights)
    x, y = decode(train, 20_000)
    loss_fn = resnet.cross_entropy(stats)
    x_test, y_test = test["x"], test["y"]
    rows = rows_of(
        name, {"accuracy": lambda p: resnet.accuracy(p, stats, x_test, y_test)}
    )
    rng = np.random.default_rng(0)

    def gradients(params, masks, count: int, average: int = 1):
        def batches() -> Iterator[dict]:
            while True:
                at = rng.integers(0, len(x), max(64, 4 * average))
                yield {"x": x[at], "y": y[at].astype(np.int32)}

        stream = js.curvature.stream_grads(
            loss_fn, params, batches(), count=count, average=average, masks=masks
        )
        grads = js.curvature.collect_grads(stream, count=count)
        return jax.tree.map(jnp.asarray, grads)

    return params, gradients, rows


def run_resnet() -> None:
    params, gradients, rows = prepare_resnet()

    def obs(fisher, pattern=GLOBAL, **options) -> Prune:
        return lambda s: js.solvers.obs(params, fisher, s, pattern=pattern, **options)

    add(rows, "dense", (0.0,), lambda s: js.Pruned(params, None))
    for scope, pattern in (("per layer", LAYER), ("global", GLOBAL)):
        magnitude = functools.partial(js.prune, params, pattern=pattern)
        add(rows, f"magnitude, {scope}", SPARSITIES, magnitude)

    # One step, 1,024 gradients of one image each.
    about = {"gradients": 1024, "average": 1}
    grads = gradients(params, None, 1024)
    fisher = js.curvature.diagonal_fisher(grads, rel_damping=1.0)
    about["rel_damping"] = 1.0
    add(rows, "diagonal, global", SPARSITIES, obs(fisher), **about)
    blocks = functools.partial(js.curvature.block_fisher, grads)
    fisher = blocks(block_size=50, rel_damping=1.0)
    about["block_size"] = 50
    for update in ("joint", "independent", "none"):
        prune = obs(fisher, update=update)
        add(rows, f"blocks, {update}, global", SPARSITIES, prune, **about)
    add(rows, "blocks, joint, per layer", SPARSITIES, obs(fisher, LAYER), **about)
    add(rows, "blocks, greedy, global", SPARSITIES, obs(fisher, greedy=True), **about)
    for rel_damping in (1e-3, 1e-2, 1e-1, 1e1, 1e2):
        about["rel_damping"] = rel_damping
        fisher = blocks(block_size=50, rel_damping=rel_damping)
        about["damping"] = float(fisher.damping)
        for update in ("joint", "independent"):
            prune = obs(fisher, update=update)
            add(rows, f"blocks, {update}, global", (0.5, 0.7), prune, **about)
    del about["damping"]
    about |= {"rel_damping": 1.0, "block_size": 128}
    fisher = blocks(block_size=128, rel_damping=1.0)
    add(rows, "blocks, joint, global", SPARSITIES, obs(fisher), **about)

    # Four neighbouring inputs together. The first convolution has 27 of them.
    four, where = js.Block((4, 1)), r"^(layer.*conv.|linear)\.weight$"
    magnitude = functools.partial(js.prune, params, pattern=four, where=where)
    add(rows, "4-blocks: magnitude, per layer", SPARSITIES, magnitude)
    some = {k: g for k, g in grads.items() if k != "conv1.weight"}
    fisher = js.curvature.block_fisher(
        some, block_size=48, rel_damping=1.0, pattern=four
    )
    about["block_size"] = 48
    for update in ("joint", "independent"):
        prune = obs(fisher, four, where=where, update=update)
        add(rows, f"4-blocks: blocks, {update}, per layer", SPARSITIES, prune, **about)

    # Fewer gradients.
    about |= {"block_size": 50}
    for count in (64, 256):
        some = jax.tree.map(lambda g, n=count: g[:n], grads)
        fisher = js.curvature.block_fisher(some, block_size=50, rel_damping=1.0)
        about["gradients"] = count
        for update in ("joint", "independent"):
            prune = obs(fisher, update=update)
            add(rows, f"blocks, {update}, global", (0.5, 0.7), prune, **about)

    # The full matrix.
    del about["block_size"]
    grads = jax.tree.map(lambda g: g[:512], grads)
    about["gradients"] = 512
    for rel_damping in (1e0, 1e1, 1e2, 1e3, 1e4):
        about["rel_damping"] = rel_damping
        fisher = js.curvature.mfac(grads, rel_damping=rel_damping)
        for update in ("joint", "independent"):
            name = f"full, {update}, global"
            wanted = SPARSITIES if rel_damping == MFAC else (0.7, 0.8)
            add(rows, name, wanted, obs(fisher, update=update), **about)

    # As the papers: gradients of 16 images.
    grads = gradients(params, None, 256, 16)
    about = {"gradients": 256, "average": 16, "rel_damping": 1.0, "block_size": 50}
    fisher = js.curvature.block_fisher(grads, block_size=50, rel_damping=1.0)
    for update in ("joint", "independent"):
        prune = obs(fisher, update=update)
        add(rows, f"blocks, {update}, global", SPARSITIES, prune, **about)


def run_recomputation() -> None:
    """ResNet-20 in many cuts, with gradients at the weights as they are by then."""
    params, gradients, rows = prepare_resnet()

    def fresh_blocks(params, masks):
        grads = gradients(params, masks, 512)
        return js.curvature.block_fisher(grads, block_size=50, rel_damping=0.1)

    def fresh_full(params, masks):
        return js.curvature.mfac(gradients(params, masks, 256), rel_damping=MFAC)

    kinds = {
        "blocks": (fresh_blocks, {"gradients": 512, "rel_damping": 0.1}),
        "full": (fresh_full, {"gradients": 256, "rel_damping": MFAC}),
    }
    for kind, (fresh, about) in kinds.items():
        cuts = dict(zip(SPARSITIES, (4, 3, 2, 3, 4), strict=True))
        method = f"{kind}, joint, global, gradual"
        along(rows, method, cuts, params, fresh, **about)
        if kind == "blocks":
            name = "blocks, greedy, global, gradual"
            along(rows, name, cuts, params, fresh, greedy=True, **about)
        prune = lambda s, f=fresh: js.solvers.obs(
            params, f(params, None), s, pattern=GLOBAL, steps=4, refresh=f
        )
        name = f"{kind}, joint, global, 4 cuts"
        add(rows, name, (0.5, 0.7, 0.8), prune, cuts=4, **about)


# MiniLM on STS-B and SST-2


def run_minilm() -> None:
    stsb_train, dev, test, sst2_train, sst2_dev, sst2_test = map(
        np.load,
        find(
            *(
                f"text/minilm_ids_{name}.npz"
                for name in (
                    "stsb_train",
                    "stsb_dev",
                    "stsb_test_half",
                    "sst2_train",
                    "sst2_dev_half",
                    "sst2_test_half",
                )
            )
        ),
    )
    params = minilm.load(minilm.find_weights())
    head = minilm.sst2_probe(params, sst2_train, sst2_dev).head
    stsb = rows_of(
        "minilm stsb",
        {
            "spearman": lambda p: minilm.stsb_spearman(p, dev),
            "spearman_test": lambda p: minilm.stsb_spearman(p, test),
        },
    )
    sst2 = rows_of(
        "minilm sst2",
        {
            "accuracy": lambda p: minilm.sst2_accuracy(p, head, sst2_dev),
            "accuracy_test": lambda p: minilm.sst2_accuracy(p, head, sst2_test),
        },
    )
    compare_minilm(stsb, params, minilm.stsb_loss, stsb_train, full=True)
    compare_minilm(sst2, params, minilm.sst2_loss(head), sst2_train, full=False)


def compare_minilm(rows: Rows, params, loss_fn, train, *, full: bool) -> None:
    sparsities = (0.5, 0.6, 0.7, 0.8)
    size = len(train["y" if "y" in train else "score"])
    rng = np.random.default_rng(0)

    def gradients(params, masks, count: int, **options):
        at = rng.permutation(size)[:count]
        batches = minilm.batches(train, size=16, rows=at, multiple=32)
        return js.curvature.stream_grads(
            loss_fn, params, batches, masks=masks, **options
        )

    def summed_up(estimator, params, masks, count: int):
        sums = estimator.init(params)
        update = jax.jit(estimator.update, donate_argnums=0)
        for grads in gradients(params, masks, count):
            sums = update(sums, grads)
        return sums

    def obs(fisher, pattern=GLOBAL, **options) -> Prune:
        return lambda s: js.solvers.obs(params, fisher, s, pattern=pattern, **options)

    add(rows, "dense", (0.0,), lambda s: js.Pruned(params, None))
    for scope, pattern in (("per layer", LAYER), ("global", GLOBAL)):
        magnitude = functools.partial(js.prune, params, pattern=pattern)
        add(rows, f"magnitude, {scope}", sparsities, magnitude)

    about: dict = {"gradients": 1024, "average": 1, "rel_damping": DAMPING}
    estimator = js.curvature.diagonal_estimator()
    sums = summed_up(estimator, params, None, 1024)
    fisher = estimator.finalize(sums, rel_damping=DAMPING)
    add(rows, "diagonal, global", sparsities, obs(fisher), **about)

    about["block_size"] = 48
    estimator = js.curvature.block_estimator(block_size=48)
    sums = summed_up(estimator, params, None, 1024)
    for rel_damping in (1e-3, 1e-2, 1e0, 1e1) if full else ():
        fisher = estimator.finalize(sums, rel_damping=rel_damping)
        about |= {"rel_damping": rel_damping, "damping": float(fisher.damping)}
        for update in ("joint", "independent"):
            prune = obs(fisher, update=update)
            add(rows, f"blocks, {update}, global", (0.5, 0.7), prune, **about)
    fisher = estimator.finalize(sums, rel_damping=DAMPING)
    about |= {"rel_damping": DAMPING, "damping": float(fisher.damping)}
    for update in ("joint", "independent", "none"):
        prune = obs(fisher, update=update)
        add(rows, f"blocks, {update}, global", sparsities, prune, **about)
    if full:
        add(rows, "blocks, joint, per layer", sparsities, obs(fisher, LAYER), **about)
        greedy = obs(fisher, greedy=True)
        add(rows, "blocks, greedy, global", sparsities, greedy, **about)
        four = js.Block((4, 1))
        magnitude = functools.partial(js.prune, params, pattern=four)
        add(rows, "4-blocks: magnitude, per layer", sparsities, magnitude)
        del fisher, sums
        estimator = js.curvature.block_estimator(block_size=48, pattern=four)
        sums = summed_up(estimator, params, None, 1024)
        fisher = estimator.finalize(sums, rel_damping=DAMPING)
        for update in ("joint", "independent"):
            name = f"4-blocks: blocks, {update}, per layer"
            add(rows, name, sparsities, obs(fisher, four, update=update), **about)
    del fisher, sums

    # A change of the weights between cuts changes the curvature.
    def fresh(params, masks):
        estimator = js.curvature.block_estimator(block_size=48)
        sums = summed_up(estimator, params, masks, 512)
        return estimator.finalize(sums, rel_damping=DAMPING)

    about = {"gradients": 512, "average": 1, "rel_damping": DAMPING, "block_size": 48}
    cuts = dict(zip(sparsities, (2, 1, 1, 2), strict=True))
    along(rows, "blocks, joint, global, gradual", cuts, params, fresh, **about)

    grads = js.curvature.collect_grads(
        gradients(params, None, 128, dtype=jnp.bfloat16), count=128
    )
    grads = jax.tree.map(jnp.asarray, grads)  # 2.7 GB
    fisher = js.curvature.mfac(grads, rel_damping=MFAC)
    about = {"gradients": 128, "average": 1, "rel_damping": MFAC}
    for update in ("joint", "independent") if full else ("joint",):
        prune = obs(fisher, update=update)
        add(rows, f"full, {update}, global", sparsities, prune, **about)


RUNS = {
    "resnet": run_resnet,
    "recomputation": run_recomputation,
    "minilm": run_minilm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=tuple(RUNS))
    only = parser.parse_args().only
    for name, run in RUNS.items():
        if only in (None, name):
            run()


if __name__ == "__main__":
    main()
