"""Quality of channels, heads and blocks taken out of real networks, nothing trained.

    python benchmarks/structured_quality.py                # 20 minutes on two cores
    python benchmarks/structured_quality.py --only stories
    python benchmarks/structured_quality.py --small        # a smoke run, not written

No pytest file: it measures quality, not speed, and needs weights, images and texts that
are not part of jaxsparse (see `examples/_data.py`). It writes
`benchmarks/results/structured_quality.json`, one row for each setting, method and
sparsity; what did not run anew stays as it was.

What is measured is always the narrowed model. `difference` is how far its outputs are
from those of the masked one, relative to the largest. `seconds` are those of scores,
choice and compensation, compiled before; what all methods share (statistics, gradients)
is in the dense row, as `calibration_seconds`, with compilation.

Calibration data are never those of the figure: TinyStories 0..1715 against 1716..1815,
training against test images.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Before LAPACK is loaded: on few cores its threads wait for those of others, and a
# factorisation of 40 ms takes seconds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import rich
from rich.table import Table

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import _resnet as resnet  # noqa: E402
import _stories as stories  # noqa: E402
import _vit as vit  # noqa: E402
from _data import decode, find  # noqa: E402
from _rows import Rows  # noqa: E402

import jaxsparse as js  # noqa: E402

# Masked models of all methods run the same program: compiled once for all.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# On few cores two factorisations at once can wait for each other.
jax.config.update("jax_cpu_enable_async_dispatch", False)

RESULTS = HERE / "results" / "structured_quality.json"
KEY = ("model", "setting", "method", "sparsity")
LARGEST = 1e-4  # difference between a narrowed and a masked model; it is 1e-6 or so

Scores = Mapping[str, Any]
Measure = Callable[[Any, Any], float]
"""`metric(apply_fn, params)` on the images or stories of the figure."""
# The two ways in which indices compete; scores of several groups need one scale.
LOCAL = {"": {"scope": "group"}}
BOTH = {**LOCAL, ", global": {"scope": "global"}}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with what all methods ask of it.

    Attributes:
      name: what rows call it.
      apply_fn: the whole model.
      params: its parameters.
      trace: of both.
      stats: of the calibration data, with grams.
      grads: the loss's gradients, on the same data.
      metric: what is measured: its name and a function of `apply_fn` and parameters.
      inputs: calibration inputs, in batches.
      batches: the same with targets, as the loss takes them.
      calibration_seconds: what statistics and gradients took.
    """

    name: str
    apply_fn: Callable[..., Any]
    params: Any
    trace: Any
    stats: Any
    grads: Any
    metric: tuple[str, Measure]
    inputs: list[Any]
    batches: list[Any]
    calibration_seconds: float

    def rows(self, target: pathlib.Path) -> Rows:
        name, measure = self.metric
        # A narrowed model runs by a function of its own.
        return Rows(target, self.name, {name: lambda found: measure(*found)}, KEY)

    def groups(self, expression: str) -> dict[str, Any]:
        """Those prunable groups whose names it matches."""
        found = js.coupling.groups(self.trace).prunable
        return {n: g for n, g in found.items() if re.search(expression, n)}


def calibrated(
    name: str,
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: list[Any],
    losses: tuple[Callable[..., Any], list[Any]],
    metric: tuple[str, Measure],
    where: str | None = None,
) -> Model:
    """A `Model`, from calibration inputs and from the batches of its loss."""
    begin = time.perf_counter()
    trace = js.trace(apply_fn, params, inputs[0])
    stats = js.calibration.run(trace, params, inputs, where=where)
    loss_fn, batches = losses
    grad = jax.jit(jax.grad(loss_fn))
    total = functools.reduce(
        lambda a, b: jax.tree.map(jnp.add, a, b), (grad(params, b) for b in batches)
    )
    grads = jax.tree.map(lambda g: g / len(batches), total)
    jax.block_until_ready(grads)
    seconds = round(time.perf_counter() - begin, 1)
    return Model(
        name, apply_fn, params, trace, stats, grads, metric, inputs, batches, seconds
    )


