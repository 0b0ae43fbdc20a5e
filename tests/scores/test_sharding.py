"""Scores of sharded parameters: where they lie, and what is exchanged for them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

SPECS = {"inputs": P("x", None), "outputs": P(None, "x")}
GATHERS = r"= (\S+) (?:all-gather|all-to-all|collective-permute)\("
kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def values(seed):
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.normal(size=(32, 64)).astype(np.float32),
        "outputs": rng.normal(size=(64, 16)).astype(np.float32),
    }


def sharded(kind, *trees):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    lie = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return lie, *(jax.device_put(tree, lie) for tree in trees)


def loss_fn(params, x):
    return jnp.sum(jnp.tanh(x @ params["inputs"]) @ params["outputs"]) ** 2


def gathered(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    return re.findall(GATHERS, text)


@kinds
def test_scores_lie_where_the_parameters_do_and_are_those_of_one_device(kind):
    key = jax.random.key(0)

    def all_three(params, grads):
        return (
            js.scores.random(params, key=key),
            js.scores.taylor(params, grads),
            js.scores.snip(params, grads),
        )

    params, grads = values(0), values(1)
    lie, *args = sharded(kind, params, grads)
    compiled = jax.jit(all_three).lower(*args).compile()
    assert not re.findall(GATHERS, compiled.as_text())
    expected = jax.jit(all_three)(params, grads)
    for got, want in zip(compiled(*args), expected, strict=True):
        for name, x in got.items():
            assert x.sharding.is_equivalent_to(lie[name], 2)
            np.testing.assert_array_equal(x, want[name])
    with jax.set_mesh(lie["inputs"].mesh):
        eager = js.scores.random(args[0], key=key)
    for name, x in eager.items():
        assert x.sharding.is_equivalent_to(lie[name], 2)
        assert jax.typeof(x).sharding.spec == jax.typeof(args[0][name]).sharding.spec


def test_a_score_of_gradients_gathers_no_more_parameters_than_they_do():
    params, x = values(0), np.random.default_rng(2).normal(size=(16, 32))
    _, params = sharded(AxisType.Auto, params)
    mesh = params["inputs"].sharding.mesh
    x = jax.device_put(x.astype(np.float32), NamedSharding(mesh, P("x")))
    slope = jax.grad(loss_fn)
    each = lambda p, x: jax.vmap(lambda row: slope(p, row[None]))(x)
    twice = lambda p, x: jax.jvp(lambda p: slope(p, x), (p,), (slope(p, x),))[1]
    apply_fn = lambda p, x: (x @ p["inputs"]) @ p["outputs"]
    flow = lambda p, x: jax.grad(lambda p: jnp.sum(apply_fn(p, x)))(p)
    own = {
        "taylor": (lambda p, x: js.scores.taylor(p, slope(p, x)), slope),
        "snip": (lambda p, x: js.scores.snip(p, slope(p, x)), slope),
        "grasp": (functools.partial(js.scores.grasp, loss_fn), twice),
        "synflow": (functools.partial(js.scores.synflow, apply_fn), flow),
        "each": (functools.partial(js.curvature.per_example_grads, loss_fn), each),
    }
    shapes = {f"f32[{','.join(map(str, w.shape))}]" for w in params.values()}
    whole = lambda f: {g.split("{")[0] for g in gathered(f, params, x)}
    for name, (score, gradient) in own.items():
        assert whole(score) & shapes <= whole(gradient) & shapes, name
