"""What is left, counted by hand and by what narrowing does."""

import jax
import jax.numpy as jnp
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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["residual", "grouped", "scan", "moe", "lstm"])
def test_the_share_of_gates_of_0_and_1_is_what_is_counted(name):
    rng = np.random.default_rng(0)
    apply_fn, params, inputs = ZOO[name]()
    trace = js.trace(apply_fn, params, *inputs)
    allow = ("position", "layer")
    found = js.coupling.groups(trace, allow=allow).prunable
    gates = {
        n: (rng.permutation(np.arange(g.size)) >= g.size // 2).astype(np.float32)
        for n, g in found.items()
    }
    drop = {n: np.flatnonzero(gate == 0) for n, gate in gates.items()}
    whole = {
        n: np.broadcast_to(gate, (*found[n].copies, found[n].size))
        for n, gate in gates.items()
    }
    left = js.narrowing.cost(trace, drop, allow=allow).flops / trace.flops
    share = jax.jit(lambda gates: js.narrowing.flops_share(trace, gates))
    np.testing.assert_allclose(share(whole), left, rtol=1e-5)
    assert share({}) == 1


def test_the_derivative_of_the_share_by_hand():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 6)), "c": jnp.ones((6, 2))}
    apply_fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    trace = js.trace(apply_fn, params, jnp.ones((5, 3)))
    gates = {"a[1]": jnp.full(4, 0.5), "b[1]": jnp.full(6, 0.25)}
    share = lambda gates: js.narrowing.flops_share(trace, gates)
    value, grads = jax.value_and_grad(share)(gates)
    n, m, whole = 2.0, 1.5, 12 + 24 + 12  # widths, multiply-adds of a row
    np.testing.assert_allclose(value, (3 * n + n * m + m * 2) / whole, rtol=1e-6)
    np.testing.assert_allclose(grads["a[1]"], np.full(4, (3 + m) / whole), rtol=1e-6)
    np.testing.assert_allclose(grads["b[1]"], np.full(6, (n + 2) / whole), rtol=1e-6)


def test_wrong_gates_of_a_share():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 1))}
    trace = js.trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="c: gates name it"):
        js.narrowing.flops_share(trace, {"c": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"gates of shape \(3,\) for a group"):
        js.narrowing.flops_share(trace, {"a[1]": jnp.ones(3)})
    nothing = js.trace(lambda p, x: x + p["a"], {"a": jnp.ones(3)}, jnp.ones(3))
    with pytest.raises(ValueError, match="contracts no parameters"):
        js.narrowing.flops_share(nothing, {})