# Scores, choices and what makes up for them


def magnitude(model: Model, groups: Mapping[str, Any]) -> Scores:
    """Squares of all kernels, summed, in each group relative to their mean."""
    return js.channels.normalize_mean(_squares(model, groups))


def lamp(model: Model, groups: Mapping[str, Any]) -> Scores:
    return js.channels.lamp(_squares(model, groups))


def _squares(model: Model, groups: Mapping[str, Any]) -> Scores:
    return js.channels.channel_scores(groups, jax.tree.map(jnp.square, model.params))


def taylor(model: Model, groups: Mapping[str, Any]) -> Scores:
    saliency = js.scores.taylor(model.params, model.grads)
    return js.channels.normalize_mean(js.channels.channel_scores(groups, saliency))


def flap(model: Model, groups: Mapping[str, Any]) -> Scores:
    return js.channels.standardize(
        js.channels.flap_scores(groups, model.params, model.stats)
    )


def fpgm(model: Model, groups: Mapping[str, Any]) -> Scores:
    return js.channels.normalize_mean(js.channels.fpgm(groups, model.params))


def bn_scale(model: Model, groups: Mapping[str, Any]) -> Scores:
    """Raw in a global scope too: that is network slimming."""
    return js.channels.bn_scale(groups, model.params, where=r"bn\d\.weight$")


def errors(model: Model, groups: Mapping[str, Any]) -> Scores:
    found = js.channels.obs_errors(groups, model.params, model.stats)
    return js.channels.normalize_mean(found)


def random(model: Model, groups: Mapping[str, Any]) -> Scores:
    rng = np.random.default_rng(0)
    return {n: rng.random((*g.copies, g.size)) for n, g in groups.items()}


def refit(model: Model, groups: Mapping[str, Any], drop: js.coupling.Drop) -> Any:
    return js.channels.obs_refit(groups, model.params, model.stats, drop)


def flap_bias(model: Model, groups: Mapping[str, Any], drop: js.coupling.Drop) -> Any:
    bias = lambda path: path.removesuffix("weight") + "bias"
    return js.channels.flap_compensation(
        groups, model.params, model.stats, drop, bias=bias
    )


Choose = Callable[[Model, Mapping[str, Any], float], js.coupling.Drop]


def by(score: Callable[..., Scores], **options: Any) -> Choose:
    """The lowest scores go."""
    return lambda model, groups, sparsity: js.channels.drop_lowest(
        groups, score(model, groups), sparsity, **options
    )


def greedy(
    model: Model, groups: Mapping[str, Any], sparsity: float
) -> js.coupling.Drop:
    return js.channels.obs_greedy(
        groups, model.params, model.stats, sparsity, at_once=1
    )


Method = tuple[Choose, Callable[..., Any] | None]


def scored(
    name: str, score: Callable[..., Scores], scopes: Mapping[str, Any] = LOCAL
) -> dict[str, Method]:
    return {name + more: (by(score, **o), None) for more, o in scopes.items()}


# Measuring


def narrowed(
    model: Model, params: Any, drop: js.coupling.Drop
) -> tuple[Any, dict[str, Any]]:
    """The narrowed model, and how far it is from the masked one."""
    small = js.narrowing.narrow(model.trace, params, drop)
    masked = js.patterns.apply(params, js.narrowing.drop_masks(model.trace, drop))
    probe = model.inputs[0][:4]
    expected = jax.jit(model.apply_fn)(masked, probe)
    found = jax.jit(small.apply_fn)(small.params, probe)
    difference = float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))
    if not difference <= LARGEST:
        print(f"!! narrowed and masked differ by {difference}", flush=True)
    weights = sum(x.size for x in jax.tree.leaves(small.params))
    about = {"parameters": weights, "difference": float(f"{difference:.1e}")}
    return (small.apply_fn, small.params), about


