"""Quality of layer-wise pruning on real pretrained networks, nothing trained after it.

    python benchmarks/layerwise_quality.py                 # an hour on two cores
    python benchmarks/layerwise_quality.py --only stories

No pytest file: it measures quality, not speed, and needs weights, images and texts that
are not part of jaxsparse (see `examples/_data.py`). It writes
`benchmarks/results/layerwise_quality.json`, one row for each method and pattern; what
did not run anew stays as it was.

Calibration data are never those of the figure: TinyStories 0..1715 against 1716..2015,
training against test images, training against dev pairs.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import _minilm as minilm  # noqa: E402
import _resnet as resnet  # noqa: E402
import _stories as stories  # noqa: E402
import _vit as vit  # noqa: E402
from _data import decode, find  # noqa: E402
from _rows import Rows  # noqa: E402

import jaxsparse as js  # noqa: E402

# Each method runs the same pieces of the same models: compiled once for all.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

TARGET = HERE / "results" / "layerwise_quality.json"
PATTERNS = {
    "20 %": (js.Unstructured(), 0.2),
    "30 %": (js.Unstructured(), 0.3),
    "50 %": (js.Unstructured(), 0.5),
    "60 %": (js.Unstructured(), 0.6),
    "70 %": (js.Unstructured(), 0.7),
    "2:4": (js.NM(2, 4), None),
    "4:8": (js.NM(4, 8), None),
}


def refitted(w, gram, sparsity, *, pattern):
    """SparseGPT's mask, and the best weights for it."""
    mask = js.solvers.sparsegpt(w, gram, sparsity, pattern=pattern).mask
    return js.solvers.refit(w, mask, gram, iterations=50, rel_damping=0.01)


ONLY: list[str] = []  # patterns that were asked for; all if empty
METHODS: list[str] = []  # methods likewise
OWL = "sparsegpt, owl"
SOLVERS = {
    "magnitude": js.solvers.magnitude,
    "wanda": js.solvers.wanda,
    "sparsegpt": js.solvers.sparsegpt,
    "sparsegpt + refit": refitted,
    "admm": js.solvers.admm,
    "alps": js.solvers.alps,
}


def rows_of(model: str, metrics: dict[str, Callable[[Any], float]]) -> Rows:
    return Rows(TARGET, model, metrics, key=("model", "method", "pattern"))


def compare(rows: Rows, apply_fn, params, batches, where, patterns) -> None:
    """All methods on one model."""
    if not rows.rows and not METHODS:
        rows.measure(params, {"method": "dense", "pattern": ""})
    for name in (n for n in patterns if n in (ONLY or patterns)):
        pattern, sparsity = PATTERNS[name]
        for method in (m for m in SOLVERS if m in (METHODS or SOLVERS)):
            if method == "wanda" and isinstance(pattern, js.Unstructured):
                own: Any = js.Unstructured("output")
            else:
                own = pattern
            options = {"sparsity": sparsity, "pattern": own, "where": where}
            options["solver"] = SOLVERS[method]
            prune(rows, (method, name), apply_fn, params, batches, **options)


def prune(rows: Rows, name, apply_fn, params, batches, **options) -> None:
    """One row, of the method and pattern in its name."""
    begin = time.perf_counter()
    found = js.oneshot.layerwise(apply_fn, params, batches, show=False, **options)
    seconds = round(time.perf_counter() - begin, 1)
    errors = [np.mean(info.relative_error) for info in found.info.values()]
    about = {"mean_error": round(float(np.mean(errors)), 5), "seconds": seconds}
    what = {"method": name[0], "pattern": name[1]}
    rows.measure(found.params, what, **about)


def compare_owl(rows: Rows, apply_fn, params, batches, where, groups) -> None:
    """SparseGPT at 50 % of all, where blocks with more outliers stay denser."""
    if "50 %" not in (ONLY or PATTERNS) or OWL not in (METHODS or [OWL]):
        return
    trace = js.trace(apply_fn, params, batches[0])
    stats = js.calibration.run(trace, params, batches, gram=False, where=where)
    scores = js.scores.wanda(params, stats, where=where)
    sparsity = js.allocations.owl(scores, 0.5, groups=groups, where=where)
    options = {"sparsity": sparsity, "pattern": js.Unstructured(), "where": where}
    options["solver"] = js.solvers.sparsegpt
    prune(rows, (OWL, "50 %"), apply_fn, params, batches, **options)


