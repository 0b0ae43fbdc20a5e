"""Which axes of which parameters must lose the same indices together.

Each leaf of the parameters' axes is such a group. On four families of networks the
groups are those of Torch-Pruning 1.6.1: as many of them, and what is left when each
loses half of its indices is the same to the weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo.networks import DenseNet, MobileNet, ResNet, ViT

import jaxsparse as js
from jaxsparse.primitives import axes as algebra

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
STAYS = {"input", "output", "gathered", "sorted", "iota", "layer"}


def groups_of(model):
    """Leaves that may lose indices, with their members, and the parameters' shapes."""
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    rest = {k: v for k, v in variables.items() if k != "params"}
    rest = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), rest)
    apply_fn = lambda params, x: model.apply({"params": params, **rest}, x)
    params = variables["params"]
    trace = js.trace(apply_fn, params, IMAGE)
    found: dict = {}
    for path, dims in trace.dims.items():
        for axis, expression in enumerate(dims):
            for leaf, index in algebra.coordinates(expression):
                members = found.setdefault(id(leaf), (leaf, []))[1]
                members.append((path, axis, index))
    stays = lambda x: x.flags & STAYS or any(f.startswith("frozen") for f in x.flags)
    free = [(x, m) for x, m in found.values() if x.size > 1 and not stays(x)]
    return free, {p: w.shape for p, w in js.tree.leaves_with_paths(params)}


def left(groups, shapes) -> int:
    """How many weights are left when each group loses half of its indices."""
    kept = {path: [np.ones(n, bool) for n in shape] for path, shape in shapes.items()}
    for leaf, members in groups:
        for path, axis, index in members:
            kept[path][axis] &= (index < 0) | (index >= leaf.size // 2)
    return sum(int(np.prod([k.sum() for k in axes])) for axes in kept.values())


CASES = {
    "resnet18": (ResNet(), 12, 11_689_512, 3_055_880),
    "resnet50": (ResNet((3, 4, 6, 3), True), 37, 25_557_032, 6_917_640),
    "mobilenet": (MobileNet(), 25, 3_504_872, 1_221_768),
    "densenet": (DenseNet(), 120, 7_978_856, 2_274_728),
}


# By default these are looked at by way of `js.structured`, in test_groups.py.
LARGE = ("resnet50", "mobilenet", "densenet")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] * (name in LARGE))
        for name in CASES
    ],
)
def test_the_groups_are_those_of_torch_pruning(name):
    model, count, whole, half = CASES[name]
    groups, shapes = groups_of(model)
    assert sum(int(np.prod(s)) for s in shapes.values()) == whole
    assert len(groups) == count
    assert left(groups, shapes) == half


def test_of_attention_heads_and_their_dimensions_are_found_apart():
    groups, shapes = groups_of(ViT())
    assert sum(int(np.prod(s)) for s in shapes.values()) == 86_567_656
    # In each layer hidden units, heads, and what queries and keys, and values, have.
    sizes = sorted(leaf.size for leaf, _ in groups)
    assert sizes == [12] * 12 + [64] * 24 + [768] + [3072] * 12
    heads_and_widths = [(x, m) for x, m in groups if x.size != 64]
    assert left(heads_and_widths, shapes) == 22_050_664
