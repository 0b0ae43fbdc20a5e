"""Against Torch-Pruning 1.6.1: the same weights, the same choice, the same network.

The choice is recorded from its `BasePruner` with `GroupMagnitudeImportance(p=2,
group_reduction="mean", normalizer="mean")`, each group on its own, in float64;
`torch_pruning.json` holds what its importances say of two groups (in float32, to which
it casts).
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

# By share removed: the channels that go of each group, parameters left, five logits.
RECORDED = {
    0.5: (
        {
            "c": "0 1 2 3 4 7 10 12",
            "l.0.c1": "0 1 4 6 9 10 13 15",
            "l.1.c1": "0 2 3 4 5 7 8 9 11 12 14 16 22 23 25 26",
            "l.1.c2": "1 6 7 9 12 14 15 19 21 22 24 26 27 28 29 31",
            "l.2.c1": "1 3 4 5 9 11 13 14 15 16 17 18 24 26 27 30",
        },
        9938,
        [-264828.351077, -6176.234204, -135317.762934, -71077.64467, 253634.375609],
    ),
    0.25: (
        {
            "c": "0 1 7 10",
            "l.0.c1": "6 9 10 15",
            "l.1.c1": "0 2 7 8 11 12 23 26",
            "l.1.c2": "1 9 14 15 19 22 27 29",
            "l.2.c1": "1 3 4 9 14 18 26 27",
        },
        21910,
        [-1857602.488957, -1189148.631392, 244561.931397, 1778129.467241, 202859.9955],
    ),
}
KERNELS = {"c": (16, 3, 3), "l.0.c1": (16, 16, 3), "l.0.c2": (16, 16, 3)}
KERNELS |= {"l.1.c1": (32, 16, 3), "l.1.c2": (32, 32, 3), "l.1.d.0": (32, 16, 1)}
KERNELS |= {"l.2.c1": (32, 32, 3), "l.2.c2": (32, 32, 3)}
norm_of = lambda name: {"c": "b", "l.1.d.0": "l.1.d.1"}.get(
    name, name.replace("c", "b")
)


def weights():
    """In torch's layout, drawn in the order of the names, then the images."""
    shapes: dict = {"fc.weight": (10, 32), "fc.bias": (10,)}
    for name, (out, into, side) in KERNELS.items():
        shapes[f"{name}.weight"] = (out, into, side, side)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm_of(name)}.{entry}"] = (out,)
    rng = np.random.default_rng(7)
    draw = lambda name: rng.normal(size=shapes[name])
    params = {name: draw(name) for name in sorted(shapes)}
    for name in params:
        if name.endswith("running_var"):
            params[name] = abs(params[name]) + 0.5
    return params, rng.normal(size=(2, 3, 16, 16))


def apply_fn(params, x):
    def conv_norm(x, name, stride=1):
        w, norm = params[f"{name}.weight"], norm_of(name)
        side = w.shape[-1] // 2
        numbers = ("NCHW", "OIHW", "NCHW")
        padding = ((side, side), (side, side))
        x = jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=numbers
        )
        mean, var, scale, bias = (
            params[f"{norm}.{entry}"][None, :, None, None]
            for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(conv_norm(x, "c"))
    for i, stride in enumerate((1, 2, 1)):
        y = jax.nn.relu(conv_norm(x, f"l.{i}.c1", stride))
        y = conv_norm(y, f"l.{i}.c2")
        x = jax.nn.relu((conv_norm(x, f"l.{i}.d.0", 2) if stride > 1 else x) + y)
    return x.mean((2, 3)) @ params["fc.weight"].T + params["fc.bias"][None]


@functools.cache
def found():
    with jax.enable_x64(True):
        trace = js.trace(apply_fn, *weights())
        return trace, js.coupling.groups(trace)


@pytest.mark.parametrize("share", RECORDED)
def test_the_same_channels_go_and_the_same_network_is_left(share):
    expected, count, logits = RECORDED[share]
    with jax.enable_x64(True):
        params, x = weights()
        trace, groups = found()
        scores = scores_of("magnitude 2 mean mean")
        drop = js.channels.drop_lowest(groups, scores, share)
        for name, channels in expected.items():
            (group,) = (
                g
                for g in groups.prunable.values()
                if any(
                    m.path == f"{name}.weight" and m.role == "output" for m in g.members
                )
            )
            gone = drop.indices[group.name].tolist()
            assert gone == [int(i) for i in channels.split()]
        assert len(groups.prunable) == len(expected)
        small = js.narrowing.narrow(trace, params, drop)
        learned = {k: w for k, w in small.params.items() if "running" not in k}
        assert sum(w.size for w in learned.values()) == count
        got = jax.jit(small.apply_fn)(small.params, x)[0, :5]
        np.testing.assert_allclose(got, logits, rtol=1e-9)


IMPORTANCES = json.loads(Path(__file__).with_name("torch_pruning.json").read_text())
NORMALIZERS = {
    "none": dict,
    "mean": js.channels.normalize_mean,
    "max": js.channels.normalize_max,
    "standarization": js.channels.normalize_range,
    "gaussian": js.channels.standardize,
}


def loss_fn(params, x):
    logits = jax.nn.log_softmax(apply_fn(params, x) * 1e-6)
    return -(logits[0, 3] + logits[1, 7]) / 2


def scale(path, leaf):
    return path.endswith("weight") and leaf.ndim == 1


@functools.cache
def group_scores(name, power, reduce):
    """Several normalizers are given the same; one program in place of hundreds."""
    kernel = lambda path, leaf: leaf.ndim > 1
    one = functools.partial(js.channels.channel_scores, found()[1], reduce=reduce)

    @jax.jit
    def run(params, x):
        if name == "taylor":  # without the scales of norms, which it forgets
            scores = js.scores.taylor(params, jax.grad(loss_fn)(params, x))
            return one(scores, where=kernel)
        powers = {path: jnp.abs(w) ** int(power) for path, w in params.items()}
        return one(powers, where=r"weight$")

    with jax.enable_x64(True):
        return run(*weights())


def scores_of(kind):
    name, *options = kind.split()
    if name == "bn_scale":
        return js.channels.bn_scale(found()[1], weights()[0], where=scale)
    power, reduce, normalizer = options
    return jax.jit(NORMALIZERS[normalizer])(group_scores(name, power, reduce))


@pytest.mark.parametrize("kind", IMPORTANCES)
def test_scores_are_its_importances(kind):
    with jax.enable_x64(True):
        groups = found()[1]
        scores = scores_of(kind)
        for kernel, expected in IMPORTANCES[kind].items():
            (name,) = (
                n
                for n, g in groups.prunable.items()
                if any(m.path == f"{kernel}.weight" and m.role == "output"
                       for m in g.members)
            )  # fmt: skip
            np.testing.assert_allclose(
                scores[name], expected, rtol=1e-6, atol=2e-6 * np.max(np.abs(expected))
            )