def run_stories() -> None:
    file, data = map(
        np.load, find("weights/stories260K.npz", "text/tinystories_dev_tok512.npz")
    )
    params = stories.load(file)
    dev = stories.windows(data, 1716, 2015)
    calibration = stories.windows(data, 0, 1715)[:128, :-1]
    batches = [jnp.asarray(calibration[i : i + 16]) for i in range(0, 128, 16)]
    rows = rows_of("stories260K", {"perplexity": lambda p: stories.perplexity(p, dev)})
    names = [name for name in PATTERNS if name != "4:8"]
    compare(rows, stories.logits, params, batches, stories.MATRICES, names)
    layer = lambda path: "/".join(path.split("/")[:2])
    compare_owl(rows, stories.logits, params, batches, stories.MATRICES, layer)
    # The 172 inputs of `w2` cannot be divided by 8.
    where = r"^layers/.*/w[13qkvo]/weight$"
    compare(rows, stories.logits, params, batches, where, ("4:8",))


def run_resnet() -> None:
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
    x, _ = decode(train, 1024)
    metric = lambda p: resnet.accuracy(p, stats, test["x"], test["y"])
    rows = rows_of(name, {"accuracy": metric})
    apply_fn = lambda p, x: resnet.forward(p, stats, x)[0]
    batches = [jnp.asarray(x[i : i + 256]) for i in range(0, 1024, 256)]
    names = ("50 %", "60 %", "70 %")
    compare(rows, apply_fn, params, batches, None, names)
    # 2:4 runs along the inputs of each tap, of which the first convolution has three.
    where = r"^(layer.*conv.|linear)\.weight$"
    for name in ("2:4", "4:8"):
        compare(rows, apply_fn, params, batches, where, (name,))


def run_vit() -> None:
    weights, test, train = map(
        np.load,
        find(
            "weights/vit_cifar10.npz",
            "images/cifar10_jpeg_test8k.npz",
            "images/cifar10_jpeg_train.npz",
        ),
    )
    params = vit.load(weights)
    x, _ = decode(train, 1024)
    metric = lambda p: vit.accuracy(p, test["x"], test["y"])
    rows = rows_of("vit_cifar10", {"accuracy": metric})
    batches = [jnp.asarray(x[i : i + 256]) for i in range(0, 1024, 256)]
    names = ("50 %", "60 %", "70 %", "2:4", "4:8")
    compare(rows, vit.apply, params, batches, vit.MATRICES, names)


def run_minilm() -> None:
    train, dev = map(
        np.load,
        find("text/minilm_ids_stsb_train.npz", "text/minilm_ids_stsb_dev.npz"),
    )
    params = minilm.load(minilm.find_weights())
    rows = rows_of("minilm stsb", {"spearman": lambda p: minilm.stsb_spearman(p, dev)})
    # Of equal lengths, so that no padding is among the rows that kernels see.
    texts = minilm.sentences(train, "_a") + minilm.sentences(train, "_b")
    batches = []
    for length in (12, 16, 24):
        ids = [t for t in texts if len(t) == length][:256]
        ids = np.stack(ids).astype(np.int32)
        batches.append((jnp.asarray(ids), jnp.ones(ids.shape, bool)))
    names = ("50 %", "60 %", "70 %", "2:4", "4:8")
    compare(rows, minilm.encode, params, batches, None, names)


RUNS = {
    "stories": run_stories,
    "vit": run_vit,
    "resnet": run_resnet,
    "minilm": run_minilm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=tuple(RUNS))
    parser.add_argument("--pattern", action="append", choices=tuple(PATTERNS))
    parser.add_argument("--method", action="append", choices=(*SOLVERS, OWL))
    args = parser.parse_args()
    ONLY.extend(args.pattern or ())
    METHODS.extend(args.method or ())
    for name, run in RUNS.items():
        if args.only in (None, name):
            run()


if __name__ == "__main__":
    main()
