"""Sparse layers of flax train what is kept, under jit and any optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js

PATTERN = js.Balanced((2, 4))
X = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
Y = np.tanh(X[:, :8] - X[:, 8:])


def linen(**options):
    layer = js.modules.LinenSparseDense(8, 0.5, PATTERN, **options)
    return layer, jax.jit(layer.init)(jax.random.key(0), X)


def nnx_layer(**options):
    return js.modules.NNXSparseDense(
        16, 8, sparsity=0.5, pattern=PATTERN, rngs=nnx.Rngs(0), **options
    )


def whole(packed):
    return np.asarray(js.formats.unpack(packed), np.float64)


def packed_of(variables):
    layer = nnx_layer()
    return js.formats.Tiles(
        variables["params"]["values"],
        variables["structure"]["rows"],
        None,
        PATTERN.shape,
        4,
        layer.packed.view,
    )


def test_both_are_dense_layers_with_a_balanced_mask():
    layer, variables = linen()
    w = whole(packed_of(variables))
    js.patterns.verify({"w": w != 0}, {"w": w}, pattern=PATTERN)
    assert (w != 0).sum() == 64
    np.testing.assert_allclose(layer.apply(variables, X), X @ w, rtol=1e-4, atol=1e-5)
    own = nnx_layer()
    w = whole(own.packed)
    np.testing.assert_allclose(own(X), X @ w, rtol=1e-4, atol=1e-5)


def test_outputs_begin_as_large_as_those_of_a_dense_layer():
    layer = js.modules.LinenSparseDense(256, 0.9, js.Balanced((1, 64)))
    x = np.random.default_rng(0).standard_normal((64, 640)).astype(np.float32)
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    assert 0.8 < float(jnp.std(y)) < 1.2


def test_a_linen_layer_trains():
    layer, variables = linen()
    structure = {"structure": variables["structure"]}
    tx = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean((layer.apply({"params": params, **structure}, X) - Y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = variables["params"], tx.init(variables["params"])
    losses = []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert max(x.size for x in jax.tree.leaves(state)) == 64  # of 128 weights


def test_an_nnx_layer_trains_and_its_structure_does_not():
    layer = nnx_layer()
    rows = np.asarray(layer.rows[...])
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        loss = lambda layer: jnp.mean((layer(X) - Y) ** 2)
        value, grads = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, grads)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(layer.rows[...], rows)


def test_a_pruned_kernel_takes_its_place():
    w = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    pruned = js.prune({"w": jnp.asarray(w)}, 0.5, pattern=PATTERN)
    packed = js.formats.pack(*pruned, format=PATTERN)["w"]
    layer = nnx_layer(use_bias=False)
    layer.load(packed)
    expected = X @ np.asarray(pruned.params["w"])
    np.testing.assert_allclose(layer(X), expected, rtol=1e-4, atol=1e-5)
    own, _ = linen(use_bias=False)
    variables = {
        "params": {"values": packed.values},
        "structure": {"rows": packed.rows},
    }
    np.testing.assert_allclose(own.apply(variables, X), expected, rtol=1e-4, atol=1e-5)
    other = js.prune({"w": jnp.asarray(w)}, 0.75, pattern=PATTERN)
    with pytest.raises(ValueError, match="packed: the values have the shape"):
        layer.load(js.formats.pack(*other, format=PATTERN)["w"])


def test_types():
    layer, variables = linen(dtype=jnp.bfloat16)
    assert variables["params"]["values"].dtype == jnp.float32
    assert layer.apply(variables, X).dtype == jnp.bfloat16
    assert nnx_layer(dtype=jnp.bfloat16)(X).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"sparsity": 1.5}, ValueError, "sparsity must lie in"),
        ({"pattern": js.NM(2, 4)}, TypeError, "pattern must be js.Balanced"),
        ({"pattern": js.Balanced((3, 4))}, ValueError, "inputs that 3 divides, got 16"),
        ({"pattern": js.Balanced((2, 3))}, ValueError, "outputs that 3 divides, got 8"),
    ],
)
def test_what_does_not_fit_is_named(options, kind, said):
    given = {"sparsity": 0.5, "pattern": PATTERN} | options
    with pytest.raises(kind, match=said):
        js.modules.NNXSparseDense(16, 8, rngs=nnx.Rngs(0), **given)
    with pytest.raises(kind, match=said):
        js.modules.LinenSparseDense(8, **given).init(jax.random.key(0), X)
