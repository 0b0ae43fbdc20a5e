"""Structured pruning: how long the groups take, and whether less is in fact quicker.

The narrowed model is the traced program at other sizes. The reference is the same model
written at the narrow width in Flax: both must be equally fast, and give equal results.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo.networks import DenseNet, Residual, llama, llama_params

import jaxsparse as js
from jaxsparse.tree import leaves_with_paths

MODELS = {"DenseNet-121": DenseNet().apply, "Llama-3-8B, 32 layers": llama}


def example(name: str, batch: int):
    shape = jax.ShapeDtypeStruct
    if name.startswith("Llama"):
        return llama_params(), shape((batch, 512), jnp.int32)
    x = shape((batch, 224, 224, 3), jnp.float32)
    return jax.eval_shape(DenseNet().init, jax.random.key(0), x), x


@pytest.mark.parametrize("name", MODELS)
def test_groups(name, compare):
    apply_fn, sizes = MODELS[name], itertools.count(1)
    params, _ = example(name, 1)
    fresh = lambda: example(name, next(sizes))[1]

    def ours():
        found = js.coupling.groups(js.trace(apply_fn, params, fresh()))
        assert len(found.prunable) > 100

    calls = {
        "the jaxpr alone": lambda: jax.make_jaxpr(apply_fn)(params, fresh()) and None,
        "js.trace and groups": ours,
    }
    compare(f"groups of {name}", calls, rounds=5)


def test_narrowing_a_densenet(compare):
    params, x = example("DenseNet-121", 1)
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), params)
    trace = js.trace(MODELS["DenseNet-121"], params, x)
    found = js.coupling.groups(trace).prunable
    drop = {name: range(g.size // 2) for name, g in found.items()}
    narrow = lambda: js.narrowing.narrow(trace, params, drop).params
    compare("half of every group of DenseNet-121", {"narrow": narrow})


class ResNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage and not block else 1
                x = Residual(self.width << stage, stride)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class Transformer(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(4):
            y = nn.LayerNorm()(x)
            features = {"qkv_features": 64 * self.heads, "out_features": self.width}
            x = x + nn.MultiHeadDotProductAttention(self.heads, **features)(y, y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(10)(nn.LayerNorm()(x))


WIDE = {
    "ResNet-18, 64 x 64": (functools.partial(ResNet, 64), ResNet(32), (8, 64, 64, 3)),
    "transformer, 4 layers": (
        functools.partial(Transformer, 512, 8),
        Transformer(256, 4),
        (8, 128, 64),
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_narrowed_against_built_at_that_width(name, compare):
    make, built, shape = WIDE[name]
    model, x = make(), jax.random.normal(jax.random.key(1), shape)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    trace = js.trace(model.apply, variables, x)
    found = js.coupling.groups(trace).prunable
    # All but the width of heads: that a builder takes from their number.
    drop = {n: range(g.size // 2) for n, g in found.items() if not g.copies}
    small = js.narrowing.narrow(trace, variables, drop, norms="resized")
    masks = js.narrowing.drop_masks(trace, drop)
    zeroed = jax.jit(js.patterns.apply)(variables, masks)
    dense, narrowed, by_hand = map(jax.jit, (model.apply, small.apply_fn, built.apply))
    got, want = narrowed(small.params, x), by_hand(small.params, x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    calls = {
        "built at half the width": lambda: by_hand(small.params, x),
        "narrowed": lambda: narrowed(small.params, x),
        "masked": lambda: dense(zeroed, x),
        "dense": lambda: dense(variables, x),
    }
    compare(f"forward pass of {name}", calls)


def test_scores_without_an_order(compare):
    """Scores that are the same on any number of devices, against ordinary sums."""
    name = "transformer, 4 layers"
    make, _, shape = WIDE[name]
    model, x = make(), jax.random.normal(jax.random.key(1), shape)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    found = js.coupling.groups(js.trace(model.apply, variables, x)).prunable
    leaves = dict(leaves_with_paths(variables))

    @jax.jit
    def plain(leaves):
        total = lambda m: jnp.sum(jnp.abs(leaves[m.path]), axis=others(m))
        others = lambda m: tuple(
            a for a in range(leaves[m.path].ndim) if a not in (m.axis, *at(m))
        )
        at = lambda m: [axis for axis, _ in m.copies]
        return [[total(m) for m in g.members] for g in found.values()]

    ours = jax.jit(lambda v: js.channels.channel_scores(found, js.scores.magnitude(v)))
    calls = {
        "ordinary sums of each member": lambda: plain(leaves),
        "group_scores": lambda: ours(variables),
    }
    compare("scores of a transformer's groups", calls)
