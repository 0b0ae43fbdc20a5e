"""What is left, counted by hand and by what narrowing does."""

import jax
import numpy as np
import pytest
from zoo.models import ZOO
from zoo.networks import ResNet

import jaxsparse as js

RESNET = ResNet()


@pytest.mark.parametrize("name", ["residual", "grouped", "scan", "moe", "lstm"])
def test_costs_are_those_of_the_narrowed_model_traced_anew(name):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        apply_fn, params, inputs = ZOO[name]()
        trace = js.trace(apply_fn, params, *inputs)
        allow = ("position", "layer")
        found = js.coupling.groups(trace, allow=allow).prunable
        whole = js.narrowing.cost(trace)
        assert whole.flops == trace.flops
        drop = {n: rng.permutation(g.size)[: g.size // 2] for n, g in found.items()}
        small = js.narrowing.narrow(trace, params, drop, allow=allow)
        again = js.trace(small.apply_fn, small.params, *inputs)
        left = js.narrowing.cost(trace, drop, allow=allow)
        leaves = jax.tree.leaves(small.params)
        assert left.parameters == sum(w.size for w in leaves)
        assert left.bytes == sum(w.nbytes for w in leaves)
        assert left.flops == again.flops < whole.flops


def test_operations_of_a_resnet_are_those_torch_pruning_counts():
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    variables = jax.eval_shape(RESNET.init, jax.random.key(0), image)
    rest = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), variables["batch_stats"])
    apply_fn = lambda p, x: RESNET.apply({"params": p, "batch_stats": rest}, x)
    trace = js.trace(apply_fn, variables["params"], image)
    found = js.coupling.groups(trace).prunable
    drop = {name: range(g.size // 2) for name, g in found.items()}
    # Multiply-adds, in thousands of millions.
    assert round(js.narrowing.cost(trace).flops / 2e9, 4) == 1.8141
    assert round(js.narrowing.cost(trace, drop).flops / 2e9, 4) == 0.4831