def dense(rows: Rows, model: Model) -> None:
    weights = sum(x.size for x in jax.tree.leaves(model.params))
    rows.measure(
        (model.apply_fn, model.params),
        {"setting": "", "method": "dense", "sparsity": 0.0},
        parameters=weights,
        calibration_seconds=model.calibration_seconds,
    )


def pruned(
    model: Model,
    groups: Mapping[str, Any],
    sparsity: float,
    choose: Choose,
    compensate: Callable[..., Any] | None,
) -> tuple[js.coupling.Drop, Any]:
    """What goes, and the parameters that make up for it."""
    drop = choose(model, groups, sparsity)
    if compensate is None:
        return drop, model.params
    return drop, compensate(model, groups, drop)


def timed(f: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """A result, and the seconds of the second call."""
    jax.block_until_ready(f(*args))
    begin = time.perf_counter()
    found = jax.block_until_ready(f(*args))
    return found, round(time.perf_counter() - begin, 3)


def compare(
    rows: Rows,
    model: Model,
    setting: str,
    groups: Mapping[str, Any],
    methods: Mapping[str, Method],
    sparsities: Iterable[float],
) -> None:
    """Rows of some methods, that choose among the indices of some groups."""
    for sparsity in sparsities:
        for name, (choose, compensate) in methods.items():
            (drop, params), seconds = timed(
                pruned, model, groups, sparsity, choose, compensate
            )
            found, about = narrowed(model, params, drop)
            what = {"setting": setting, "method": name, "sparsity": sparsity}
            fraction = round(js.channels.dropped_fraction(drop), 4)
            rows.measure(found, what, removed=fraction, **about, seconds=seconds)


# The models


def stories_model(small: bool) -> Model:
    file, data = map(
        np.load, find("weights/stories260K.npz", "text/tinystories_dev_tok512.npz")
    )
    dev = stories.windows(data, 1716, 1815)[: 8 if small else None]
    calibration = stories.windows(data, 0, 1715)[: 8 if small else 64]
    batches = [jnp.asarray(x) for x in np.split(calibration, len(calibration) // 8)]
    return calibrated(
        "stories260K",
        stories.logits,
        stories.load(file),
        [x[:, :-1] for x in batches],
        (stories.cross_entropy, batches),
        ("perplexity", lambda f, p: stories.perplexity(p, dev, apply=f)),
        where=r"/w[o2]/weight$",
    )


def images(weights: str, small: bool) -> tuple[Any, Any, tuple[Any, Any]]:
    """Weights, calibration batches, and the test images with their labels."""
    file, test, train = map(
        np.load,
        find(
            f"weights/{weights}.npz",
            "images/cifar10_jpeg_test8k.npz",
            "images/cifar10_jpeg_train.npz",
        ),
    )
    x, y = decode(train, 256 if small else 1024)
    batches = [
        {"x": jnp.asarray(x[i : i + 256]), "y": y[i : i + 256]}
        for i in range(0, len(x), 256)
    ]
    count = 200 if small else 2000
    return file, batches, (test["x"][:count], test["y"][:count])


def accuracy_on(x: np.ndarray, y: np.ndarray) -> tuple[str, Measure]:
    def accuracy(apply_fn: Any, params: Any) -> float:
        predict = jax.jit(lambda p, x: jnp.argmax(apply_fn(p, x), axis=-1))
        parts = [predict(params, x[i : i + 200]) for i in range(0, len(x), 200)]
        return float(np.mean(np.concatenate(parts) == y))

    return "accuracy", accuracy


def vit_model(small: bool) -> Model:
    file, batches, test = images("vit_cifar10", small)
    inputs, losses = [b["x"] for b in batches], (vit.cross_entropy, batches)
    metric = accuracy_on(*test)
    params = vit.load(file)
    where = r"(out_proj|linear2)\.weight$"
    return calibrated("vit_cifar10", vit.apply, params, inputs, losses, metric, where)


def resnet_model(small: bool) -> Model:
    name = "resnet20_cifar10_jpeg_adapted"
    file, batches, test = images(name, small)
    params, running = resnet.load(file)
    apply_fn = lambda p, x: resnet.forward(p, running, x)[0]
    inputs = [b["x"] for b in batches]
    losses = resnet.cross_entropy(running), batches
    return calibrated(name, apply_fn, params, inputs, losses, accuracy_on(*test))


# What runs


def some(values: tuple[float, ...], small: bool) -> tuple[float, ...]:
    return values[-1:] if small else values


def run_stories(rows_for: Callable[[Model], Rows], small: bool) -> None:
    """The model has no biases, so there is nothing to hold FLAP's means."""
    model = stories_model(small)
    rows = rows_for(model)
    dense(rows, model)
    methods = {
        **scored("random", random),
        **scored("magnitude", magnitude, BOTH),
        "magnitude + refit": (by(magnitude), refit),
        **scored("taylor", taylor, BOTH),
        "taylor + refit": (by(taylor), refit),
        **scored("flap", flap, BOTH),
        "flap + refit": (by(flap), refit),
        **scored("obs", errors),
        "obs + refit": (by(errors), refit),
        "obs greedy": (greedy, None),
        "obs greedy + refit": (greedy, refit),
    }
    hidden = model.groups(r"/w1/weight\[0\]$")
    sparsities = some((0.1, 0.2, 0.3, 0.5), small)
    compare(rows, model, "mlp hidden", hidden, methods, sparsities)

    windows = jnp.concatenate(model.batches)
    gates = lambda model, groups: js.channels.normalize_norm(
        js.channels.gate_scores(groups, _each_window, model.params, windows, chunk=8)
    )
    methods = {
        **scored("random", random),
        **scored("magnitude", magnitude),
        **scored("taylor", taylor),
        **scored("flap", flap),
        **scored("gates", gates, BOTH),
        "gates + refit": (by(gates), refit),
        **scored("obs", errors),
        "obs + refit": (by(errors), refit),
        "magnitude + refit": (by(magnitude), refit),
    }
    heads = model.groups(r"/wk/weight\[0\.0\]$")
    compare(rows, model, "kv heads", heads, methods, (0.25,))


def _each_window(params: Any, windows: Any) -> Any:
    return stories.cross_entropy(params, windows)


def run_vit(rows_for: Callable[[Model], Rows], small: bool) -> None:
    model = vit_model(small)
    rows = rows_for(model)
    dense(rows, model)
    methods = {
        **scored("random", random),
        **scored("magnitude", magnitude),
        "magnitude + refit": (by(magnitude), refit),
        **scored("taylor", taylor),
        "taylor + refit": (by(taylor), refit),
        **scored("flap", flap, BOTH),
        "flap + bias": (by(flap), flap_bias),
        "flap + bias, global": (by(flap, scope="global"), flap_bias),
        "flap + refit": (by(flap), refit),
        "obs greedy": (greedy, None),
        "obs greedy + refit": (greedy, refit),
    }
    hidden = model.groups(r"linear1\.weight\[1\]$")
    sparsities = some((0.2, 0.4, 0.6), small)
    compare(rows, model, "mlp hidden", hidden, methods, sparsities)
    heads = model.groups(r"in_proj_weight\[1\.3\]$")
    compare(rows, model, "heads", heads, methods, some((0.25, 0.5), small))


def run_resnet(rows_for: Callable[[Model], Rows], small: bool) -> None:
    model = resnet_model(small)
    rows = rows_for(model)
    dense(rows, model)
    methods = {
        **scored("random", random),
        **scored("magnitude", magnitude, BOTH),
        "magnitude + refit": (by(magnitude), refit),
        # In a group of its own lamp has the order of magnitude.
        "lamp, global": (by(lamp, scope="global"), None),
        **scored("fpgm", fpgm),
        **scored("bn_scale", bn_scale, BOTH),
        **scored("taylor", taylor, BOTH),
        "taylor + refit": (by(taylor), refit),
        "taylor + refit, global": (by(taylor, scope="global"), refit),
        **scored("obs", errors),
        "obs + refit": (by(errors), refit),
    }
    sparsities = some((0.1, 0.2, 0.3), small)
    compare(rows, model, "all groups", model.groups(""), methods, sparsities)
    # Without the residual streams, of which each index is one of many layers.
    inner = model.groups(r"^layer.*conv1\.weight\[3\]$")
    names = ("magnitude", "taylor", "obs", "obs + refit", "taylor + refit")
    methods = {name: methods[name] for name in names}
    compare(rows, model, "within blocks", inner, methods, sparsities)


def run_blocks(rows_for: Callable[[Model], Rows], small: bool) -> None:
    """Which of ten branches go: by similarity, by output loss, by knapsack."""
    model = stories_model(small)
    rows = rows_for(model)
    known = js.depth.residual_blocks(model.trace)
    sizes = {name: block.parameters for name, block in known.items()}
    scores, orders, took = {}, {}, {}
    for name, of, sign in (
        ("block_similarity", js.depth.block_similarity, -1),  # the most similar first
        ("output_losses", js.depth.output_losses, 1),
    ):
        args = model.trace, model.params, model.inputs
        values, took[name] = timed(of, *args)
        scores[name] = values
        ranks = {block: sign * value for block, value in values.items()}
        orders[name] = sorted(ranks, key=ranks.__getitem__)

    def add(
        setting: str, method: str, count: float, names: Iterable[str], **about: Any
    ) -> None:
        found = js.depth.remove_blocks(model.trace, model.params, tuple(names))
        about["parameters"] = sum(x.size for x in jax.tree.leaves(found.params))
        what = {"setting": setting, "method": method, "sparsity": count}
        about["blocks"] = sorted(name.removeprefix("layers/") for name in names)
        rows.measure((found.apply_fn, found.params), what, **about)

    for name, order in orders.items():
        for count in (3,) if small else (1, 2, 3):
            add("number of blocks", name, count, order[:count], seconds=took[name])
    total, target = sum(sizes.values()), "share of the blocks' parameters"
    for share in some((0.1, 0.2, 0.3), small):
        least = round(share * total)
        chosen = js.depth.knapsack(scores["output_losses"], sizes, at_least=least)
        add(target, "knapsack", share, chosen, seconds=took["output_losses"])
        for name, order in orders.items():
            removed = np.cumsum([sizes[n] for n in order])
            count = int(np.searchsorted(removed, least)) + 1
            add(target, name, share, order[:count], seconds=took[name])
    for name in known if not small else ():
        both = {key: round(values[name], 4) for key, values in scores.items()}
        add("one block", name, 1, (name,), **both)


RUNS = {
    "stories": run_stories,
    "vit": run_vit,
    "resnet": run_resnet,
    "blocks": run_blocks,
}


def show(rows: list[dict]) -> None:
    """A table for each setting: methods by sparsities."""
    settings: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        settings.setdefault((row["model"], row["setting"]), []).append(row)
    for (model, setting), own in settings.items():
        columns = sorted({row["sparsity"] for row in own})
        table = Table(title=f"{model} {setting}")
        for name in ("", *map(str, columns)):
            table.add_column(name, justify="right")
        lines: dict[str, dict[float, str]] = {}
        for row in own:
            value = row.get("perplexity", row.get("accuracy"))
            lines.setdefault(row["method"], {})[row["sparsity"]] = f"{value:.4f}"
        for method, cells in lines.items():
            table.add_row(method, *(cells.get(c, "") for c in columns))
        rich.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=tuple(RUNS))
    parser.add_argument("--small", action="store_true", help="few data, not written")
    args = parser.parse_args()
    target = pathlib.Path(tempfile.mkdtemp()) / "small.json" if args.small else RESULTS
    made: list[Rows] = []

    def rows_for(model: Model) -> Rows:
        made.append(model.rows(target))
        return made[-1]

    for name, run in RUNS.items():
        if args.only in (None, name):
            run(rows_for, args.small)
    show([row for rows in made for row in rows.rows])


if __name__ == "__main__":
    main()
