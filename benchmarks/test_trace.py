"""How long the trace of a large model takes; nothing is computed, on any device.

Each turn traces a batch of another size, so that nothing that JAX keeps of an earlier
turn helps. The reference is the jaxpr alone, without which no trace is to be had.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest
from zoo.networks import DenseNet, llama, llama_params

import jaxsparse as js

MODELS = {
    "DenseNet-121": (DenseNet().apply, 121),
    "Llama-3-8B, 32 layers": (llama, 225),
}


def example(name: str, batch: int):
    shape = jax.ShapeDtypeStruct
    if name.startswith("Llama"):
        return llama_params(), shape((batch, 512), jnp.int32)
    x = shape((batch, 224, 224, 3), jnp.float32)
    return jax.eval_shape(DenseNet().init, jax.random.key(0), x), x


@pytest.mark.parametrize("name", MODELS)
def test_trace(name, compare):
    apply_fn, kernels = MODELS[name]
    params, _ = example(name, 1)
    sizes = itertools.count(1)
    fresh = lambda: example(name, next(sizes))[1]

    def ours():
        trace = js.trace(apply_fn, params, fresh())
        assert len(trace.kernels) == kernels

    calls = {
        "the jaxpr alone": lambda: jax.make_jaxpr(apply_fn)(params, fresh()) and None,
        "js.trace": ours,
    }
    compare(f"trace of {name}", calls, rounds=5)
