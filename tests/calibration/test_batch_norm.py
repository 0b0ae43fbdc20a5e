"""BatchNorm's statistics against NumPy, with flax's two libraries."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxsparse as js

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

BATCHES = [
    np.random.default_rng(i).standard_normal((32, 5)).astype(np.float32) * (i + 1) + i
    for i in range(3)
]


def expected(weights):
    """The means over batches of what each batch has."""
    h = [x.astype(np.float64) @ np.asarray(weights, np.float64) for x in BATCHES]
    return np.mean([a.mean(0) for a in h], 0), np.mean([a.var(0) for a in h], 0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.Dense(4, use_bias=False, name="up")(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.93, name="norm")
        return norm(h)


def test_linen():
    net = Net()
    variables = net.init(jax.random.key(0), BATCHES[0], train=True)
    params = js.prune(variables["params"], 0.5, where=r"up/kernel").params

    @jax.jit
    def update(stats, x):
        variables = {"params": params, "batch_stats": stats}
        apply = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return apply[1]["batch_stats"]

    stats = js.calibration.batch_statistics(update, variables["batch_stats"], BATCHES)
    mean, variance = expected(params["up"]["kernel"])
    np.testing.assert_allclose(stats["norm"]["mean"], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["norm"]["var"], variance, rtol=1e-4)
    asleep = lambda stats, x: stats  # as in inference mode
    with pytest.raises(ValueError, match="norm/mean: it does not follow"):
        js.calibration.batch_statistics(asleep, stats, BATCHES)


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(5, 4, use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.up(x))

    graph, params, stats, rest = nnx.split(
        Model(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...
    )

    def update(stats, x):
        model = nnx.merge(graph, params, stats, rest)
        model.train()
        model(x)
        return nnx.state(model, nnx.BatchStat)

    found = js.calibration.batch_statistics(update, stats, BATCHES)
    mean, variance = expected(nnx.as_pure(params)["up"]["kernel"])
    pure = nnx.as_pure(found)["norm"]
    np.testing.assert_allclose(pure["mean"], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pure["var"], variance, rtol=1e-4)


def test_counters_stay_and_rules_of_another_form_are_named():
    def update(stats, x):
        return {
            "mean": 0.99 * stats["mean"] + 0.01 * jnp.asarray(x).mean(0),
            "steps": stats["steps"] + 1,
        }

    start = {"mean": jnp.zeros(5), "steps": jnp.int32(7)}
    found = js.calibration.batch_statistics(update, start, BATCHES)
    mean = np.mean([x.mean(0) for x in BATCHES], 0)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4)
    assert int(found["steps"]) == 7
    squared = lambda stats, x: {"s": stats["s"] ** 2}
    with pytest.raises(ValueError, match="s: it does not follow"):
        js.calibration.batch_statistics(squared, {"s": jnp.ones(3)}, BATCHES)
    with pytest.raises(ValueError, match="there is none"):
        js.calibration.batch_statistics(update, start, [])
